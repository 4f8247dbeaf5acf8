"""FAISS for large indexes: a graph of near neighbours, kept in the user's cache.

The graph never comes with an index: FAISS does not promise to survive a file that was made to harm
it, and indexes come from strangers.  It is made from the embeddings on the machine that searches.
Source: HNSW, Malkov and Yashunin (arXiv 1603.09320); FAISS, Douze et al. (arXiv 2401.08281).
"""

import contextlib
import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.files import cache_folder, replacing

log = logging.getLogger(__name__)

INSTALL = "pip install 'clip_lite_jax[faiss]'"
LINKS = 32
"""Neighbours of a row in the graph (M); the lowest layer has twice as many."""
BUILD, SEARCH = 80, 512
"""Candidates that are kept while the graph is made, and while it is searched (ef)."""


def available() -> bool:
    return importlib.util.find_spec("faiss") is not None


def _faiss() -> Any:
    """An extra: large, and needed by large indexes alone."""
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells of each processor it is not for
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"FAISS is not installed: {INSTALL}") from error
    return faiss


def graph_file(matrix: Path) -> Path:
    """Where the graph of a matrix of embeddings is kept, whether it is there or not."""
    status = matrix.stat()
    known = f"{matrix.name} {status.st_size} {status.st_mtime_ns} {LINKS} {BUILD}"
    kind = matrix.name.partition("-")[0]
    names = (_short(f"{matrix.parent.resolve()} {kind}"), _short(known))
    return cache_folder() / "faiss" / f"{'-'.join(names)}.hnsw"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build(rows: np.ndarray) -> Any:
    """The graph of rows ``[N, D]`` of length 1, whose inner product is their cosine.

    Raises:
      ConfigError: FAISS is not installed.
    """
    faiss = _faiss()
    graph = faiss.IndexHNSWFlat(rows.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = BUILD
    graph.add(np.ascontiguousarray(rows, np.float32))
    return graph


def write(graph: Any, file: Path) -> None:
    """Keeps a graph in the cache; where that cannot be, a line says so."""
    faiss = _faiss()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(file) as temporary:
            faiss.write_index(graph, str(temporary))
        of_index = file.name.partition("-")[0]
        for other in file.parent.glob(f"{of_index}-*.hnsw"):  # of the rows that it had before
            if other != file:
                other.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # the second is what FAISS raises
        log.warning("%s cannot be kept, and will be made again: %s", file, error)


def read(file: Path, shape: tuple[int, ...]) -> Any:
    """The graph in a file, or None where there is none of rows of this shape ``(N, D)``.

    A damaged one is deleted.
    """
    faiss = _faiss()
    try:
        if not file.exists():
            return None
        graph = faiss.read_index(str(file))
        if (graph.ntotal, graph.d) == shape and isinstance(graph, faiss.IndexHNSWFlat):
            return graph
        error: object = f"{graph.ntotal} rows of {graph.d} numbers, not {shape}"
    # RuntimeError, MemoryError, and whatever else damage leads to.
    except Exception as raised:
        error = raised
    log.warning("%s cannot be used (%s)", file, error)
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
    return None


def search(graph: Any, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the highest inner products with a query ``[D]``, and these; best first."""
    parameters = _faiss().SearchParametersHNSW(efSearch=max(SEARCH, 2 * count))
    values, rows = graph.search(np.asarray(query, np.float32)[None], count, params=parameters)
    found = rows[0] >= 0  # fewer than asked for are -1
    return rows[0][found], values[0][found]
