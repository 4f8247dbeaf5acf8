"""A plain text transformer, trained from scratch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Softmax attention: ``[B, L, heads, D / heads]`` three times, mask to ``[B, heads, L, L]``.

    Fused on GPU, except for float64, whose softmax `jax.nn.dot_product_attention` takes in float32.
    """
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(q.dtype).min))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Block(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual connection."""

    heads: int
    dropout: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, mask: Array, train: bool) -> Array:  # [B, L, D], [B, L]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        h = nn.LayerNorm(**types)(x)
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), **types)(h)
        q, k, v = jnp.moveaxis(qkv, -3, 0)  # [B, L, heads, D / heads] each
        h = attention(q, k, v, mask[:, None, None, :])
        h = nn.DenseGeneral(width, axis=(-2, -1), **types)(h)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.LayerNorm(**types)(x)
        h = nn.gelu(nn.Dense(4 * width, **types)(h))
        h = nn.Dense(width, **types)(h)
        return x + nn.Dropout(self.dropout, deterministic=not train)(h)


class Transformer(nn.Module):
    """Token and position embeddings, pre-norm blocks, a mean over the real tokens."""

    vocab_size: int
    max_tokens: int
    width: int = 192
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        """``[B, L]`` int32 tokens and their bool mask → ``[B, width]`` features."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, **types)(tokens)
        position = self.param("position", init, (self.max_tokens, self.width), self.param_dtype)
        x = x + position[: tokens.shape[1]].astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for _ in range(self.layers):
            x = Block(self.heads, self.dropout, **types)(x, mask, train)
        x = nn.LayerNorm(**types)(x)
        weight = mask[..., None].astype(x.dtype)
        # An empty caption has no tokens: its features are zero, not a division by zero.
        return jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
