"""Files of embeddings: ids and rows of one shard, in each of the formats, written and read.

A reader takes nothing on trust: there is no pickle, and shapes and types are checked.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_lite_jax.data.records import RawRecords, write_raw_records
from clip_lite_jax.errors import DataError
from clip_lite_jax.files import replacing, write_atomic


@dataclass(frozen=True)
class Shard:
    """Some rows."""

    ids: Sequence[str]
    """Of the examples; of texts several rows may share one."""
    embeddings: np.ndarray
    """float32 or float16 ``[N, D]``."""
    captions: Sequence[str] | None = None
    """Of texts."""


def write_arrayrecord(path: Path, shard: Shard) -> None:
    """A record for each row, a msgpack map: id, (caption,) dtype, embedding as little-endian."""
    rows, type = _little(shard.embeddings), shard.embeddings.dtype.name

    def record(n: int) -> bytes:
        caption = {} if shard.captions is None else {"caption": shard.captions[n]}
        row = {"dtype": type, "embedding": rows[n].tobytes()}
        return msgpack.packb({"id": shard.ids[n], **caption, **row})

    write_raw_records(path, map(record, range(len(shard.ids))))


def read_arrayrecord(path: Path) -> Shard:
    records = RawRecords(path)
    found = [msgpack.unpackb(records.read(n)) for n in range(len(records))]
    rows = [np.frombuffer(row["embedding"], _TYPES[row["dtype"]]) for row in found]
    captions = [row["caption"] for row in found] if found and "caption" in found[0] else None
    return Shard([row["id"] for row in found], np.stack(rows), captions)


def write_parquet(path: Path, shard: Shard) -> None:
    """Columns id, (caption,) and embedding, a list of fixed size."""
    flat = pa.array(_little(shard.embeddings).ravel())
    columns: dict[str, Any] = {"id": pa.array(shard.ids, pa.string())}
    if shard.captions is not None:
        columns["caption"] = pa.array(shard.captions, pa.string())
    width = shard.embeddings.shape[1]
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, width)
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def read_parquet(path: Path) -> Shard:
    table = pq.read_table(path, memory_map=False).combine_chunks()
    table.validate(full=True)
    lists = table["embedding"].combine_chunks()
    rows = np.asarray(lists.flatten()).reshape(len(table), lists.type.list_size)
    captions = table["caption"].to_pylist() if "caption" in table.column_names else None
    return Shard(table["id"].to_pylist(), rows, captions)


def write_npy(path: Path, shard: Shard) -> None:
    """``x.npy``, and beside it ``x.jsonl`` with a line of id (and caption) for each row."""
    lines = []
    for n, id in enumerate(shard.ids):
        caption = {} if shard.captions is None else {"caption": shard.captions[n]}
        lines.append(json.dumps({"id": id, **caption}) + "\n")
    write_atomic(path.with_suffix(".jsonl"), "".join(lines))
    buffer = io.BytesIO()
    np.save(buffer, _little(shard.embeddings))
    write_atomic(path, buffer.getvalue())


def read_npy(path: Path) -> Shard:
    rows = np.load(path, allow_pickle=False)
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    captions = [row["caption"] for row in found] if found and "caption" in found[0] else None
    return Shard([row["id"] for row in found], rows, captions)


@dataclass(frozen=True)
class Format:
    ending: str
    write: Callable[[Path, Shard], None]
    read: Callable[[Path], Shard]


FORMATS = {
    "arrayrecord": Format(".arrayrecord", write_arrayrecord, read_arrayrecord),
    "parquet": Format(".parquet", write_parquet, read_parquet),
    "npy": Format(".npy", write_npy, read_npy),
}
"""By the word for ``--format``."""


def read_shards(folder: Path, kind: str = "images") -> Iterator[Shard]:
    """The shards of ``images`` or ``texts`` that ``clip-lite embed`` wrote to a folder, in order.

    Raises:
      DataError: it is not finished, or a file is damaged.
    """
    try:
        known = json.loads((folder / "manifest.json").read_bytes())
        format, width = FORMATS[known["format"]], int(known["model"]["width"])
        names = [name for split in known["splits"].values() for name in split[kind]["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder} holds no finished embeddings of {kind}: {error}") from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise DataError(f"{folder}: manifest.json names a file elsewhere: {name!r}")
        try:
            shard = format.read(folder / name)
            if shard.embeddings.dtype.newbyteorder("=") not in (np.float32, np.float16):
                raise ValueError(f"rows of {shard.embeddings.dtype}")
            if shard.embeddings.shape != (len(shard.ids), width):
                raise ValueError(f"{shard.embeddings.shape} for {len(shard.ids)} ids of {width}")
        except DataError:
            raise
        # Whatever the libraries raise on damaged files: pyarrow and msgpack have their own.
        except Exception as error:
            raise DataError(f"{folder / name} cannot be read: {error}") from error
        yield shard


_TYPES: dict[str, Any] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


def _little(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows, _TYPES[rows.dtype.name])
