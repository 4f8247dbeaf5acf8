"""EfficientNet-Lite: inverted bottlenecks without squeeze-and-excitation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from clip_lite_jax.models.convolution import Conv
from clip_lite_jax.models.layers import mark_places
from clip_lite_jax.models.normalization import BatchNorm, Statistics

# Of each stage: blocks, kernel, stride of the first block, expansion, channels.
# Source: arXiv 1905.11946, table 1.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


class InvertedBottleneck(nn.Module):
    """Wide 1x1, depthwise and narrow 1x1 convolution (arXiv 1801.04381), linear at the end."""

    features: int
    kernel: int
    stride: int
    expansion: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Array | None) -> Array:  # [B, H, W, C]
        conv, norm, h = self.conv, self.norm, x
        wide = self.expansion * x.shape[-1]
        if self.expansion > 1:
            h = conv(wide, (1, 1), name="expand_conv")(h)
            h = nn.relu6(norm(name="bn0")(h, train, valid))
        size, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        h = conv(wide, size, strides, "SAME", groups=wide, name="depthwise_conv")(h)
        h = nn.relu6(norm(name="bn1")(h, train, valid))
        h = norm(name="bn2")(conv(self.features, (1, 1), name="project_conv")(h), train, valid)
        return x + h if x.shape == h.shape else h


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, without the classifier: small, and fast on a CPU.

    Source: EfficientNet (arXiv 1905.11946); Lite replaces swish by ReLU6 and leaves
    squeeze-and-excitation out (github.com/tensorflow/tpu, models/official/efficientnet/lite).
    """

    batch_norm: Statistics = "global"
    batch_groups: int = 1
    remat: bool = False
    """Keeps only the inputs of the blocks for the backward pass and computes the rest again."""
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, valid: Array | None = None) -> Array:
        """``[B, H, W, 3]`` normalised images → ``[B, 1280]`` features.

        Images where `valid` ``[B]`` is False stay out of the statistics of the batch.
        """
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm: Callable[..., nn.Module] = partial(
            BatchNorm, self.batch_norm, self.batch_groups, momentum=0.01, epsilon=1e-3, **types
        )
        conv: Callable[..., nn.Module] = partial(Conv, **types)

        def run(module: nn.Module, x: Array) -> Array:
            return module(x, train, valid)

        if self.remat:
            run = nn.remat(run)
        x = conv(STEM, (3, 3), (2, 2), "SAME", name="conv_stem")(images)
        x = nn.relu6(norm(name="bn0")(x, train, valid))
        number = 0
        for depth, kernel, stride, expansion, features in STAGES:
            for index in range(depth):
                module = InvertedBottleneck(
                    features,
                    kernel,
                    stride if index == 0 else 1,
                    expansion,
                    conv,
                    norm,
                    name=f"blocks_{number}",
                )
                x = run(module, x)
                number += 1
        x = conv(HEAD, (1, 1), name="conv_head")(x)
        x = nn.relu6(norm(name="bn1")(x, train, valid))
        return jnp.mean(mark_places(self, x), axis=(1, 2))
