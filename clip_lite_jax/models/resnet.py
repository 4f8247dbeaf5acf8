"""Residual networks: torchvision's, and those that CLIP modified."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jax import Array
from jax.typing import DTypeLike

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.convolution import Conv, max_pool
from clip_lite_jax.models.layers import attention, mark_places
from clip_lite_jax.models.normalization import BatchNorm, Statistics


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (arXiv 1512.03385, figure 5, left)."""

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    zero_init: bool
    expansion = 1

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Array | None) -> Array:  # [B, H, W, C]
        conv, norm, pad = self.conv, self.norm, ((1, 1), (1, 1))
        strides = (self.stride, self.stride)
        h = conv(self.width, (3, 3), strides, pad, name="conv1")(x)
        h = nn.relu(norm(name="bn1")(h, train, valid))
        h = conv(self.width, (3, 3), padding=pad, name="conv2")(h)
        h = norm(scale_init=_last(self.zero_init), name="bn2")(h, train, valid)
        if x.shape != h.shape:
            x = conv(self.width, (1, 1), strides, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(x, train, valid)
        return nn.relu(x + h)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride (torchvision's version 1.5).

    Source: arXiv 1512.03385, figure 5, right.
    """

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    zero_init: bool
    expansion = 4

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Array | None) -> Array:  # [B, H, W, C]
        conv, norm, out = self.conv, self.norm, self.expansion * self.width
        strides = (self.stride, self.stride)
        h = nn.relu(norm(name="bn1")(conv(self.width, (1, 1), name="conv1")(x), train, valid))
        h = conv(self.width, (3, 3), strides, ((1, 1), (1, 1)), name="conv2")(h)
        h = nn.relu(norm(name="bn2")(h, train, valid))
        h = conv(out, (1, 1), name="conv3")(h)
        h = norm(scale_init=_last(self.zero_init), name="bn3")(h, train, valid)
        if x.shape != h.shape:
            x = conv(out, (1, 1), strides, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(x, train, valid)
        return nn.relu(x + h)


class ClipBottleneck(nn.Module):
    """A bottleneck that averages before it strides, so that nothing is aliased.

    Source: CLIP (arXiv 2103.00020), section 2.4; github.com/openai/CLIP, model.py.
    """

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    zero_init: bool
    expansion = 4

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Array | None) -> Array:  # [B, H, W, C]
        conv, norm, out = self.conv, self.norm, self.expansion * self.width
        h = nn.relu(norm(name="bn1")(conv(self.width, (1, 1), name="conv1")(x), train, valid))
        h = conv(self.width, (3, 3), padding=((1, 1), (1, 1)), name="conv2")(h)
        h = nn.relu(norm(name="bn2")(h, train, valid))
        h = conv(out, (1, 1), name="conv3")(_average(h, self.stride))
        h = norm(scale_init=_last(self.zero_init), name="bn3")(h, train, valid)
        if x.shape != h.shape:
            x = conv(out, (1, 1), name="downsample_conv")(_average(x, self.stride))
            x = norm(name="downsample_bn")(x, train, valid)
        return nn.relu(x + h)


BLOCKS: dict[str, Callable[..., nn.Module]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """torchvision's residual network, without the classifier (arXiv 1512.03385)."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    batch_norm: Statistics = "global"
    batch_groups: int = 1
    zero_init_residual: bool = False
    """Starts every block as the identity, which helps large batches (arXiv 1706.02677, 5.1)."""
    remat: bool = False
    """Keeps only the inputs of the blocks for the backward pass and computes the rest again."""
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, valid: Array | None = None) -> Array:
        """``[B, H, W, 3]`` normalised images → ``[B, 8 * width * expansion]`` features.

        Images where `valid` ``[B]`` is False stay out of the statistics of the batch.
        """
        conv, norm = _parts(self)
        x = conv(self.width, (7, 7), (2, 2), ((3, 3), (3, 3)), name="conv1")(images)
        x = nn.relu(norm(name="bn1")(x, train, valid))
        x = max_pool(x)
        x = _stages(self, BLOCKS[self.block], x, train, valid)
        return jnp.mean(mark_places(self, x), axis=(1, 2))


class ClipResNet(nn.Module):
    """CLIP's residual network: three convolutions at the stem, average and attention pooling.

    Its features are CLIP's image embedding before it is scaled to unit length.
    Source: CLIP (arXiv 2103.00020), section 2.4; github.com/openai/CLIP, model.py.
    """

    layers: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32
    head_width: int = 1024
    batch_norm: Statistics = "global"
    batch_groups: int = 1
    zero_init_residual: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, valid: Array | None = None) -> Array:
        """``[B, H, W, 3]`` normalised images → ``[B, head_width]`` features.

        Raises:
          ConfigError: images that do not divide into cells of 32 pixels.
        """
        if images.shape[1] % 32 or images.shape[2] % 32:
            raise ConfigError(
                f"data.image_size={images.shape[1]}: this encoder takes multiples of 32 pixels"
            )
        conv, norm = _parts(self)
        x, pad = images, ((1, 1), (1, 1))
        stem = ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1))
        for number, (width, stride) in enumerate(stem, 1):
            x = conv(width, (3, 3), (stride, stride), pad, name=f"conv{number}")(x)
            x = nn.relu(norm(name=f"bn{number}")(x, train, valid))
        x = _stages(self, ClipBottleneck, _average(x, 2), train, valid)
        x = mark_places(self, x)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return AttentionPool(self.heads, self.head_width, name="attnpool", **types)(x)


class AttentionPool(nn.Module):
    """One head-wise attention of the mean cell to all cells and itself, then a projection."""

    heads: int
    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, H, W, C] -> [B, features]
        batch, height, width, channels = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        x = x.reshape(batch, height * width, channels)
        x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)
        init = nn.initializers.normal(channels**-0.5)
        position = self.param("position", init, x.shape[1:], self.param_dtype)
        x = x + position.astype(self.dtype)
        split = (batch, -1, self.heads, channels // self.heads)
        q = dense(channels, name="q")(x[:, :1]).reshape(split)
        k = dense(channels, name="k")(x).reshape(split)
        v = dense(channels, name="v")(x).reshape(split)
        return dense(self.features, name="out")(attention(q, k, v).reshape(batch, channels))


def _parts(net: ResNet | ClipResNet) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    types: dict[str, Any] = {"dtype": net.dtype, "param_dtype": net.param_dtype}
    norm = partial(BatchNorm, statistics=net.batch_norm, groups=net.batch_groups, **types)
    return partial(Conv, **types), norm


def _stages(
    net: ResNet | ClipResNet,
    block: Callable[..., nn.Module],
    x: Array,
    train: bool,
    valid: Array | None,
) -> Array:
    """Four stages of blocks, submodules ``layer1_0``, ``layer1_1``, ... of `net`, which calls."""
    conv, norm = _parts(net)

    def run(module: nn.Module, x: Array) -> Array:
        return module(x, train, valid)

    if net.remat:
        run = nn.remat(run)
    for stage, depth in enumerate(net.layers):
        for number in range(depth):
            stride = 2 if stage > 0 and number == 0 else 1
            module = block(
                net.width * 2**stage,
                stride,
                conv,
                norm,
                net.zero_init_residual,
                name=f"layer{stage + 1}_{number}",
            )
            x = run(module, x)
    return x


def _average(x: Array, size: int) -> Array:
    return x if size == 1 else nn.avg_pool(x, (size, size), (size, size))


def _last(zero_init: bool) -> Initializer:
    """Of the scale of a block's last normalisation."""
    return nn.initializers.zeros if zero_init else nn.initializers.ones
