"""The files of an index: ``index.json``, and for pictures and texts a matrix and a table of rows.

Of each set ``KIND-GENERATION.npy`` holds the projections and ``KIND-GENERATION.parquet`` what they
are of.  ``index.json`` names the generation and is replaced last, so that an index is always whole.
An index may come from strangers: nothing is unpickled, sizes and types are checked, and no path
leaves the folder of the pictures.
"""

import dataclasses
import re
import uuid
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from clip_lite_jax.apps.encoding import DTYPES
from clip_lite_jax.apps.identity import Identity
from clip_lite_jax.config import explain
from clip_lite_jax.config.types import STRICT, NonNegativeInt
from clip_lite_jax.data.rows import TEXT
from clip_lite_jax.errors import DataError
from clip_lite_jax.files import replacing, write_atomic

INDEX_FILE, SKIPPED_FILE, PARTS = "index.json", "skipped.jsonl", "parts"
FORMAT = 1
"""Raised when readers of before would misread an index."""

COLUMNS = {
    "images": ("key", "id", "stamp", "path"),
    "texts": ("key", "id", "stamp", "path", "caption"),
}
"""Of the table of a set of rows, all `TEXT`.  `path` is null where a picture is no file."""


@dataclass(frozen=True, config=STRICT)
class Set:
    """The rows of one kind."""

    count: NonNegativeInt
    generation: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """What ``index.json`` says."""

    format: int
    model: Identity
    source: str
    what: str
    root: str | None = None
    """The folder that paths of pictures are relative to."""
    dtype: str = "float32"
    fast: bool = False
    """How pictures were decoded; see `encoding.encode_pictures`."""
    sets: dict[str, Set] = field(default_factory=dict)
    """``images`` and ``texts``, those that are there."""
    skipped: NonNegativeInt = 0


@dataclasses.dataclass(frozen=True)
class Rows:
    """One set of rows in memory, or mapped there."""

    table: pa.Table
    embeddings: np.ndarray
    """float32 or float16 ``[N, D]``."""

    def __len__(self) -> int:
        return len(self.embeddings)


def read_manifest(folder: Path) -> Manifest:
    """Raises `DataError` where there is no index, or none that this version reads."""
    path = folder / INDEX_FILE
    try:
        found = pydantic.TypeAdapter(Manifest).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no index: clip-lite index --model MODEL --images FOLDER --out {folder}"
        ) from error
    except pydantic.ValidationError as error:
        raise DataError(f"{path} is damaged: {explain(error)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if found.format != FORMAT:
        raise DataError(f"{path} has format {found.format}, this version reads {FORMAT}")
    if unknown := set(found.sets) - set(COLUMNS):
        raise DataError(f"{path} names sets of rows that there are not: {sorted(unknown)}")
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = pydantic.TypeAdapter(Manifest).dump_json(manifest, indent=1)
    write_atomic(folder / INDEX_FILE, content + b"\n")


def read_rows(folder: Path, manifest: Manifest, kind: str) -> Rows:
    """The rows of a kind, the matrix mapped; none of a kind that is not there.

    Raises:
      DataError: a file is missing, damaged, or does not fit ``index.json``.
    """
    known = manifest.sets.get(kind)
    if known is None or not known.count:
        return Rows(empty_table(kind), np.zeros((0, manifest.model.width), np.float32))
    matrix, table = paths(folder, kind, known.generation)
    try:
        rows = np.load(matrix, mmap_mode="r", allow_pickle=False)
        if rows.dtype.name not in DTYPES or rows.shape != (known.count, manifest.model.width):
            raise ValueError(f"{rows.dtype} {rows.shape}")
        found = read_table(table, COLUMNS[kind])
        if len(found) != known.count:
            raise ValueError(f"{len(found)} rows in {table.name}")
    # Whatever the libraries raise on damaged files: pyarrow has errors of its own.
    except Exception as error:
        raise DataError(
            f"{matrix} does not hold the {known.count} rows of {manifest.model.width} numbers that "
            f"{INDEX_FILE} speaks of ({error}): make the index anew"
        ) from error
    return Rows(found, rows)


def paths(folder: Path, kind: str, generation: str) -> tuple[Path, Path]:
    """The matrix and the table of a set."""
    name = f"{kind}-{generation}"
    return folder / f"{name}.npy", folder / f"{name}.parquet"


def new_generation() -> str:
    return uuid.uuid4().hex


def write_table(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """The columns of a file as `TEXT`; raises what pyarrow raises, and ``ValueError``."""
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if names[: len(columns)] != list(columns):
            raise ValueError(f"{path.name} has the columns {', '.join(names)}")
        table = file.read(columns=list(columns))
    table.validate(full=True)
    return table.cast(pa.schema([(name, TEXT) for name in columns])).combine_chunks()


def empty_table(kind: str) -> pa.Table:
    return pa.table({name: pa.array([], TEXT) for name in COLUMNS[kind]})


def delete_others(folder: Path, manifest: Manifest) -> None:
    """Removes what belongs to no set: of generations before, and of a build that was killed."""
    kept = {
        path.name
        for kind, known in manifest.sets.items()
        for path in paths(folder, kind, known.generation)
    }
    ours = re.compile(r"(images|texts)-[0-9a-f]{32}\.(npy|parquet)(\.[0-9a-f]{32}\.tmp)?")
    for path in folder.iterdir():
        if path.name not in kept and ours.fullmatch(path.name):
            path.unlink()
    for path in (folder / PARTS).glob("*"):
        if re.fullmatch(r"[0-9a-f]{32}\.parquet(\.[0-9a-f]{32}\.tmp)?", path.name):
            path.unlink()


def to_json(manifest: Manifest) -> dict[str, Any]:
    return pydantic.TypeAdapter(Manifest).dump_python(manifest)
