"""Vision transformers."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.convolution import Conv
from clip_lite_jax.models.layers import (
    ACTIVATIONS,
    Activation,
    Block,
    Remat,
    apply_blocks,
    attention,
    mark_places,
    places_wanted,
)

_INIT = nn.initializers.normal(0.02)


class ViT(nn.Module):
    """Patches, pre-norm blocks, and one vector of them all (arXiv 2010.11929)."""

    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int | None = None
    """Of the perceptrons; None is four times `width`."""
    activation: Activation = "gelu"
    class_token: bool = True
    pooling: Literal["class", "mean", "attention"] = "class"
    """The class token, the mean of the patches, or a learned query's attention to the patches."""
    pre_norm: bool = False
    """CLIP's: patches are embedded without a bias and normalised before the first block."""
    head_width: int | None = None
    """Width of a last projection without bias, as CLIP has it; None leaves it out."""
    patch_dropout: float = 0.0
    """Part of the patches that training leaves out, others for every image (arXiv 2212.00794)."""
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-6
    scan: bool = False
    remat: Remat = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False, valid: Array | None = None) -> Array:
        """``[B, H, W, 3]`` normalised images → ``[B, width]``, or ``[B, head_width]``, features.

        `valid` is there for encoders with statistics of a batch, and not used.

        Raises:
          ConfigError: images that do not divide into patches; class pooling without class token.
        """
        if any(side % self.patch for side in images.shape[1:3]):
            raise ConfigError(
                f"data.image_size={images.shape[1]} does not divide into patches of {self.patch} "
                "pixels: change it, or patch in model.image.options"
            )
        if self.pooling == "class" and not self.class_token:
            raise ConfigError(
                "model.image.options: pooling='class' needs class_token=True; without it choose "
                "'mean' or 'attention'"
            )
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.LayerNorm, epsilon=self.layer_norm_epsilon, **types)
        x = self._embed(images, train)
        if self.pre_norm:
            x = norm(name="norm_pre")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        common: dict[str, Any] = {
            "activation": self.activation,
            "epsilon": self.layer_norm_epsilon,
            **types,
        }
        block = partial(Block, self.heads, self.mlp_width, dropout=self.dropout, **common)
        grid = (images.shape[1] // self.patch, images.shape[2] // self.patch)
        x = apply_blocks(
            block,
            self.layers,
            x,
            None,
            train,
            self.scan,
            self.remat,
            before_last=partial(self._marked, grid=grid),
        )
        # Before the norm, which is of each token: those that nothing reads need none.
        x = x[:, 0] if self.pooling == "class" else x[:, int(self.class_token) :]
        x = norm(name="norm")(x)
        if self.pooling == "mean":
            x = jnp.mean(x, axis=1)
        elif self.pooling == "attention":
            x = AttentionPool(self.heads, self.mlp_width, name="pool", **common)(x)
        if self.head_width is not None:
            x = nn.Dense(self.head_width, use_bias=False, name="proj", **types)(x)
        return x

    def _marked(self, x: Array, grid: tuple[int, int]) -> Array:
        """``[B, L, D]`` as it is, its patches marked as a map ``[B, h, w, D]``.

        They enter the last block: what the class token gathers there still depends on places.
        """
        if not places_wanted(self):
            return x
        batch, _, width = x.shape
        before = int(self.class_token)
        marked = mark_places(self, x[:, before:].reshape(batch, *grid, width))
        return jnp.concatenate([x[:, :before], marked.reshape(batch, -1, width)], axis=1)

    def _embed(self, images: Array, train: bool) -> Array:
        """``[B, H, W, 3]`` → ``[B, L, width]`` with positions; of the patches left in training."""
        size = (self.patch, self.patch)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patches = Conv(
            self.width,
            size,
            size,
            use_bias=not self.pre_norm,
            kernel_init=nn.initializers.lecun_normal(),
            name="patches",
            **types,
        )
        x = patches(images).reshape(images.shape[0], -1, self.width)
        shape = (x.shape[1] + self.class_token, self.width)
        position = self.param("position", _INIT, shape, self.param_dtype).astype(self.dtype)
        x = x + position[int(self.class_token) :]
        if train and self.patch_dropout > 0:
            x = drop_patches(x, self.patch_dropout, self.make_rng("dropout"))
        if self.class_token:
            token = self.param(
                "class_token", nn.initializers.zeros, (self.width,), self.param_dtype
            )
            first = jnp.broadcast_to(
                token.astype(self.dtype) + position[0], (x.shape[0], 1, self.width)
            )
            x = jnp.concatenate([first, x], axis=1)
        return x


class AttentionPool(nn.Module):
    """Attention of one learned query to the tokens, then a perceptron with a residual connection.

    Source: Set transformer (arXiv 1810.00825), section 3.2, as in Zhai et al. (arXiv 2106.04560).
    """

    heads: int
    mlp_width: int | None = None
    activation: Activation = "gelu"
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, L, D] -> [B, D]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, length, width = x.shape
        query = self.param("query", _INIT, (width,), self.param_dtype).astype(self.dtype)
        q = nn.Dense(width, name="q", **types)(query)
        q = jnp.broadcast_to(
            q.reshape(1, 1, self.heads, -1), (batch, 1, self.heads, width // self.heads)
        )
        kv = nn.Dense(2 * width, name="kv", **types)(x)
        k, v = jnp.moveaxis(kv.reshape(batch, length, 2, self.heads, -1), 2, 0)
        x = nn.Dense(width, name="out", **types)(attention(q, k, v).reshape(batch, width))
        h = nn.LayerNorm(epsilon=self.epsilon, name="norm", **types)(x)
        h = nn.Dense(self.mlp_width or 4 * width, name="fc1", **types)(h)
        return x + nn.Dense(width, name="fc2", **types)(ACTIVATIONS[self.activation](h))


def drop_patches(x: Array, rate: float, key: Array) -> Array:
    """``[B, P, D] -> [B, Q, D]``: of each example a random part of its patches, one at least.

    Q is ``(1 - rate) P`` rounded.  Source: FLIP (arXiv 2212.00794), section 3.
    """
    keep = max(1, round(x.shape[1] * (1 - rate)))
    order = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)[:, :keep]
    return jnp.take_along_axis(x, order[..., None], axis=1)
