"""The example searches of a report: what a model finds first, and where the right answer is."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clip_lite_jax.data import image_ops
from clip_lite_jax.evaluators.retrieval import Retrieval

ANSWERS = 5
"""Answers shown for a query."""
PICTURE_SIZE = 96
"""Larger pictures are scaled down to this many pixels: a report holds a hundred of them."""
LOSSLESS_BYTES = 5000
CAPTION_LENGTH = 160


@dataclass(frozen=True)
class Item:
    """A picture or a caption of the gallery, as it is shown."""

    caption: str
    picture: str
    """Data URI of the caption's picture."""
    right: bool


@dataclass(frozen=True)
class Query:
    """One search: what was asked, its right answer, and what came first, best first."""

    asked: Item
    rank: int
    """Place of the right answer, 1 is best; ties count against the model."""
    candidates: int
    answers: list[Item]


@dataclass(frozen=True)
class Gallery:
    """Searches in both directions, picked by hash, and the worst ones."""

    name: str
    text_to_image: list[Query]
    image_to_text: list[Query]
    worst_text_to_image: list[Query]
    worst_image_to_text: list[Query]
    licences: list[str]
    """Makers and licences of the gallery's pictures, where the examples name them."""


def build_gallery(
    name: str, retrieval: Retrieval, scores: np.ndarray, queries: int = 8, worst: int = 4
) -> Gallery:
    """Searches to show from scores ``[images, captions]``.

    Queries follow a hash of the example's id, so nobody picked them; those of the two directions
    come from opposite ends of that order, to show different examples where there are enough.
    """
    search = Search(retrieval, scores)
    order = order_by_hash([example.id for example in retrieval.examples])
    return Gallery(
        name,
        [search.by_text(search.first_caption(image)) for image in order[:queries]],
        [search.by_image(image) for image in order[::-1][:queries]],
        [search.by_text(caption) for caption in _misses(search.caption_ranks)[:worst]],
        [search.by_image(image) for image in _misses(search.image_ranks)[:worst]],
        _licences(retrieval),
    )


class Search:
    """Queries against the scores of one gallery."""

    def __init__(self, retrieval: Retrieval, scores: np.ndarray) -> None:
        self.retrieval, self.scores = retrieval, scores
        self.caption_ranks, self.image_ranks = retrieval.ranks(scores)

    def first_caption(self, image: int) -> int:
        return int(np.searchsorted(self.retrieval.owner, image))

    def by_text(self, caption: int) -> Query:
        owner = self.retrieval.owner[caption]
        column = self.scores[:, caption]
        right = np.arange(len(column)) == owner
        return Query(
            self.item(caption, owner, right=True),
            int(self.caption_ranks[caption]),
            len(column),
            [
                self.item(self.first_caption(image), image, bool(right[image]))
                for image in _best(column, right)
            ],
        )

    def by_image(self, image: int) -> Query:
        row = self.scores[image]
        right = self.retrieval.owner == image
        return Query(
            self.item(self.first_caption(image), image, right=True),
            int(self.image_ranks[image]),
            len(row),
            [
                self.item(caption, self.retrieval.owner[caption], bool(right[caption]))
                for caption in _best(row, right)
            ],
        )

    def item(self, caption: int, image: int, right: bool) -> Item:
        text = shorten(self.retrieval.captions[caption], CAPTION_LENGTH)
        picture = image_ops.decode(self.retrieval.examples[image].image)
        return Item(text, picture_uri(picture), right)


def _best(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The best answers ``[<= ANSWERS]``; among equals the wrong ones first, as in the ranks."""
    return np.lexsort((right, -scores))[:ANSWERS]


def _misses(ranks: np.ndarray) -> np.ndarray:
    """The queries whose right answer does not come first, the worst first."""
    order = np.argsort(-ranks, kind="stable")
    return order[ranks[order] > 1]


def order_by_hash(ids: Sequence[str]) -> list[int]:
    """Places in an order that nobody picked and that the data's own does not change."""
    return sorted(range(len(ids)), key=lambda place: _hash(ids[place]))


def _hash(id: str) -> bytes:
    return hashlib.blake2b(id.encode(), digest_size=8, person=b"report").digest()


def picture_uri(picture: Image.Image) -> str:
    """A small WebP data URI."""
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    data = _webp(picture, lossless=True)  # drawings: sharp and small
    if len(data) > LOSSLESS_BYTES:  # photographs
        data = _webp(picture, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def _webp(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def shorten(text: str, length: int) -> str:
    """The text on one line, cut to `length` characters: a stranger's caption may be a book."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _licences(retrieval: Retrieval) -> list[str]:
    named = {
        f"{example.attributes['artist']} ({example.attributes['licence']})"
        for example in retrieval.examples
        if {"artist", "licence"} <= example.attributes.keys()
    }
    return sorted(named)
