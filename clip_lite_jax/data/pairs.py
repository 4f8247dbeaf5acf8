"""Images with captions: what is known of them in columns, the images wherever they lie."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from clip_lite_jax.data.records import Example, RecordSource
from clip_lite_jax.data.rows import Rows
from clip_lite_jax.errors import BadImage


class Images(Protocol):
    """Random access to encoded images; safe to share between threads."""

    def read(self, index: int) -> bytes:
        """The image of a row; raises `BadImage` where there is none."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Some of the rows of a source, with their images."""

    rows: Rows
    images: Images
    indices: np.ndarray
    """int64 ``[N]``: the rows that are meant, in order."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return replace(self.metadata(index), image=self.images.read(self.row(index)))

    def metadata(self, index: int) -> Example:
        return self.rows[self.row(index)]

    def row(self, index: int) -> int:
        return int(self.indices[index])

    def chosen(self, indices: np.ndarray) -> "Pairs":
        return replace(self, indices=self.indices[indices])


@dataclass(frozen=True)
class FileImages:
    """Images in files below one folder."""

    root: Path
    paths: pa.Array
    """Relative to `root`, `rows.TEXT`."""

    def read(self, index: int) -> bytes:
        path = inside(self.root, self.paths[index].as_py())
        try:
            return path.read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class RecordImages:
    """Images in records of our own format."""

    records: RecordSource

    def read(self, index: int) -> bytes:
        return self.records[index].image


def inside(root: Path, name: str) -> Path:
    """The file that a name means; raises `BadImage` unless it is there, below `root`."""
    if not name:
        raise BadImage("no image path")
    root = root.resolve()
    try:
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            raise BadImage(f"the path leaves {root}")
        if not target.is_file():
            raise BadImage("no such file")
    except (OSError, ValueError) as error:  # a name no file can have: too long, a null byte
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"not a path: {error}") from error
    return target
