"""What samplers take and return, and what they have in common."""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from clip_lite_jax.objectives import RowScores, Scores


class Critic(Protocol):
    """Scores of embedding pairs, a pytree of its parameters; see `models.critics`."""

    def pairs(self, image: Any, text: Any) -> Array:
        """``[..., D], [..., D] -> [...]``: row i of one with row i of the other; broadcasts."""
        ...

    def matrix(self, image: Any, text: Any) -> Array:
        """``[..., N, D], [..., M, D] -> [..., N, M]``: every row with every row."""
        ...


class EmbeddingCritic(Critic, Protocol):
    """One that can also embed what `Pairs.inputs` holds, for `NegativesConfig.reembed`."""

    def embed_image(self, inputs: Any) -> Any:
        """``[N, ...] -> [N, D]``"""
        ...

    def embed_text(self, inputs: Any) -> Any:
        """``[N, ...] -> [N, D]``"""
        ...


@flax.struct.dataclass
class Memory:
    """Embeddings of earlier steps, by lane: the rows of a lane see those that its lane kept."""

    image: Any  # [lanes, M, D]
    text: Any  # [lanes, M, D]
    group: Array  # [lanes, M, G]
    valid: Array  # [lanes, M] bool; False until a slot was filled
    inputs: Any = None  # as `Pairs.inputs`, [lanes, M, ...]


@flax.struct.dataclass
class Pairs:
    """The embedded global batch; arrays or pytrees of arrays ``[B, ...]``."""

    image: Any  # [B, D]
    text: Any  # [B, D]
    group: Array  # [B, G] int32; two rows that agree in any column are not negatives of each other
    valid: Array  # [B] bool; False marks the slot of an unusable example
    row: Array | None = None  # [B] int32 row in the whole batch, where this is a part of it
    key_image: Any = None  # [B, D] of the momentum encoder, without gradient
    key_text: Any = None  # [B, D]
    memory: Memory | None = None
    inputs: Any = None  # (images, texts) [B, ...] that the embeddings were made of, for `reembed`

    @property
    def rows(self) -> Array:  # [B] int32
        if self.row is None:
            return jnp.arange(self.valid.shape[0], dtype=jnp.int32)
        return self.row


@flax.struct.dataclass
class Drawn:
    """What a sampler returns."""

    scores: Scores | RowScores
    index: Array | None  # [S, B, K] int32 row of each negative, < 0 in memory; None: not held


Sampler = Callable[[Array, Array, Pairs, Critic], Drawn]
"""``(key, step [], pairs, critic) -> Drawn``"""

TEXT, IMAGE = 0, 1
"""Sides: a negative text for each image, or a negative image for each text."""


@flax.struct.dataclass
class Rows:
    """What travels with an embedding."""

    embedding: Any  # [..., N, D]
    group: Array  # [..., N, G]
    valid: Array  # [..., N]
    index: Array  # [..., N] row in the whole batch
    inputs: Any = None  # [..., N, ...] what the embedding was made of


def sides_of(sides: str) -> tuple[int, ...]:
    """The sides that `NegativesConfig.sides` means, in the order of `Scores`."""
    return {"text": (TEXT,), "image": (IMAGE,), "both": (TEXT, IMAGE)}[sides]


def candidates_of(pairs: Pairs, side: int) -> Rows:
    """The rows that can become negatives on this side."""
    embedding = pairs.text if side == TEXT else pairs.image
    inputs = _of_side(pairs.inputs, side)
    return Rows(embedding, pairs.group, pairs.valid, pairs.rows, inputs)


def _of_side(inputs: Any, side: int) -> Any:
    return None if inputs is None else inputs[1 if side == TEXT else 0]


def anchors_of(pairs: Pairs, side: int) -> Rows:
    """The rows that need a negative on this side."""
    return candidates_of(pairs, IMAGE if side == TEXT else TEXT)


def score_matrix(critic: Critic, side: int, anchors: Any, candidates: Any) -> Array:
    """Embeddings ``[..., N, D]`` and ``[..., M, D]`` → ``[..., N, M]``, anchors first."""
    if side == TEXT:
        return critic.matrix(anchors, candidates)
    return jnp.swapaxes(critic.matrix(candidates, anchors), -1, -2)


def score_pairs(critic: Critic, side: int, anchors: Any, candidates: Any) -> Array:
    """Embeddings ``[..., D]`` and ``[..., D]``, broadcast → ``[...]``."""
    return critic.pairs(*((anchors, candidates) if side == TEXT else (candidates, anchors)))


def may_be_negative(anchors: Rows, candidates: Rows) -> Array:
    """Whether candidates are negatives of the anchors; shapes broadcast."""
    same = jnp.any(anchors.group == candidates.group, axis=-1)
    return anchors.valid & candidates.valid & ~same & (anchors.index != candidates.index)


def every_pair(anchors: Rows, candidates: Rows) -> Array:
    """`may_be_negative` of every anchor with every candidate: ``[..., N, M]``."""
    return may_be_negative(
        Rows(
            None,
            anchors.group[..., :, None, :],
            anchors.valid[..., :, None],
            anchors.index[..., :, None],
        ),
        Rows(
            None,
            candidates.group[..., None, :, :],
            candidates.valid[..., None, :],
            candidates.index[..., None, :],
        ),
    )


def remembered_of(pairs: Pairs, side: int) -> Rows:
    """The rows in memory that can become negatives on this side: ``[lanes, M, ...]``.

    Raises:
      ValueError: the pairs carry no memory.
    """
    memory = pairs.memory
    if memory is None:
        raise ValueError("this sampler needs Pairs.memory; see negatives.memory.init_memory")
    # Below zero, so that no row of the batch is taken for one of the memory.
    index = -1 - jnp.arange(memory.valid.shape[1], dtype=jnp.int32)
    return Rows(
        memory.text if side == TEXT else memory.image,
        memory.group,
        memory.valid,
        jnp.broadcast_to(index, memory.valid.shape),
        _of_side(memory.inputs, side),
    )


def drawn_scores(pairs: Pairs, critic: Critic, sides: str, drawn: list[Rows]) -> Drawn:
    """Scores of the pairs and of the negatives ``[B, K, ...]`` drawn on each side."""
    negative, valid = [], []
    for side, rows in zip(sides_of(sides), drawn, strict=True):
        anchors = expand(anchors_of(pairs, side))
        negative.append(score_pairs(critic, side, anchors.embedding, rows.embedding))
        valid.append(may_be_negative(anchors, rows))
    stacked = jnp.stack(negative)  # [S, B, K]
    scores = Scores(
        positive=critic.pairs(pairs.image, pairs.text),
        negative=stacked,
        valid=jnp.stack(valid),
        log_weight=jnp.zeros_like(stacked),
        positive_valid=pairs.valid,
    )
    return Drawn(scores, jnp.stack([rows.index for rows in drawn]))


def expand(rows: Rows) -> Rows:
    """``[B, ...] -> [B, 1, ...]``"""

    return jax.tree.map(lambda x: x[:, None], rows)
