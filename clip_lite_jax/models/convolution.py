"""Convolutions, formulated so that every backend runs them well."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jax import Array, lax
from jax.typing import DTypeLike

# Zero-mean normal of variance 2 / (k² · out): He et al. (arXiv 1502.01852), as torchvision has it.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A 2-D convolution of ``[B, H, W, C]``; parameters ``kernel`` ``[h, w, C / groups, out]``."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "VALID"
    groups: int = 1
    use_bias: bool = False
    kernel_init: Initializer = he_normal_fan_out
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y
