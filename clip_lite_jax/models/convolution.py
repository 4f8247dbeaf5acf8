"""Convolutions, formulated so that every backend runs them well."""

from collections.abc import Sequence
from functools import partial
from typing import Any

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
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = convolve(x, kernel, self.strides, self.padding, self.groups)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y


def convolve(
    x: Array,
    kernel: Array,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "VALID",
    groups: int = 1,
) -> Array:
    """``[B, H, W, C]`` and ``[h, w, C / groups, out]`` → ``[B, H', W', out]``.

    XLA's CPU backend runs convolutions of one pixel three times slower than the matrix products
    that they are, and depthwise ones five to forty times slower than sums of products.
    """
    pads = padding
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)

    def general(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    if kernel.shape[:2] == (1, 1) and groups == 1:
        return lax.platform_dependent(
            x, kernel, cpu=partial(_pointwise, strides, pads), default=general
        )
    if kernel.shape[2] == 1 and kernel.shape[3] == groups == x.shape[-1]:
        return lax.platform_dependent(
            x, kernel, cpu=partial(_depthwise, strides, pads), default=general
        )
    return general(x, kernel)


def _pointwise(strides: tuple[int, int], pads: Any, x: Array, kernel: Array) -> Array:
    return jnp.dot(_padded(x, pads)[:, :: strides[0], :: strides[1]], kernel[0, 0])


def _depthwise(strides: tuple[int, int], pads: Any, x: Array, kernel: Array) -> Array:
    """A sum over the kernel's places of the shifted image times one number for each channel."""
    x = _padded(x, pads)
    (h, w), (down, right) = kernel.shape[:2], strides
    last_row, last_column = x.shape[1] - h, x.shape[2] - w
    terms = [
        x[:, i : i + last_row + 1 : down, j : j + last_column + 1 : right] * kernel[i, j, 0]
        for i in range(h)
        for j in range(w)
    ]
    return sum(terms[1:], terms[0])


def _padded(x: Array, pads: Any) -> Array:
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))
