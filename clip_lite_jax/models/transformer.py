"""Text transformers: a plain one to train from scratch, and the causal one of CLIP."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.layers import Activation, Block, Embed, Remat, apply_blocks, masked_mean


class Transformer(nn.Module):
    """Token and position embeddings, pre-norm blocks, a mean over the real tokens."""

    vocab_size: int
    max_tokens: int
    width: int = 192
    layers: int = 2
    heads: int = 4
    activation: Activation = "gelu_tanh"
    dropout: float = 0.1
    remat: Remat = "none"
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        """``[B, L]`` int32 tokens and their bool mask → ``[B, width]`` features."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.02)
        x = Embed(self.vocab_size, self.width, embedding_init=init, **types)(tokens)
        position = self.param("position", init, (self.max_tokens, self.width), self.param_dtype)
        x = x + position[: tokens.shape[1]].astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = partial(
            Block, self.heads, activation=self.activation, dropout=self.dropout, **types
        )
        x = apply_blocks(block, self.layers, x, mask, train, self.scan, self.remat)
        return masked_mean(nn.LayerNorm(**types)(x), mask)


class ClipText(nn.Module):
    """The text transformer of CLIP: causal, read at the last token, which ends the text.

    OpenAI's models have `activation` "quick_gelu", those of open_clip mostly "gelu".
    Source: CLIP (arXiv 2103.00020), section 2.4.
    """

    vocab_size: int
    max_tokens: int
    width: int = 512
    layers: int = 12
    heads: int = 8
    positions: int = 77
    head_width: int | None = 512
    """Width of the projection after the last token, None for none."""
    activation: Activation = "quick_gelu"
    dropout: float = 0.0
    epsilon: float = 1e-5
    remat: Remat = "none"
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        """``[B, L]`` int32 tokens and their bool mask → ``[B, head_width or width]`` features.

        Raises:
          ConfigError: more tokens than there are positions.
        """
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length = tokens.shape[1]
        if length > self.positions:
            raise ConfigError(
                f"data.max_tokens={length} is more than model.text.options.positions="
                f"{self.positions}"
            )
        embed = nn.initializers.normal(0.02)
        x = Embed(self.vocab_size, self.width, embedding_init=embed, name="words", **types)(tokens)
        start = nn.initializers.normal(0.01)
        position = self.param("position", start, (self.positions, self.width), self.param_dtype)
        x = x + position[:length].astype(self.dtype)
        block = partial(
            Block,
            self.heads,
            activation=self.activation,
            causal=True,
            dropout=self.dropout,
            epsilon=self.epsilon,
            **types,
        )
        # Padding stands after the text, where a causal transformer does not look.
        x = apply_blocks(block, self.layers, x, None, train, self.scan, self.remat)
        last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)  # [B]
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        x = nn.LayerNorm(self.epsilon, name="norm", **types)(x)
        if self.head_width is None:
            return x
        return nn.Dense(self.head_width, use_bias=False, name="projection", **types)(x)
