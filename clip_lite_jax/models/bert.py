"""BERT, and MPNet, which is BERT with a bias on relative positions."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.layers import (
    ACTIVATIONS,
    Activation,
    Embed,
    Remat,
    apply_blocks,
    attention,
    masked_mean,
)


class PostNormBlock(nn.Module):
    """Self-attention and perceptron, each normalised after its residual connection.

    Source: Transformer (arXiv 1706.03762), section 3.1, as BERT (arXiv 1810.04805) has it.
    """

    heads: int
    mlp_width: int
    activation: Activation
    dropout: float
    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, mask: Array, train: bool, bias: Array | None = None) -> Array:
        """``[B, L, D] -> [B, L, D]``; mask ``[B, L]``; bias of attention ``[1, heads, L, L]``."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.LayerNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = x.shape[-1]
        if width % self.heads:
            raise ConfigError(
                f"model.text.options: width={width} does not divide into heads={self.heads}"
            )
        shape = (*x.shape[:-1], self.heads, width // self.heads)
        q, k, v = (
            nn.Dense(width, name=name, **types)(x).reshape(shape)
            for name in ("query", "key", "value")
        )
        h = attention(q, k, v, mask[:, None, None, :], bias=bias)
        h = nn.Dense(width, name="out", **types)(h.reshape(x.shape))
        x = norm(name="norm1")(x + drop(h))
        h = ACTIVATIONS[self.activation](nn.Dense(self.mlp_width, name="fc1", **types)(x))
        h = nn.Dense(width, name="fc2", **types)(h)
        return norm(name="norm2")(x + drop(h))


class Bert(nn.Module):
    """Word, position and type embeddings, post-norm blocks, and one vector of the result.

    ``pooler``: tanh of a layer over the first token; ``cls``: the first token; ``mean``: of the
    real tokens.  With `relative_buckets` it is MPNet (arXiv 2004.09297), whose position 0 is at
    `first_position` and which has no types of token.

    Source: BERT (arXiv 1810.04805), section 3.
    """

    vocab_size: int
    max_tokens: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    positions: int = 512
    first_position: int = 0
    type_vocab: int = 2
    relative_buckets: int = 0
    activation: Activation = "gelu"
    pooling: Literal["pooler", "cls", "mean"] = "pooler"
    dropout: float = 0.1
    epsilon: float = 1e-12
    remat: Remat = "none"
    scan: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        """``[B, L]`` int32 tokens and their bool mask → ``[B, width]`` features.

        Raises:
          ConfigError: more tokens than there are positions.
        """
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length, room = tokens.shape[1], self.positions - self.first_position
        if length > room:
            raise ConfigError(
                f"data.max_tokens={length} is more than the {room} positions of model.text"
            )
        init = nn.initializers.normal(0.02)
        embed = partial(Embed, features=self.width, embedding_init=init, **types)
        where = jnp.arange(length) + self.first_position
        x = embed(num_embeddings=self.vocab_size, name="words")(tokens)
        x = x + embed(num_embeddings=self.positions, name="places")(where)
        if self.type_vocab:
            x = x + embed(num_embeddings=self.type_vocab, name="types")(jnp.zeros((), jnp.int32))
        x = nn.LayerNorm(self.epsilon, name="norm", **types)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        bias = None
        if self.relative_buckets:
            buckets = relative_buckets(length, self.relative_buckets)
            table = Embed(
                self.relative_buckets, self.heads, embedding_init=init, name="relative", **types
            )
            bias = jnp.moveaxis(table(buckets), -1, 0)[None]  # [1, heads, L, L]
        block = partial(
            PostNormBlock,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            dropout=self.dropout,
            epsilon=self.epsilon,
            **types,
        )
        x = apply_blocks(block, self.layers, x, mask, train, self.scan, self.remat, bias)
        if self.pooling == "mean":
            return masked_mean(x, mask)
        first = x[:, 0]
        return (
            nn.tanh(nn.Dense(self.width, name="pooler", **types)(first))
            if self.pooling == "pooler"
            else first
        )


def relative_buckets(length: int, buckets: int, farthest: int = 128) -> np.ndarray:
    """The bucket of every pair of positions ``[L, L]``, row query and column key.

    Half of the buckets are for keys after the query; of each half, one half holds one distance each
    and the other grows logarithmically up to `farthest`.  Source: T5 (arXiv 1910.10683), 2.1.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # In float32, as PyTorch counts: a distance on a boundary must fall to the same side.
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    scaled = scaled / np.float32(np.log(farthest / exact)) * (half - exact)
    far = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)
