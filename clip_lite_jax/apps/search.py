"""Searching: texts, pictures and sums of them, in an index, a folder or a file of texts."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clip_lite_jax.apps.encoding import Progress, encode_texts
from clip_lite_jax.apps.identity import check_same, identity_of, weights_of, whole_path
from clip_lite_jax.apps.index import Hit, Index, check_method
from clip_lite_jax.apps.index_build import Built, Options, build_index
from clip_lite_jax.apps.queries import ModelEncoder, Part, Query, query
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.folders import MAX_TEXT
from clip_lite_jax.errors import DataError
from clip_lite_jax.files import cache_folder
from clip_lite_jax.inference import DualEncoderModel


@dataclass(frozen=True)
class Hits:
    """The best files for a query, best first, and the files that could not be read."""

    files: list[tuple[Path, float]]  # with their critic score T, in nats
    unreadable: list[tuple[Path, str]]


@dataclass(frozen=True)
class Request:
    """What is looked for."""

    parts: Sequence[Part]
    without: Sequence[str] = ()
    """Texts whose direction is taken out of the query."""
    count: int = 5
    kind: str = "images"
    """Or ``texts``."""


class IndexEncoder:
    """A `queries.Encoder` that takes pictures of the index from there, and loads a model when it
    needs one."""

    def __init__(self, index: Index, load: Callable[[], DualEncoderModel]) -> None:
        self._index, self._load = index, load

    @cached_property
    def model(self) -> DualEncoderModel:
        """Raises `ConfigError` where it is another than the one that made the index."""
        return self._load()

    @property
    def critic(self) -> str:
        return self._index.model.critic

    def text(self, text: str) -> Query:
        return ModelEncoder(self.model).text(text)

    def image(self, image: Path) -> Query:
        row = self._index.row_of_file(image)
        if row is not None:
            return Query(self._index.embedding(row), "image")
        return ModelEncoder(self.model).image(image)


def find(index: Index, request: Request, load: Callable[[], DualEncoderModel]) -> list[Hit]:
    """The hits of a request; `load` gives the model of the index.

    Raises:
      ConfigError, DataError: as `queries.query` and `Index.search`.
    """
    encoder = IndexEncoder(index, load)
    looked_for = query(encoder, request.parts, request.without)
    matrix = None if index.model.affine else encoder.model.fns.matrix
    return index.search(looked_for, request.count, request.kind, matrix)


def search(model: DualEncoderModel, folder: Path, query: str, count: int) -> Hits:
    """The `count` pictures under `folder` that the critic scores highest with the query.

    Raises:
      DataError: no readable picture.
    """
    index, built = folder_index(model, folder)
    hits = find(index, Request([Part(query)], count=count), lambda: model)
    unreadable = [(folder / id, reason) for id, reason in built.skipped]
    return Hits([(folder / hit.id, hit.value) for hit in hits], unreadable)


def folder_index(
    model: DualEncoderModel,
    folder: Path,
    path: str = "",
    progress: Progress | None = None,
    method: str = "auto",
) -> tuple[Index, Built]:
    """The index of a folder of pictures, which is kept in the user's cache: only what is new since
    the last call is encoded.

    Raises:
      ConfigError: no such method (`Index.open`).
      DataError: no such folder, or no readable picture in it.
    """
    check_method(method)
    if not folder.is_dir():
        raise DataError(f"--images {folder}: no such folder")
    identity = identity_of(model, path)
    known = f"{folder.resolve()}\x00{identity.weights}"
    kept = cache_folder() / "indexes" / hashlib.sha256(known.encode()).hexdigest()[:32]
    data = DataConfig(source=str(folder.resolve()), format="pictures")
    built = build_index(model, data, kept, Options(), path, progress)
    index = Index.open(kept, method)
    index.prepare()
    return index, built


def text_index(model: DualEncoderModel, file: Path, path: str = "", method: str = "auto") -> Index:
    """An index in memory, of the lines of a text file.

    Raises:
      ConfigError: no such method (`Index.open`).
      DataError: it cannot be read, or has none.
    """
    check_method(method)
    try:
        lines = list(dict.fromkeys(_lines(file)))
    except (OSError, ValueError) as error:
        raise DataError(f"--texts {file}: {error}") from error
    if not lines:
        raise DataError(f"--texts {file}: no line of text in it")
    identity = identity_of(model, whole_path(path))
    return Index.of_texts(identity, lines, encode_texts(model, lines), method)


def _lines(file: Path) -> Iterator[str]:
    """The lines that are not empty; raises ``ValueError`` where one is too long or no UTF-8."""
    with file.open(encoding="utf-8-sig") as lines:
        number = 0
        while line := lines.readline(MAX_TEXT + 1):
            number += 1
            if len(line) > MAX_TEXT:
                raise ValueError(f"line {number} has over {MAX_TEXT:,} characters")
            if text := line.strip():
                yield text


def checked(model: DualEncoderModel, index: Index, path: str) -> DualEncoderModel:
    """The model, if it is the one that made the index; raises `ConfigError` otherwise."""
    check_same(index.model, weights_of(model), path, index.folder)
    return model
