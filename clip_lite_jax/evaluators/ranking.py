"""Ranks of the right answers in galleries of any size, without the scores of all with all.

Scores come in blocks.  A block is compared with the score that each caption has with its own image,
and what is kept are counts: as many numbers as there are captions.  Ties count against the model,
and so does a score that is no number.
"""

from dataclasses import dataclass

import numpy as np
from jax import Array

from clip_lite_jax.train_step import EncodeFns

BLOCK = 4096
"""Images, and captions, of a block: 64 MiB of scores in float32."""


@dataclass(frozen=True)
class Counts:
    """How many wrong answers score at least as a caption does with its own image."""

    images: np.ndarray
    """int64 ``[M]``: images that are not the caption's."""
    captions: np.ndarray
    """int64 ``[M]``: captions of other images, each scored with this caption's image."""


def count(
    fns: EncodeFns, images: np.ndarray, texts: np.ndarray, owner: np.ndarray, block: int = BLOCK
) -> Counts:
    """Counts over embeddings of images ``[N, D]`` and texts ``[M, D]``; text c is of owner[c].

    `owner` is in ascending order, and every image has a text.  Memory grows with N + M alone; time
    with N · M.  Images are split over the devices.
    """
    pieces = _Pieces(images, texts, owner, block)
    own = np.zeros(len(texts), np.float32)
    for i, j in pieces.own_blocks():
        found, _, _ = pieces.counts(fns, i, j)
        own[pieces.texts_of(j)] += np.asarray(found)[: pieces.size_of(j)]
    # The same program that found the own scores compares others with them: equal embeddings tie.
    pieces.set_limits(own)
    reached = Counts(np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64))
    for i in range(pieces.image_blocks):
        of_images = np.zeros(pieces.image_limits.shape[1:], np.int64)
        for j in range(pieces.text_blocks):
            _, above_text, above_image = pieces.counts(fns, i, j)
            reached.images[pieces.texts_of(j)] += np.asarray(above_text)[: pieces.size_of(j)]
            of_images += np.asarray(above_image)
        chosen = pieces.captions_of(i)
        reached.captions[chosen] = of_images[owner[chosen] - i * pieces.rows, pieces.place[chosen]]
    return reached


def dense_counts(scores: np.ndarray, owner: np.ndarray) -> Counts:
    """`count` of scores ``[N, M]`` that are all there."""
    own = scores[owner, np.arange(len(owner))]
    wrong = owner[None, :] != np.arange(len(scores))[:, None]  # [N, M]
    images = np.sum(wrong & ~(scores < own), axis=0)
    first = np.searchsorted(owner, np.arange(len(scores)))
    place = np.arange(len(owner)) - first[owner]
    captions = np.zeros(len(owner), np.int64)
    for n in range(int(place.max(initial=-1)) + 1):  # the n-th caption of every image that has one
        chosen = np.flatnonzero(place == n)
        rows = owner[chosen]
        captions[chosen] = np.sum(wrong[rows] & ~(scores[rows] < own[chosen, None]), axis=1)
    return Counts(images, captions)


def ranks(counts: Counts, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the right answers, 1 is best: text → image ``[M]``, image → best of its texts ``[N]``."""
    firsts = np.flatnonzero(np.diff(owner, prepend=-1))
    return 1 + counts.images, 1 + np.minimum.reduceat(counts.captions, firsts)


def average_precision(counts: Counts, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each query, ``[M]`` and ``[N]``: the mean of k / rank over its right answers k = 1, 2, …

    Source: Manning, Raghavan and Schütze (2008), section 8.4; all answers are ranked.
    """
    order = np.lexsort((counts.captions, owner))  # the best caption of an image comes first
    firsts = np.flatnonzero(np.diff(owner, prepend=-1))
    sizes = np.diff(firsts, append=len(owner))
    number = 1 + np.arange(len(owner)) - np.repeat(firsts, sizes)
    precision = number / (number + counts.captions[order])
    return 1 / (1 + counts.images), np.add.reduceat(precision, firsts) / sizes


class _Pieces:
    """Embeddings in blocks of one size, the last ones padded."""

    def __init__(self, images: np.ndarray, texts: np.ndarray, owner: np.ndarray, block: int):
        # A small gallery is not padded to a large block, and all blocks have one shape.
        self.rows, self.columns = (min(block, _even(len(x))) for x in (images, texts))
        self.image_blocks = -(-len(images) // self.rows)
        self.text_blocks = -(-len(texts) // self.columns)
        self.images, self.texts, self.owner = images, texts, owner
        first = np.searchsorted(owner, np.arange(len(images)))
        self.place = np.arange(len(owner)) - first[owner]
        """Which of its image's captions each one is."""
        most = int(self.place.max(initial=0)) + 1
        self.text_limits = np.full(len(texts), np.inf, np.float32)
        self.image_limits = np.full((self.image_blocks, self.rows, most), np.inf, np.float32)

    def own_blocks(self) -> list[tuple[int, int]]:
        """Blocks that hold a caption together with its image."""
        columns = np.arange(len(self.owner)) // self.columns
        pairs = np.unique(np.stack([self.owner // self.rows, columns], axis=1), axis=0)
        return [(int(i), int(j)) for i, j in pairs]

    def set_limits(self, own: np.ndarray) -> None:
        self.text_limits = own
        flat = self.image_limits.reshape(-1, self.image_limits.shape[-1])
        flat[self.owner, self.place] = own

    def texts_of(self, j: int) -> slice:
        return slice(j * self.columns, j * self.columns + self.size_of(j))

    def size_of(self, j: int) -> int:
        return min(self.columns, len(self.texts) - j * self.columns)

    def captions_of(self, i: int) -> slice:
        """The captions of a block's images."""
        ends = np.searchsorted(self.owner, [i * self.rows, (i + 1) * self.rows])
        return slice(int(ends[0]), int(ends[1]))

    def counts(self, fns: EncodeFns, i: int, j: int) -> tuple[Array, Array, Array]:
        start = i * self.rows
        count = min(self.rows, len(self.images) - start)
        rows = np.arange(start, start + self.rows)
        return fns.counts(
            _padded(self.images[start : start + count], self.rows, 0),
            _padded(self.texts[self.texts_of(j)], self.columns, 0),
            np.where(np.arange(self.rows) < count, rows, -1).astype(np.int32),
            _padded(self.owner[self.texts_of(j)].astype(np.int32), self.columns, -2),
            _padded(self.text_limits[self.texts_of(j)], self.columns, np.inf),
            self.image_limits[i],
        )


def _even(count: int) -> int:
    """The power of two at or above `count`, and at least 8: no edge of a block is special."""
    return max(8, 1 << (count - 1).bit_length())


def _padded(array: np.ndarray, size: int, value: float) -> np.ndarray:
    missing = [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, missing, constant_values=value)
