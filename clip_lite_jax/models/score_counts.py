"""How many scores of a block reach a limit: all that ranks need of them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def block_counts(
    matrix: Callable[[Any, Any], Array],
    images: Array,
    texts: Array,
    rows: Array,
    owner: Array,
    text_limits: Array,
    image_limits: Array,
) -> tuple[Array, Array, Array]:
    """Of a block of images ``[B, D]`` and texts ``[C, D]``: own scores, and what reaches limits.

    Args:
      matrix: T of all with all, ``[B, D], [C, D] -> [B, C]``.
      rows: int32 ``[B]``, the number of each image; -1 for none.
      owner: int32 ``[C]``, the number of each text's image; -2 for no text.
      text_limits: ``[C]``, a limit for each text.
      image_limits: ``[B, J]``, several for each image; infinite ones count nothing.

    Returns:
      T of each text with its image, 0 where that is not in the block ``[C]``; int32 ``[C]``, images
      of other texts that reach a text's limit; int32 ``[B, J]``, texts of other images that reach
      an image's.
    """
    scores = matrix(images, texts)  # [B, C]
    mine = rows[:, None] == owner[None, :]
    own = jnp.sum(jnp.where(mine, scores, 0), axis=0)
    wrong = ~mine & (rows >= 0)[:, None] & (owner >= 0)[None, :]
    above_text = jnp.sum(wrong & ~(scores < text_limits), axis=0, dtype=jnp.int32)

    def above(limit: Array) -> Array:  # [B] -> [B]
        return jnp.sum(wrong & ~(scores < limit[:, None]), axis=1, dtype=jnp.int32)

    return own, above_text, lax.map(above, image_limits.T).T
