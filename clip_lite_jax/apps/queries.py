"""What is looked for, as one embedding: sums of texts and pictures, and concepts taken out of them.

All of it is arithmetic of embeddings of unit length, so that no part counts for more because its
projection is longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from clip_lite_jax.apps.identity import NOT_AFFINE
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.vectors import unit

_PADDED = 8
"""Texts are padded to a multiple of so many tokens: one program for most queries."""
NOTHING_LEFT = 1e-3
"""Of a query of length 1: what is shorter after concepts went out of it is rounding."""


@dataclass(frozen=True)
class Query:
    """An embedding to search with."""

    embedding: np.ndarray
    """float32 ``[D]``: the critic's projection of one text or picture, or of length 1."""
    side: str = "mixed"
    """``text`` or ``image``: the projection of one; ``mixed``: arithmetic, compared by cosine."""


@dataclass(frozen=True)
class Part:
    """A text or a picture, with what it counts for."""

    text: str = ""
    image: Path | None = None
    weight: float = 1.0


class Encoder(Protocol):
    """Makes queries of texts and pictures."""

    @property
    def critic(self) -> str:
        """The name of the model's critic."""
        ...

    def text(self, text: str) -> Query: ...

    def image(self, image: Path) -> Query:
        """Raises `DataError` where the picture cannot be read."""
        ...


@dataclass(frozen=True)
class ModelEncoder:
    """An `Encoder`: one text or picture at a time, whatever the batches of the model are."""

    model: DualEncoderModel

    @property
    def critic(self) -> str:
        return self.model.config.model.critic.name

    def text(self, text: str) -> Query:
        tokens, mask = self.model.tokenizer([text])
        # Most queries are short: without the padding of training they are encoded sooner.
        longest = min(-(-int(mask.sum()) // _PADDED) * _PADDED, tokens.shape[1]) or 1
        rows = self.model.fns.text(tokens[:, :longest], mask[:, :longest])
        return Query(np.asarray(rows[0], np.float32), "text")

    def image(self, image: Path) -> Query:
        try:
            pixels = self.model.pixels.view(Opened(image.read_bytes()))
        except (BadImage, OSError) as error:
            raise DataError(f"--image {image}: {error}") from error
        return Query(np.asarray(self.model.fns.image(pixels[None])[0], np.float32), "image")


def query(encoder: Encoder, parts: Sequence[Part], without: Sequence[str] = ()) -> Query:
    """The query of some parts, less some concepts.

    One part is the critic's projection of it; several are the sum of their unit embeddings, each
    times its weight.  `without` takes the directions of texts out of that, see `removed`.

    Raises:
      ConfigError: there is no part, nothing is left, or the critic's projections are no directions.
    """
    if not parts:
        raise ConfigError("a search needs a query: a text, or --image FILE")
    check_sums(encoder.critic, [part.weight for part in parts], len(without))
    each = [
        encoder.text(part.text) if part.image is None else encoder.image(part.image)
        for part in parts
    ]
    concepts = [encoder.text(text).embedding for text in without]
    return mixed(encoder.critic, each, [part.weight for part in parts], concepts)


def check_sums(critic: str, weights: Sequence[float], concepts: int) -> None:
    """Raises `ConfigError` where a query would need arithmetic that the critic does not know."""
    if not _single(weights, concepts) and critic in NOT_AFFINE:
        raise ConfigError(
            f"sums and removals are arithmetic of directions, which the projections of a "
            f"{critic} critic are not: give one text or one picture"
        )


def mixed(
    critic: str, each: Sequence[Query], weights: Sequence[float], concepts: Sequence[np.ndarray]
) -> Query:
    """The query of parts that are encoded, at least one; `concepts` are taken out of it.

    Raises:
      ConfigError: as `query`.
    """
    check_sums(critic, weights, len(concepts))
    if _single(weights, len(concepts)):
        return each[0]
    embedding = combined([one.embedding for one in each], weights)
    return Query(removed(embedding, concepts) if concepts else embedding)


def _single(weights: Sequence[float], concepts: int) -> bool:
    return len(weights) == 1 and weights[0] > 0 and not concepts


def combined(embeddings: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """``Σ weight · embedding / |embedding|``, scaled to length 1: float32 ``[D]``.

    Raises:
      ConfigError: the parts cancel each other.
    """
    rows = [unit(embedding, np.float32) for embedding in embeddings]
    total = np.sum([w * row for w, row in zip(weights, rows, strict=True)], axis=0)
    return _unit_or_nothing(total, "the parts of the query cancel each other")


def removed(embedding: np.ndarray, concepts: Sequence[np.ndarray]) -> np.ndarray:
    """The part of an embedding that is at a right angle to all concepts, scaled to length 1.

    ``q - B Bᵀ q`` for an orthonormal basis B of the concepts' span.  An inner product with it is
    the same whether pictures keep their part along the concepts or not, so that pictures, too, are
    ranked as though it had been taken out of them (and they had not been scaled again).
    Source: Bolukbasi et al. (arXiv 1607.06520), section 5, "neutralize".

    Raises:
      ConfigError: nothing is left.
    """
    q = unit(embedding, np.float32).astype(np.float64)
    left, sizes, _ = np.linalg.svd(
        np.stack([unit(concept, np.float32) for concept in concepts], axis=1).astype(np.float64),
        full_matrices=False,
    )
    basis = left[:, sizes > NOTHING_LEFT]  # of concepts that say the same, one direction
    return _unit_or_nothing(q - basis @ (basis.T @ q), "--without leaves nothing of the query")


def _unit_or_nothing(embedding: np.ndarray, message: str) -> np.ndarray:
    if np.linalg.norm(embedding) < NOTHING_LEFT:
        raise ConfigError(message)
    return unit(embedding, np.float32)
