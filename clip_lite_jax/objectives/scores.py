"""`Scores`: what an objective sees of a step, whole or already summed up for each pair."""

from dataclasses import replace

import flax.struct
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class Totals:
    """Counts of a whole batch, of which the scores at hand are a part (gradient accumulation).

    Means are then sums over the part divided by these, so that the losses of the parts add up to
    the loss of the batch.
    """

    pairs: Array  # [] valid pairs
    negatives: Array  # [] valid negatives over all sides, each counted `stands_for` times
    parts: int = flax.struct.field(pytree_node=False, default=1)  # equal parts of the batch


@flax.struct.dataclass
class Scores:
    """Critic scores of a global batch of B pairs and the negatives drawn for them.

    S counts the sides: on the text side row i of `negative` holds T(image_i, text_j), on the image
    side T(image_j, text_i).
    """

    positive: Array  # [B] T(image_i, text_i)
    negative: Array  # [S, B, K] K negatives per pair and side
    valid: Array  # [S, B, K] bool; False: not a negative (same group, broken example)
    log_weight: Array  # [S, B, K] log importance weight; 0 is a plain average
    positive_valid: Array | None = None  # [B] bool; None: every pair counts
    stands_for: Array | None = None  # [S, B] negatives that each drawn one represents; None: 1
    totals: Totals | None = None  # None: these scores are the whole batch
    log_normalizer: Array | None = None  # [] running log E_Q[exp T] of earlier steps, for `dv`

    @property
    def pair_valid(self) -> Array:  # [B]
        if self.positive_valid is None:
            return jnp.ones(self.positive.shape, bool)
        return self.positive_valid

    @property
    def multiplicity(self) -> Array:  # [S, B, 1]
        if self.stands_for is None:
            return jnp.ones((*self.negative.shape[:2], 1), self.negative.dtype)
        return self.stands_for[..., None]

    def masked(self) -> "Scores":
        """Zero where masked: a broken example's scores, if finite, reach no value or gradient."""
        return replace(
            self,
            positive=jnp.where(self.pair_valid, self.positive, 0.0),
            negative=jnp.where(self.valid, self.negative, 0.0),
            log_weight=jnp.where(self.valid, self.log_weight, 0.0),
        )


@flax.struct.dataclass
class Sums:
    """What is left of the negatives of each pair: ``[..., B]`` each."""

    reduced: Array  # sum of the bound's negative term, or log of the sum of its exp
    count: Array  # negatives
    score_sum: Array  # sum of their scores; this and what follows only for the log
    rejected: Array  # how many have T < 0
    outranked: Array  # how many have T < T of the pair


@flax.struct.dataclass
class RowScores:
    """Scores of which only sums over the negatives of each pair are left.

    `bounds.reduce_rows` makes them of `Scores`; a streaming sampler makes them of embeddings and
    never holds the scores themselves.
    """

    positive: Array  # [B]
    sums: Sums  # [S, B]
    share_valid: Array  # [] share of the slots for negatives that hold one
    pair_valid: Array  # [B] bool
    totals: Totals | None = None
    bound: str = flax.struct.field(pytree_node=False, default="")  # that `sums.reduced` belongs to

    def pair_mean(self, values: Array) -> Array:
        """Mean over valid pairs, and over the sides, of values ``[..., B]``; 0 without any."""
        sides = values.size // values.shape[-1]
        count = jnp.sum(self.pair_valid) if self.totals is None else self.totals.pairs
        total = jnp.sum(jnp.where(self.pair_valid, values, 0.0))
        return total / (sides * jnp.maximum(count, 1))

    def negative_mean(self, sums: Array) -> Array:
        """Mean over valid negatives, from their sums for each pair ``[S, B]``; 0 without any."""
        count = jnp.sum(self.sums.count) if self.totals is None else self.totals.negatives
        return jnp.sum(sums) / jnp.maximum(count, 1)
