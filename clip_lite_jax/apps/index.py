"""A searchable index: opened from its folder, asked with embeddings.

    index = Index.open(Path("photos.index"))
    model = clip_lite_jax.load(index.model.path, batch_size=1)
    query = ModelEncoder(model).text("a red boat")
    for hit in index.search(query, count=10):
        print(hit.value, hit.path)

Safe to share between threads.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.apps import index_faiss, index_files
from clip_lite_jax.apps.encoding import check_choice
from clip_lite_jax.apps.identity import Identity
from clip_lite_jax.apps.index_files import COLUMNS, Manifest, Rows
from clip_lite_jax.apps.queries import Query
from clip_lite_jax.data.folders import PICTURES
from clip_lite_jax.data.image_ops import check_header
from clip_lite_jax.data.pairs import MAX_BYTES, inside
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.vectors import unit

FAISS_ABOVE = 50_000
"""Rows from which on a graph answers faster than it costs to make; see docs/search.md."""
METHODS = ("auto", "exact", "faiss")
_BLOCK = 65_536
"""Rows of float16 that are made float32 at a time."""

Matrix = Callable[[Any, Any], Any]
"""``EncodeFns.matrix``: ``[N, D], [M, D] -> [N, M]``."""


@dataclass(frozen=True)
class Hit:
    """A row that was found."""

    row: int
    """Its number in the index."""
    id: str
    value: float
    """In the measure of the search: the critic's T in nats, or a cosine."""
    path: Path | None = None
    """The file of the picture, where it has one of its own; see `Index.picture`."""
    caption: str | None = None
    """Of a text."""


def check_method(method: str) -> None:
    """Raises `ConfigError` where there is no such way to search, or not on this machine."""
    check_choice("--method", method, METHODS)
    if method == "faiss" and not index_faiss.available():
        raise ConfigError(f"--method faiss: FAISS is not installed: {index_faiss.INSTALL}")


class _Searched:
    """One set of rows, ready to be searched."""

    def __init__(self, rows: Rows, matrix: Path | None, unit_rows: bool) -> None:
        self.rows, self.matrix, self.unit = rows, matrix, unit_rows
        self._lock = threading.Lock()
        self._graph: Any = None

    @cached_property
    def embeddings(self) -> np.ndarray:
        """float32 ``[N, D]``; those that are kept so are not copied."""
        return np.asarray(self.rows.embeddings, np.float32)

    @cached_property
    def lengths(self) -> np.ndarray:
        """float32 ``[N]``."""
        return np.linalg.norm(self.embeddings, axis=1).clip(1e-12).astype(np.float32)

    def graph(self, make: bool) -> Any:
        """That of FAISS: what is in the cache, or else made now with `make`, or None.

        Without a `matrix` on the disk, or a cache that can be written, it lives in memory alone.
        """
        with self._lock:
            if self._graph is None:
                file = self._graph_file()
                if file is not None and index_faiss.available():
                    self._graph = index_faiss.read(file, self.rows.embeddings.shape)
                if self._graph is None and make:
                    self._graph = index_faiss.build(self.embeddings)
                    if file is not None:
                        index_faiss.write(self._graph, file)
            return self._graph

    def _graph_file(self) -> Path | None:
        if self.matrix is None:
            return None
        try:
            return index_faiss.graph_file(self.matrix)
        except OSError:  # another build has deleted these rows since they were opened
            return None


class Index:
    """Pictures, captions or both, by their projections."""

    def __init__(self, folder: Path, manifest: Manifest, method: str = "auto") -> None:
        check_method(method)
        self.folder, self.manifest, self.method = folder, manifest, method
        self._sets = {kind: self._open(kind) for kind in COLUMNS}

    @classmethod
    def open(cls, folder: Path, method: str = "auto") -> "Index":
        """The index in a folder.

        Args:
          method: ``exact`` compares every row; ``faiss`` follows a graph, which is made if it is
            not there; ``auto`` follows the graph from `FAISS_ABOVE` rows on, if there is one.

        Raises:
          DataError: there is none, or it is damaged.
        """
        check_method(method)
        manifest = index_files.read_manifest(folder)
        while True:
            try:
                return cls(folder, manifest, method)
            except DataError:
                # A build may have finished just now, and deleted the rows before.
                newer = index_files.read_manifest(folder)
                if newer.sets == manifest.sets:
                    raise
                manifest = newer

    @classmethod
    def of_texts(
        cls, model: Identity, texts: Sequence[str], embeddings: np.ndarray, method: str = "auto"
    ) -> "Index":
        """An index in memory: of texts with their projections ``[N, D]``."""
        index = cls(Path(), Manifest(index_files.FORMAT, model, "", "text"), method)
        table = {name: pa.array(texts, pa.large_string()) for name in COLUMNS["texts"]}
        table["path"] = pa.nulls(len(texts), pa.large_string())
        index._sets["texts"] = _Searched(Rows(pa.table(table), embeddings), None, model.unit)
        return index

    def _open(self, kind: str) -> _Searched:
        known = self.manifest.sets.get(kind)
        rows = index_files.read_rows(self.folder, self.manifest, kind)
        file = index_files.paths(self.folder, kind, known.generation)[0] if len(rows) else None  # type: ignore[union-attr]  # it has rows
        return _Searched(rows, file, self.manifest.model.unit)

    @property
    def model(self) -> Identity:
        """The model that made it."""
        return self.manifest.model

    def count(self, kind: str = "images") -> int:
        """Rows of ``images`` or ``texts``."""
        return len(self._set(kind).rows)

    def prepare(self, kind: str = "images") -> bool:
        """Makes the graph that ``auto`` follows, where it would; returns whether there is one."""
        searched = self._set(kind)
        wanted = searched.unit and len(searched.rows) >= FAISS_ABOVE and index_faiss.available()
        return bool(wanted and searched.graph(make=True) is not None)

    def slow(self, kind: str = "images") -> str:
        """Why a search compares every row where a graph would be faster, and what helps."""
        searched = self._set(kind)
        if self.method != "auto" or len(searched.rows) < FAISS_ABOVE or not searched.unit:
            return ""
        if searched.matrix is None:  # in memory, for one search: a graph would take longer
            return ""
        if not index_faiss.available():
            return (
                f"{len(searched.rows):,} rows are compared one by one: FAISS is faster there "
                f"({index_faiss.INSTALL}, and clip-lite index again)"
            )
        if searched.graph(make=False) is None:
            return (
                f"{len(searched.rows):,} rows are compared one by one: this machine has no graph "
                "of them yet; clip-lite index makes it, or --method faiss now"
            )
        return ""

    def search(
        self,
        query: Query | np.ndarray,
        count: int = 10,
        kind: str = "images",
        matrix: Matrix | None = None,
    ) -> list[Hit]:
        """The best rows, best first; of equal ones the first.

        The value of a hit is the critic's T where the query is the projection of one text and rows
        are of pictures, or the other way round; else the cosine.

        Args:
          query: or an array ``[D]``, which is compared by cosine.
          kind: ``images`` or ``texts``.
          matrix: `model.fns.matrix`, which a critic needs whose T is no function of an inner
            product.

        Raises:
          ConfigError: an option is none, or the critic has no such measure.
          DataError: the index has no rows of that kind.
        """
        query = query if isinstance(query, Query) else Query(np.asarray(query, np.float32))
        searched = self._set(kind)
        size = len(searched.rows)
        if not size:
            raise DataError(
                f"{self.folder} holds no {kind}: clip-lite index --what both keeps the captions "
                "of a source, too, and --texts FILE searches lines of text"
            )
        if query.embedding.shape != (self.model.width,):
            raise ConfigError(
                f"a query has {self.model.width} numbers here, not {query.embedding.shape}"
            )
        if count < 1:
            raise ConfigError(f"--count {count}: a search finds at least one")
        count = min(count, size)
        scored = (query.side, kind) in (("text", "images"), ("image", "texts"))
        if not self.model.affine:
            rows, values = self._by_critic(searched, query, count, scored, matrix)
        elif self._by_graph(searched):
            rows, values = index_faiss.search(
                searched.graph(True), unit(query.embedding, np.float32), count
            )
            values = self._scores(values) if scored else values
        elif scored:
            found = searched.embeddings @ np.ascontiguousarray(query.embedding, np.float32)
            rows, values = best(found, count)
            values = self._scores(values)
        else:
            found = searched.embeddings @ unit(query.embedding, np.float32)
            if not searched.unit:
                found /= searched.lengths
            rows, values = best(found, count)
        return [
            self._hit(searched, kind, int(row), float(value))
            for row, value in zip(rows, values, strict=True)
        ]

    def embedding(self, row: int, kind: str = "images") -> np.ndarray:
        """The projection of a row, float32 ``[D]``."""
        return np.asarray(self._set(kind).rows.embeddings[row], np.float32)

    def find(self, id: str, kind: str = "images") -> int | None:
        """The first row of an example, if there is one."""
        row = pc.index(self._set(kind).rows.table["id"], pa.scalar(id, pa.large_string())).as_py()
        return None if row < 0 else row

    def row_of_file(self, path: Path) -> int | None:
        """The row of a picture that is indexed and has not changed since."""
        if self.manifest.root is None:
            return None
        try:
            root, file = Path(self.manifest.root).resolve(), path.resolve()
            name, status = file.relative_to(root).as_posix(), file.stat()
        except (OSError, ValueError):
            return None
        table = self._set("images").rows.table
        row = pc.index(table["path"], pa.scalar(name, pa.large_string())).as_py()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
        return row if row >= 0 and table["stamp"][row].as_py() == stamp else None

    def hit(self, row: int, kind: str = "images", value: float = 0.0) -> Hit:
        """A row as a hit."""
        return self._hit(self._set(kind), kind, row, value)

    def picture(self, hit: Hit) -> bytes | None:
        """The encoded picture of a hit, unless it is no file of its own, or gone.

        Never a file outside the folder of the pictures; and as ``index.json`` names that folder,
        which a stranger may have written, never a file that is not named as a picture and one.
        """
        if hit.path is None or self.manifest.root is None:
            return None
        if hit.path.suffix.lower() not in PICTURES:
            return None
        root = Path(self.manifest.root)
        try:
            file = inside(root, hit.path.relative_to(root).as_posix())
            if file.stat().st_size > MAX_BYTES:
                return None
            data = file.read_bytes()
            check_header(data)
            return data
        except (BadImage, OSError, ValueError):
            return None

    def _set(self, kind: str) -> _Searched:
        if kind not in self._sets:
            raise ConfigError(f"no rows of {kind!r}: choose from {', '.join(self._sets)}")
        return self._sets[kind]

    def _hit(self, searched: _Searched, kind: str, row: int, value: float) -> Hit:
        known = {name: searched.rows.table[name][row].as_py() for name in COLUMNS[kind]}
        path = None
        if known["path"] is not None and self.manifest.root is not None:
            path = Path(self.manifest.root, known["path"])
        return Hit(row, known["id"], value, path, known.get("caption"))

    def _scores(self, products: np.ndarray) -> np.ndarray:
        """Inner products of projections as the critic's T."""
        return np.float32(self.model.scale) * products + np.float32(self.model.bias)

    def _by_graph(self, searched: _Searched) -> bool:
        if self.method == "faiss" and not searched.unit:
            raise ConfigError(
                f"--method faiss ranks by cosine, a {self.model.critic} critic does not: choose "
                "exact"
            )
        if self.method == "auto" and len(searched.rows) >= FAISS_ABOVE and searched.unit:
            return searched.graph(make=False) is not None
        return self.method == "faiss"

    def _by_critic(
        self,
        searched: _Searched,
        query: Query,
        count: int,
        scored: bool,
        matrix: Matrix | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every row scored by the critic itself."""
        if not scored:
            raise ConfigError(
                f"a {self.model.critic} critic compares a text with pictures or a picture with "
                "texts, nothing else: its projections have no cosine that means anything"
            )
        if matrix is None:
            raise ConfigError(f"a {self.model.critic} critic needs its model to score (matrix)")
        one, rows = query.embedding[None], searched.rows.embeddings
        found = []
        for start in range(0, len(rows), _BLOCK):
            some = np.asarray(rows[start : start + _BLOCK], np.float32)
            scores = matrix(some, one) if query.side == "text" else matrix(one, some)
            found.append(np.asarray(scores, np.float32).ravel())
        return best(np.concatenate(found), count)


def best(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the highest of ``[N]`` and these, highest first; of equal ones the first.

    What is not a number comes last.
    """
    values = np.nan_to_num(values, nan=-np.inf)
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > least)
        level = np.flatnonzero(values == least)[: count - len(above)]
        places = np.sort(np.concatenate([above, level]))
    else:
        places = np.arange(len(values))
    order = np.argsort(-values[places], kind="stable")
    return places[order], values[places][order]
