"""The mean of word vectors: no order, no context, a strong baseline for short captions."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from clip_lite_jax.models.layers import Embed, masked_mean


class WordVectors(nn.Module):
    """Embeddings averaged over the real tokens; `data.glove` reads published ones."""

    vocab_size: int
    max_tokens: int
    width: int = 300
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        """``[B, L]`` int32 tokens and their bool mask → ``[B, width]`` features."""
        del train
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.1)
        x = Embed(self.vocab_size, self.width, embedding_init=init, name="words", **types)
        return masked_mean(x(tokens), mask)
