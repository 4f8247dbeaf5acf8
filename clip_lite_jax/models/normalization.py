"""Batch normalisation whose statistics are of the batch, of parts of it, or fixed."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jax import Array, lax
from jax.typing import DTypeLike

from clip_lite_jax.errors import ConfigError

Statistics = Literal["global", "grouped", "frozen"]


class BatchNorm(nn.Module):
    """Normalises every channel by the mean and variance of a batch (arXiv 1502.03167).

    ``global``: of all valid examples, over all devices.  ``grouped``: of each of `groups` equal
    parts of the batch, in order; with as many groups as devices no statistic crosses between them
    in the forward pass, which saves an all-reduce per layer.  ``frozen``: the running ones, also
    in training.  Running statistics are updated as PyTorch does, with the unbiased variance, so
    that weights and statistics can be exchanged.
    """

    statistics: Statistics = "global"
    groups: int = 1
    momentum: float = 0.1
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False, valid: Array | None = None) -> Array:
        """``[B, ..., C] -> [B, ..., C]``; examples where `valid` ``[B]`` is False do not count.

        Raises:
          ConfigError: the batch does not divide into the groups.
        """
        shape, kind = (x.shape[-1],), self.param_dtype
        scale = self.param("scale", self.scale_init, shape, kind)
        bias = self.param("bias", nn.initializers.zeros, shape, kind)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kind)
        var = self.variable("batch_stats", "var", jnp.ones, shape, kind)
        if not train or self.statistics == "frozen":
            factor = scale * lax.rsqrt(var.value + self.epsilon)
            shift = bias - mean.value * factor
            # Not in bfloat16: a large mean would leave few digits of the difference.
            return (x * factor + shift).astype(self.dtype)
        groups = self.groups if self.statistics == "grouped" else 1
        if x.shape[0] % groups:
            raise ConfigError(
                f"a batch of {x.shape[0]} does not divide into {groups} groups of batch "
                "statistics: change batch_size or the option batch_groups of model.image"
            )
        parts = x.reshape(groups, x.shape[0] // groups, -1, x.shape[-1])  # [G, B / G, pixels, C]
        weight = None if valid is None else valid.reshape(*parts.shape[:2], 1, 1).astype(kind)
        # All about the running mean: of numbers far from 0, squares and products with a factor
        # would leave few digits.
        centre = lax.stop_gradient(mean.value)
        centred = parts.astype(kind) - centre
        offset, batch_var, count = _moments(centred, weight)  # [G, C] twice, [G]
        factor = scale * lax.rsqrt(batch_var + self.epsilon)
        shift = bias - offset * factor
        y = (centred * factor[:, None, None] + shift[:, None, None]).astype(self.dtype)
        if not self.is_initializing():
            unbiased = batch_var * (count / jnp.maximum(count - 1, 1))[:, None]
            momentum = jnp.where(jnp.any(count > 0), self.momentum, 0)
            share = (count / jnp.maximum(jnp.sum(count), 1))[:, None]
            for running, new in ((mean, offset + centre), (var, unbiased)):
                step = momentum * (jnp.sum(new * share, axis=0) - running.value)
                running.value = running.value + step
        return y.reshape(x.shape)


def _moments(x: Array, weight: Array | None) -> tuple[Array, Array, Array]:
    """Mean and biased variance ``[G, C]`` of ``[G, B, P, C]``, and how many values made them.

    Of no values they are 0 and 1, so that nothing grows from layer to layer.
    """
    if weight is None:
        weight = jnp.ones((*x.shape[:2], 1, 1), x.dtype)
    count = jnp.sum(weight, axis=(1, 2, 3)) * x.shape[2]  # [G]
    divisor = jnp.maximum(count, 1)[:, None]
    mean = jnp.sum(x * weight, axis=(1, 2)) / divisor
    # Two sums that need nothing of each other: x is read once, and devices exchange once.
    square = jnp.sum(x * x * weight, axis=(1, 2)) / divisor
    var = jnp.maximum(square - mean * mean, 0)
    return mean, jnp.where(count[:, None] > 0, var, 1), count
