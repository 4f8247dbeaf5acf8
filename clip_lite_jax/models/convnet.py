"""A small residual convolutional encoder, made for 64-pixel images and for XLA on a CPU."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.layers import mark_places


class ResidualBlock(nn.Module):
    """``x + conv3x3(gelu(conv3x3(norm(x))))``; the last convolution starts at zero."""

    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, H, W, C]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        h = nn.LayerNorm(**types)(x)
        h = nn.Conv(width, (3, 3), **types)(h)
        h = nn.gelu(h)
        h = nn.Conv(width, (3, 3), kernel_init=nn.initializers.zeros, **types)(h)
        return x + h


class ConvNet(nn.Module):
    """Patchify, then stages of residual blocks, halving the resolution, then a mean over pixels.

    Dense 3x3 convolutions and non-overlapping patches: XLA's CPU backend runs both near the speed
    of its matrix products, which it does not for depthwise or strided overlapping ones.
    """

    widths: Sequence[int] = (64, 128, 256)
    depths: Sequence[int] = (1, 1, 1)
    patch: int = 4
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, valid: Array | None = None) -> Array:
        """``[B, H, W, 3]`` normalised images → ``[B, widths[-1]]`` features.

        Raises:
          ConfigError: as many widths as depths are needed, and images of a pixel at the last stage.
        """
        del valid  # no statistics of the batch
        if len(self.widths) != len(self.depths):
            raise ConfigError(
                f"model.image.options: {len(self.widths)} widths {tuple(self.widths)} need as many "
                f"depths, not {tuple(self.depths)}"
            )
        smallest = self.patch * 2 ** (len(self.widths) - 1)
        if min(images.shape[1:3]) < smallest:
            raise ConfigError(
                f"data.image_size={min(images.shape[1:3])} leaves no pixel for {len(self.widths)} "
                f"stages: use {smallest} or more, or fewer widths in model.image.options"
            )
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = images
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            size = self.patch if stage == 0 else 2
            if stage:
                x = nn.LayerNorm(**types)(x)
            x = nn.Conv(width, (size, size), (size, size), padding="VALID", **types)(x)
            for _ in range(depth):
                x = ResidualBlock(**types)(x)
        x = nn.LayerNorm(**types)(jnp.mean(mark_places(self, x), axis=(1, 2)))
        return nn.Dropout(self.dropout, deterministic=not train)(x)
