"""The record format: one image with its captions per record of an ArrayRecord file.

A record is a msgpack map with exactly the fields of `Example`.  Reading checks every field, because
record files come from outside: a damaged or foreign record raises ``ValueError``, it never yields a
half-filled example and never runs code or builds objects that the record names.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack
from array_record.python import array_record_module

# One record per chunk gives random access without decoding neighbours.  No compression: the images
# are compressed already, and uncompressed chunks do not depend on the version of a codec.
# One writer thread: chunks are laid down in the order they were written.
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its captions, as every source yields it."""

    id: str  # unique in its source
    group: str  # examples that share it depict the same thing: never each other's negative
    captions: tuple[str, ...]
    image: bytes  # encoded (PNG, JPEG, WebP)
    attributes: Mapping[str, str]  # e.g. artist, category, split, licence


_FIELDS = tuple(field.name for field in dataclasses.fields(Example))


def encode_record(example: Example) -> bytes:
    """Serialises one example; equal examples give equal bytes (attributes are sorted)."""
    if not isinstance(example.captions, tuple):
        raise ValueError(f"captions must be a tuple, not {type(example.captions).__name__}")
    fields = {
        "id": example.id,
        "group": example.group,
        "captions": list(example.captions),
        "image": example.image,
        "attributes": dict(example.attributes),
    }
    _check_fields(fields)
    fields["attributes"] = dict(sorted(example.attributes.items()))
    return msgpack.packb(fields)


def decode_record(record: bytes) -> Example:
    """Parses one record; raises ``ValueError`` saying what is wrong when it is not one of ours."""
    try:
        fields = msgpack.unpackb(
            record, raw=False, strict_map_key=True, ext_hook=_no_extension, use_list=True
        )
    except ValueError as error:  # every msgpack error but the two below is a ValueError
        raise ValueError(f"not a msgpack record: {error or type(error).__name__}") from error
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not a msgpack record: {error}") from error
    _check_fields(fields)
    return Example(**{**fields, "captions": tuple(fields["captions"])})


def write_records(path: str | os.PathLike[str], examples: Iterable[Example]) -> int:
    """Writes an ArrayRecord file of examples; see `write_raw_records`."""
    return write_raw_records(path, map(encode_record, examples))


def write_raw_records(path: str | os.PathLike[str], records: Iterable[bytes]) -> int:
    """Writes an ArrayRecord file and returns the number of records.

    The same records give the same bytes.  The file appears under `path` only when it is complete.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    count = 0
    try:
        writer = array_record_module.ArrayRecordWriter(temporary, _WRITER_OPTIONS)
        try:
            for record in records:
                writer.write(record)
                count += 1
        finally:
            writer.close()
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return count


class RawRecords:
    """Random access to the bytes of one ArrayRecord file.

    Opens the file on first use, so that an instance travels to worker processes by pickling; safe
    to share between threads.  On first use raises ``FileNotFoundError`` when there is no such file
    and ``ValueError`` when it is not an ArrayRecord file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._reader: Any = None

    def __len__(self) -> int:
        with self._lock:
            return self._open().num_records()

    def read(self, index: int) -> bytes:
        with self._lock:
            reader = self._open()
            if not 0 <= index < reader.num_records():
                raise IndexError(f"{self.path} has {reader.num_records()} records, none at {index}")
            try:
                (record,) = reader.read([index])
            except RuntimeError as error:  # a damaged file
                raise ValueError(f"{self.path}, record {index}: {error}") from error
        return record

    def __reduce__(self) -> tuple[type[RawRecords], tuple[str | os.PathLike[str]]]:
        return type(self), (self.path,)

    def _open(self) -> Any:
        """The reader, opened once; the caller holds the lock."""
        if self._reader is None:
            file = os.fspath(self.path)
            if not os.path.isfile(file):
                raise FileNotFoundError(f"no record file at {self.path}")
            reader = array_record_module.ArrayRecordReader(file, _READER_OPTIONS)
            if not reader.ok():  # it reports a damaged file as one with no records
                raise ValueError(f"{self.path} is not a complete ArrayRecord file")
            self._reader = reader
        return self._reader


class RecordSource(RawRecords):
    """Random access to the examples of one ArrayRecord file."""

    def __getitem__(self, index: int) -> Example:
        record = self.read(index)
        try:
            return decode_record(record)
        except ValueError as error:
            raise ValueError(f"{self.path}, record {index}: {error}") from error


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"msgpack extension type {code} ({len(data)} bytes) is not allowed")


def _check_fields(fields: Any) -> None:
    """Raises ``ValueError`` unless `fields` maps exactly the fields of `Example` to their types."""
    if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
        found = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"a record has the fields {', '.join(_FIELDS)}; found {found}")
    for name in ("id", "group"):
        if not isinstance(fields[name], str) or not fields[name]:
            raise ValueError(f"field {name!r} must be a non-empty text: {fields[name]!r:.80}")
    captions, image, attributes = fields["captions"], fields["image"], fields["attributes"]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"field 'captions' must be a list of texts: {captions!r:.80}")
    if not isinstance(image, bytes) or not image:
        raise ValueError(f"field 'image' must be non-empty bytes, not {type(image).__name__}")
    if not isinstance(attributes, dict) or not all(
        isinstance(item, str) for pair in attributes.items() for item in pair
    ):
        raise ValueError(f"field 'attributes' must map texts to texts: {attributes!r:.80}")
