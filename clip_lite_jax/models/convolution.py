"""Convolutions and pooling, formulated so that every backend runs them well.

XLA's CPU backend has slow paths, which these go round, and one of them its CUDA backend has, too;
else they are XLA's own operations.
What it gains: docs/benchmarks.md.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
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
    that they are, depthwise ones five to forty times slower than sums of products, and for the
    gradient of a kernel convolves images with images, up to twice as slow as matrix products.
    """
    pads = padding
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)

    general = partial(_general, strides, pads, groups)
    if kernel.shape[:2] == (1, 1) and groups == 1:
        return lax.platform_dependent(
            x, kernel, cpu=partial(_pointwise, strides, pads), default=general
        )
    if kernel.shape[2] == 1 and kernel.shape[3] == groups == x.shape[-1]:
        return lax.platform_dependent(
            x, kernel, cpu=partial(_depthwise, strides, pads), default=general
        )
    if groups == 1:
        return _dense(strides, tuple(map(tuple, pads)), x, kernel)
    return general(x, kernel)


def max_pool(x: Array) -> Array:
    """``[B, H, W, C]`` → ``[B, ⌈H / 2⌉, ⌈W / 2⌉, C]``: maxima of 3 × 3, every other pixel, padded.

    For its gradient XLA's CPU backend needs six times longer than the formula here, its CUDA
    backend twice as long.
    """
    if x.shape[1] % 2 or x.shape[2] % 2:
        return _pooled(x)
    return _max_pool(x)


def _general(strides: tuple[int, int], pads: Any, groups: int, x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _pointwise(strides: tuple[int, int], pads: Any, x: Array, kernel: Array) -> Array:
    """In two dimensions; of four, XLA would transpose the image for the kernel's gradient."""
    x = _padded(x, pads)[:, :: strides[0], :: strides[1]]
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0]).reshape(*x.shape[:-1], -1)


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(strides: tuple[int, int], pads: Any, x: Array, kernel: Array) -> Array:
    return _general(strides, pads, 1, x, kernel)


def _dense_forward(
    strides: tuple[int, int], pads: Any, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _dense(strides, pads, x, kernel), (x, kernel)


def _dense_backward(
    strides: tuple[int, int], pads: Any, kept: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = kept

    def general(x: Array, g: Array) -> Array:
        return jax.vjp(lambda k: _general(strides, pads, 1, x, k), kernel)[1](g)[0]

    (dx,) = jax.vjp(lambda x: _general(strides, pads, 1, x, kernel), x)[1](g)
    if strides == (1, 1):
        products = partial(_kernel_gradient, pads, kernel.shape)
    else:
        products = partial(_strided_kernel_gradient, strides, pads, kernel.shape)
    return dx, lax.platform_dependent(x, g, cpu=products, default=general)


_dense.defvjp(_dense_forward, _dense_backward)


def _kernel_gradient(pads: Any, shape: tuple[int, ...], x: Array, g: Array) -> Array:
    """One matrix product for each column of the kernel: its rows are copies of g moved down."""
    h, w, channels, features = shape
    x = _padded(x, pads)
    moved = [jnp.pad(g, ((0, 0), (i, h - 1 - i), (0, 0), (0, 0))) for i in range(h)]
    rows = jnp.concatenate(moved, axis=-1).reshape(-1, h * features)
    columns = [x[:, :, j : j + g.shape[2]].reshape(-1, channels) for j in range(w)]
    gradient = jnp.stack([jnp.dot(column.T, rows) for column in columns])
    return gradient.reshape(w, channels, h, features).transpose(2, 0, 1, 3)


def _strided_kernel_gradient(
    strides: tuple[int, int], pads: Any, shape: tuple[int, ...], x: Array, g: Array
) -> Array:
    """One matrix product for each row of the kernel: all its columns see a strip of the image."""
    (h, w, channels, features), (down, right) = shape, strides
    x, last_row, last_column = _padded(x, pads), down * (g.shape[1] - 1), right * (g.shape[2] - 1)
    columns = [x[:, :, j : j + last_column + 1 : right] for j in range(w)]
    strips = jnp.concatenate(columns, axis=-1)  # [B, H, W', w * channels]
    rows = [strips[:, i : i + last_row + 1 : down] for i in range(h)]
    g = g.reshape(-1, features)
    return jnp.stack([jnp.dot(row.reshape(-1, w * channels).T, g) for row in rows]).reshape(shape)


def _pooled(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


_max_pool = jax.custom_vjp(_pooled)


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = _pooled(x)
    return y, (x, y)


def _max_pool_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array]:
    x, y = kept

    def general(x: Array, _: Array, g: Array) -> Array:
        return jax.vjp(_pooled, x)[1](g)[0]

    ours = _max_pool_gradient
    return (lax.platform_dependent(x, y, g, cpu=ours, cuda=ours, default=general),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _max_pool_gradient(x: Array, y: Array, g: Array) -> Array:
    """The gradient goes to the first maximum of each window, as XLA and PyTorch have it.

    An even pixel lies in one window, in its middle; an odd one is the end of a window and the start
    of the next: no scattering is needed.
    """
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = jnp.pad(x, padding, constant_values=-jnp.inf)
    down, right = (size // 2 * 2 - 1 for size in x.shape[1:3])
    part = {}
    taken = jnp.zeros(y.shape, bool)
    for i in range(3):
        for j in range(3):
            hit = (padded[:, i : i + down : 2, j : j + right : 2] == y) & ~taken
            taken |= hit
            part[i, j] = jnp.where(hit, g, 0)

    def next_row(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]

    def next_column(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, 1:]

    even = [part[1, 1], part[1, 2] + next_column(part[1, 0])]
    corner = part[2, 2] + next_row(part[0, 2]) + next_column(part[2, 0] + next_row(part[0, 0]))
    odd = [part[2, 1] + next_row(part[0, 1]), corner]
    rows = [jnp.stack(columns, axis=3) for columns in (even, odd)]
    return jnp.stack(rows, axis=2).reshape(x.shape)
