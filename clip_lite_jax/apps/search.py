"""Text → image search over a folder of pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_lite_jax.data import image_ops
from clip_lite_jax.data.folders import PICTURES
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.inference import DualEncoderModel


@dataclass(frozen=True)
class Hits:
    """The best files for a query, best first, and the files that could not be read."""

    files: list[tuple[Path, float]]  # with their critic score T, in nats
    unreadable: list[tuple[Path, str]]


def search(model: DualEncoderModel, folder: Path, query: str, count: int) -> Hits:
    """The `count` pictures under `folder` that the critic scores highest with the query.

    Raises:
      DataError: no readable picture.
    """
    paths, embeddings, unreadable = embed_folder(model, folder)
    if not paths:
        raise DataError(f"no readable picture in {folder} ({len(unreadable)} unreadable)")
    scores = np.asarray(model.fns.matrix(embeddings, model.project_text([query])))[:, 0]
    best = np.argsort(-scores, kind="stable")[:count]
    return Hits([(paths[i], float(scores[i])) for i in best], unreadable)


def embed_folder(
    model: DualEncoderModel, folder: Path
) -> tuple[list[Path], np.ndarray, list[tuple[Path, str]]]:
    """Readable pictures, their projections ``[N, D]``, and unreadable ones with reasons."""
    paths, parts, unreadable = [], [], []
    for batch in _batches(sorted(find_pictures(folder)), model.batch_size):
        pictures = []
        for path in batch:
            try:
                pictures.append(image_ops.decode(path.read_bytes()))
                paths.append(path)
            except (BadImage, OSError) as error:
                unreadable.append((path, str(error)))
        if pictures:
            parts.append(model.project_image(pictures))
    return paths, np.concatenate(parts) if parts else np.zeros((0, 0), np.float32), unreadable


def find_pictures(folder: Path) -> Iterator[Path]:
    """Picture files under `folder`, recursively; links are not followed out of it.

    Raises:
      DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"--images {folder}: no such folder")
    root = folder.resolve()
    for path in folder.rglob("*"):
        inside = path.resolve().is_relative_to(root)
        if path.suffix.lower() in PICTURES and inside and path.is_file():
            yield path


def _batches(items: list[Path], size: int) -> Iterator[list[Path]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
