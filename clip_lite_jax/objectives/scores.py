"""`Scores`: what an objective sees of a step."""

from dataclasses import replace

import flax.struct
import jax.numpy as jnp
from jax import Array


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

    @property
    def pair_valid(self) -> Array:  # [B]
        if self.positive_valid is None:
            return jnp.ones(self.positive.shape, bool)
        return self.positive_valid

    def masked(self) -> "Scores":
        """Zero where masked: what a broken example produced reaches neither value nor gradient."""
        return replace(
            self,
            positive=jnp.where(self.pair_valid, self.positive, 0.0),
            negative=jnp.where(self.valid, self.negative, 0.0),
            log_weight=jnp.where(self.valid, self.log_weight, 0.0),
        )


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of `values` where `mask`: global sum over global count; 0 where nothing is left."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
