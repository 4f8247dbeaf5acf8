"""WebDataset's shards, as img2dataset writes them: tar files with random access.

A shard is read once from end to end; where its images lie is kept in a cache, so that pairs can be
shuffled over all shards.  Members are never unpacked.  Format: github.com/webdataset/webdataset.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.folders import MAX_TEXT, PICTURES
from clip_lite_jax.data.index import indices
from clip_lite_jax.data.pairs import MAX_BYTES, Found, Images
from clip_lite_jax.data.rows import TEXT, TEXTS, array, in_one_piece
from clip_lite_jax.data.splits import splits_of_files
from clip_lite_jax.errors import BadImage, DataError, Unreadable
from clip_lite_jax.places import Place, each, matching, place, stamp_of, version_of
from clip_lite_jax.remote import RemotePath

SCHEMA = pa.schema(
    [
        ("key", TEXT),
        ("captions", TEXTS),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("reason", TEXT),  # why the sample cannot be used, or nothing
    ]
)


def read_shards(config: DataConfig) -> Found:
    """The samples of tar shards: a picture, and captions in ``.txt`` or ``.json``.

    `data.source` is one shard, a folder of them, or a pattern: ``cc3m/{00000..00331}.tar``.

    Raises:
      DataError: no shards.
    """
    paths = shard_paths(config.source, ".tar")
    make = partial(_index, caption_keys=config.caption_columns)
    version = ("webdataset", 1, *config.caption_columns)
    tables = list(indices(paths, make, version, config.threads))
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(table) for table in tables])
    # Keys need to be unique in their shard alone.
    ids = [_prefixed(path, table["key"]) for path, table in zip(paths, tables, strict=True)]

    table = pa.concat_tables(tables).combine_chunks()
    refused = np.flatnonzero(np.asarray(pc.binary_length(table["reason"])))
    return Found(
        config.source,
        TarImages(tuple(paths), shard, np.asarray(table["offset"]), np.asarray(table["size"])),
        in_one_piece(ids, TEXT),
        [in_one_piece(table["captions"].chunks, TEXTS)],
        splits=splits_of_files([path.name for path in paths], shard),
        bad={row: table["reason"][row].as_py() for row in refused.tolist()},
    )


@dataclass(frozen=True)
class TarImages(Images):
    """Images inside tar files."""

    paths: tuple[Place, ...]
    shard: np.ndarray
    """int32 ``[N]``: the place in `paths`."""
    offset: np.ndarray
    """int64 ``[N]``, in bytes."""
    size: np.ndarray

    def read(self, index: int) -> bytes:
        path, size = self.paths[self.shard[index]], int(self.size[index])
        try:
            data = _part(path, int(self.offset[index]), size)
        except OSError as error:
            raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
        except DataError as error:
            raise Unreadable(str(error)) from error
        if len(data) < size:
            raise BadImage(f"{path} has become shorter")
        return data

    def stamp(self, index: int) -> str:
        return self._stamps[self.shard[index]]

    @cached_property
    def _stamps(self) -> list[str]:
        return [stamp_of(path) for path in self.paths]

    def take(self, indices: np.ndarray) -> "TarImages":
        return TarImages(self.paths, self.shard[indices], self.offset[indices], self.size[indices])


def _part(path: Place, offset: int, size: int) -> bytes:
    if isinstance(path, RemotePath):
        return path.read(offset, offset + size)
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def shard_paths(source: str, ending: str) -> Sequence[Place]:
    """A file, the files of a folder with this ending, or those that a pattern means.

    A pattern has ``*`` or ``?``, or ``{00000..00331}``, all numbers from one to the other.

    Raises:
      DataError: there are none, or one that the pattern counts up is missing.
    """
    whole = place(source)
    paths: Sequence[Place] = [whole]
    if whole.is_dir():
        paths = sorted(whole.glob(f"*{ending}"), key=str)
    elif "{" in source and not whole.is_file():
        paths = [type(whole)(name) for name in _braces(source)]
        there = each(lambda path: path.is_file(), paths)
        if missing := [path for path, found in zip(paths, there, strict=True) if not found]:
            raise DataError(
                f"data.source={source!r}: {len(missing)} of {len(paths)} files are not there, "
                f"{missing[0]} first"
            )
    elif glob.has_magic(source) and not whole.is_file():
        paths = matching(source)
    if not paths or not paths[0].is_file():
        raise DataError(f"data.source={source!r}: no such file, and no folder with {ending} files")
    if len(paths) > 1:
        _check_complete(source, paths)
    return paths


def _check_complete(source: str, paths: Sequence[Place]) -> None:
    """Raises `DataError` where names count to more than there are: ``train-00003-of-00008``."""
    there: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)-of-(\d+)(.*)", path.name):
            name, number, count, _ = match.groups()
            there.setdefault((name, int(count)), set()).add(int(number))
    for (name, count), numbers in there.items():
        if len(numbers) < count:
            missing = next(number for number in range(count) if number not in numbers)
            raise DataError(
                f"data.source={source!r}: {len(numbers)} of {count} shards {name}* are there; "
                f"number {missing} is missing"
            )


MAX_NAMES = 1_000_000


def _braces(pattern: str) -> Iterator[str]:
    """``a-{00..02}.tar`` → a-00.tar, a-01.tar, a-02.tar; ``{a,b}`` gives both."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Sequence[str]] = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            choices.append([part])
        elif span := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = span.groups()
            count = int(last) - int(first) + 1
            if not 0 < count <= MAX_NAMES:
                raise DataError(f"data.source={pattern!r}: {{{part}}} counts {count} files")
            width = len(first) if first.startswith("0") else 0
            choices.append([str(n).zfill(width) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ("".join(names) for names in product(*choices))


def _prefixed(path: Place, keys: pa.ChunkedArray) -> pa.Array:
    return pc.binary_join_element_wise(
        pa.scalar(path.stem, TEXT), in_one_piece(keys.chunks, TEXT), pa.scalar("/", TEXT)
    )


def _index(path: Place, caption_keys: Sequence[str]) -> pa.Table:
    samples = list(samples_of(path, caption_keys))
    columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names}
    return pa.table([array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


@dataclass
class Sample:
    """The members of a shard that share a name up to its first dot."""

    key: str
    captions: list[str] = field(default_factory=list)
    offset: int = 0
    size: int = -1
    reason: str = ""


def samples_of(path: Place, caption_keys: Sequence[str]) -> Iterator[Sample]:
    """The samples of a shard, in its order; of a damaged one those before the damage.

    The last one then has the damage as its reason.
    """
    seen: set[str] = set()
    sample: Sample | None = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = version_of(path)[1]
            for member in tar:
                if member.isdir():
                    continue
                key, ending = _key(member.name)
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield _checked(sample, seen)
                    sample = Sample(key)
                sample.reason = sample.reason or _refused(member, end)
                if not sample.reason:
                    _take(sample, ending, member, tar, caption_keys)
    except DataError:  # a server that does not answer is no damaged file
        raise
    # tarfile raises whatever int() and struct do on damaged headers.
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        if sample is not None:
            yield _checked(sample, seen)
        why = f"{path.name} is damaged: {error}" if str(error) else f"{path.name} is damaged"
        sample = Sample("(the rest)", reason=why)
    if sample is not None:
        yield _checked(sample, seen)


def _key(name: str) -> tuple[str, str]:
    """``a/b.c.jpg`` → ``a/b`` and ``.c.jpg``."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return folder + slash + stem, (dot + ending).lower()


def _refused(member: tarfile.TarInfo, end: int) -> str:
    """Why a member is not read, or nothing."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        return f"the name of {member.name!r:.80} leaves the archive"
    if not member.isreg() or member.issparse():
        return f"{member.name!r:.80} is no plain file"
    if member.offset_data + member.size > end:
        return f"{member.name!r:.80} is cut short"
    return ""


def _take(
    sample: Sample,
    ending: str,
    member: tarfile.TarInfo,
    tar: tarfile.TarFile,
    caption_keys: Sequence[str],
) -> None:
    """Notes where the picture lies, and reads captions."""
    if ending in PICTURES:
        if sample.size >= 0:
            sample.reason = "more than one picture"
        elif member.size > MAX_BYTES:
            sample.reason = f"{member.size:,} bytes, over {MAX_BYTES:,}"
        sample.offset, sample.size = member.offset_data, member.size
    elif ending in (".txt", ".json"):
        if member.size > MAX_TEXT:
            sample.reason = f"{member.name!r:.80} has {member.size:,} bytes, over {MAX_TEXT:,}"
            return
        content = tar.extractfile(member)
        assert content is not None  # it is a plain file
        try:
            found = _captions(content.read().decode("utf-8-sig"), ending, caption_keys)
        except (ValueError, RecursionError) as error:
            sample.reason = f"{member.name!r:.80}: {error}"
            return
        # img2dataset writes the caption twice, .json before .txt.
        sample.captions += [text for text in found if text not in sample.captions]


def _captions(text: str, ending: str, caption_keys: Sequence[str]) -> Iterable[str]:
    if ending == ".txt":
        return [text.strip()] if text.strip() else []
    content = json.loads(text)
    values = [content.get(key) for key in caption_keys] if isinstance(content, dict) else []
    items = [x for value in values for x in (value if isinstance(value, list) else [value])]
    return [item.strip() for item in items if isinstance(item, str) and item.strip()]


def _checked(sample: Sample, seen: set[str]) -> Sample:
    if sample.key in seen:
        sample.reason = sample.reason or "its key occurs twice"
    seen.add(sample.key)
    if sample.size < 0:
        sample.reason = sample.reason or "no picture"
    return sample
