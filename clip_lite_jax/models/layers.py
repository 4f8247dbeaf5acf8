"""What transformers for images and for text are built of."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.gathering import SCANNED, gathered_layer

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    # OpenAI's CLIP models were trained with this one; another gives other features.
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}

Remat = Literal["none", "full", "dots"]
"""What the backward pass computes again: nothing, all within a block, or all but products."""


class Embed(nn.Embed):
    """`nn.Embed` that takes rows in the type of the parameters, and gradients of rows with it.

    In bfloat16 a token that is common in a batch would lose what most of its places add.
    """

    def __call__(self, inputs: ArrayLike) -> Array:  # [...] -> [..., features]
        return jnp.take(self.embedding, inputs, axis=0).astype(self.dtype)


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    causal: bool = False,
    bias: Array | None = None,
) -> Array:
    """Softmax attention: ``[B, L, heads, D / heads]`` three times, mask to ``[B, heads, L, L]``.

    `bias`, of the shape of the mask, is added to the scaled products; with `causal` no position
    sees a later one.  CPUs run `_explicit_attention` a third faster than what
    `jax.nn.dot_product_attention` makes of it, which takes the softmax of float64 in float32, too.
    """
    explicit = partial(_explicit_attention, causal=causal)
    if q.dtype == jnp.float64:
        return explicit(q, k, v, mask, bias)

    def fused(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
        return jax.nn.dot_product_attention(q, k, v, bias, mask, is_causal=causal)

    return lax.platform_dependent(q, k, v, mask, bias, cpu=explicit, default=fused)


def _explicit_attention(
    q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None, causal: bool
) -> Array:
    """Heads first: products of matrices that lie in one piece; the softmax in float32 or more."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, heads, L, D / heads]
    precise = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.matmul(q, jnp.swapaxes(k, 2, 3), preferred_element_type=precise)
    logits = logits / jnp.sqrt(q.shape[-1]).astype(precise)
    if bias is not None:
        logits = logits + bias
    lowest = jnp.finfo(precise).min
    if mask is not None:
        logits = jnp.where(mask, logits, lowest)
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, lowest)
    return jnp.swapaxes(jnp.matmul(jax.nn.softmax(logits).astype(v.dtype), v), 1, 2)


class Block(nn.Module):
    """Pre-norm self-attention and perceptron, each with a residual connection.

    Source: ViT (arXiv 2010.11929), eq. 2 and 3; the perceptron is four times as wide as the rest
    unless `mlp_width` says otherwise.
    """

    heads: int
    mlp_width: int | None = None
    activation: Activation = "gelu"
    causal: bool = False
    dropout: float = 0.0
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, train: bool = False) -> Array:
        """``[B, L, D] -> [B, L, D]``; where `mask` ``[B, L]`` is False no position looks.

        Raises:
          ConfigError: the width does not divide into the heads.
        """
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.LayerNorm, epsilon=self.epsilon, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = x.shape[-1]
        if width % self.heads:
            raise ConfigError(
                f"width={width} does not divide into heads={self.heads}: change one of them in "
                "model.image.options or model.text.options"
            )
        # One product for queries, keys and values: how most projects store them, and faster.
        qkv = nn.Dense(3 * width, name="qkv", **types)(norm(name="norm1")(x))
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        q, k, v = jnp.moveaxis(qkv, -3, 0)  # [B, L, heads, D / heads] each
        h = attention(q, k, v, None if mask is None else mask[:, None, None, :], self.causal)
        h = nn.Dense(width, name="out", **types)(h.reshape(x.shape))
        x = x + drop(h)
        h = nn.Dense(self.mlp_width or 4 * width, name="fc1", **types)(norm(name="norm2")(x))
        h = nn.Dense(width, name="fc2", **types)(ACTIVATIONS[self.activation](h))
        return x + drop(h)


def apply_blocks(
    block: Callable[..., nn.Module],
    layers: int,
    x: Array,
    mask: Array | None = None,
    train: bool = False,
    scan: bool = False,
    remat: Remat = "none",
    bias: Array | None = None,
    before_last: Callable[[Array], Array] | None = None,
) -> Array:
    """``[B, L, D] -> [B, L, D]`` through `layers` blocks, submodules of the module that calls this.

    They are ``blocks_0``, ``blocks_1``, ...  With `scan` they are one block, ``blocks``, whose
    parameters have a leading axis of layers: it compiles in the time of one layer.

    Args:
      block: makes one, given its name: ``partial(Block, heads=12, dtype=...)``.
      bias: of attention, the same for all; handed to blocks that take one.
      before_last: of what enters the last block; with `scan` there is no such place.
    """

    def run(block: nn.Module, x: Array) -> Array:
        return block(x, mask, train) if bias is None else block(x, mask, train, bias)

    if scan:
        run = _gathering(run)
    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        # Within a scan nothing can be merged across the steps, so nothing need prevent it.
        run = nn.remat(run, prevent_cse=not scan, policy=policy if remat == "dots" else None)
    if not scan:
        for number in range(layers):
            if before_last is not None and number == layers - 1:
                x = before_last(x)
            x = run(block(name=f"blocks_{number}"), x)
        return x
    if layers == 0:
        return x
    scanned = nn.scan(
        lambda block, x, _: (run(block, x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=layers,
    )
    return scanned(block(name=SCANNED), x, None)[0]


def _gathering(run: Callable[..., Array]) -> Callable[..., Array]:
    """`run` with the parameters of its layer whole, where they lie in pieces."""
    mapped = nn.map_variables(run, "params", trans_in_fn=gathered_layer)

    def either(block: nn.Module, x: Array) -> Array:
        return run(block, x) if block.is_initializing() else mapped(block, x)

    return either


def mark_places(module: nn.Module, x: Array) -> Array:
    """Marks the last ``[B, h, w, C]`` of an encoder that knows of places, for `heat_maps`.

    It is `x`, and nothing is computed or kept, unless the collection ``intermediates`` is asked
    for, or ``perturbations`` holds something to add.  (`Module.perturb` would add a collection to
    every model, and raises in the text encoder of one that has it.)
    """
    module.sow("intermediates", PLACES, x)
    if not module.has_variable("perturbations", PLACES):
        return x
    added: Array = module.get_variable("perturbations", PLACES)
    return x + added


def places_wanted(module: nn.Module) -> bool:
    """Whether anybody asks for what `mark_places` marks."""
    return module.is_mutable_collection("intermediates") or module.has_variable(
        "perturbations", PLACES
    )


PLACES = "places"
"""The name of what `mark_places` marks."""


def masked_mean(x: Array, mask: Array) -> Array:
    """``[B, L, D]`` and ``[B, L]`` → ``[B, D]``, the mean over real tokens."""
    weight = mask[..., None].astype(x.dtype)
    # An empty caption has no tokens: its features are zero, not a division by zero.
    return jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
