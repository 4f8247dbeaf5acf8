"""Critics T(image, text): learned scores of how much likelier a pair is than chance.

A critic projects the features of each encoder to embeddings once per example; scores of pairs are
functions of embeddings alone, so that negatives cost no second pass through an encoder.  All have
``project_image``, ``project_text``, ``pairs``, ``matrix`` and ``watched``.  Only `DotCritic` has
embeddings of unit length, whose cosine ranks as the score does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from clip_lite_jax.models.normalization import BatchNorm


class ProjectionBlock(nn.Module):
    """``LayerNorm(mlp(x) + shortcut(x))``: the residual projection of CLIP-Lite.

    The published block normalises the hidden layer by batch statistics (``norm="batch"``) and
    starts the shortcut as a noisy identity.  Source: github.com/4m4n5/CLIP-Lite, loss.py, after
    Deep InfoMax (arXiv 1808.06670), appendix A.
    """

    width: int
    hidden: int
    norm: Literal["layer", "batch"]
    noisy_identity: bool
    identity: bool
    scale_features: bool
    dropout: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Array | None) -> Array:  # [B, F] -> [B, width]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.scale_features:
            x = nn.RMSNorm(use_scale=False, **types)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        h = nn.Dense(self.hidden, use_bias=self.norm == "layer", **types)(x)
        if self.norm == "batch":
            h = BatchNorm(name="BatchNorm_0", **types)(h, train, valid)
        else:
            h = nn.LayerNorm(**types)(h)
        last: dict[str, Any] = {"kernel_init": nn.initializers.zeros} if self.identity else {}
        h = nn.Dense(self.width, **last, **types)(nn.relu(h))
        first: dict[str, Any] = {}
        if self.identity or self.noisy_identity:
            first["kernel_init"] = _identity if self.identity else _noisy_identity
        shortcut = nn.Dense(self.width, use_bias=False, **first, **types)(x)
        return nn.LayerNorm(**types)(h + shortcut)


def _identity(_: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    return jnp.eye(shape[0], shape[1], dtype=dtype)


def _noisy_identity(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    noise = jax.random.uniform(key, shape, dtype, -0.01, 0.01)
    return jnp.where(jnp.eye(shape[0], shape[1], dtype=bool), 1.0, noise)


class PriorDiscriminator(nn.Module):
    """Logit that features were drawn uniformly from [0, 1] rather than made by an encoder.

    Source: Deep InfoMax (arXiv 1808.06670), section 3.3; sizes as in CLIP-Lite's loss.py.
    """

    hidden: tuple[int, int] = (1000, 200)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:  # [B, F] -> [B]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = features
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, **types)(x))
        return nn.Dense(1, **types)(x)[..., 0].astype(self.param_dtype)


class DotCritic(nn.Module):
    """``T = cosine(image, text) / temperature + bias``.

    The temperature is learned and kept within `temperature_range`; the bias lets T reach log r,
    which is negative for most pairs that do not belong together.  The published critic is width
    2048, hidden 2048, norm "batch", noisy_identity True, with no bias.

    `scale_features` and `text_identity` are for frozen pretrained towers, whose features come at
    any scale and need few changes: pairs then teach the image block where a language model, which
    knows far more words than they hold, puts captions.
    """

    width: int = 256
    hidden: int = 512
    norm: Literal["layer", "batch"] = "layer"
    noisy_identity: bool = False
    text_identity: bool = False  # the text block starts as the identity, then a LayerNorm
    scale_features: bool = False  # to a root mean square of 1
    dropout: float = 0.0  # of the features
    temperature: float = 0.07
    temperature_range: tuple[float, float] = (0.01, 1.0)
    bias: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = partial(
            ProjectionBlock,
            self.width,
            self.hidden,
            self.norm,
            self.noisy_identity,
            scale_features=self.scale_features,
            dropout=self.dropout,
            **types,
        )
        self.image_block = block(identity=False)
        self.text_block = block(identity=self.text_identity)
        log_init = nn.initializers.constant(jnp.log(self.temperature))
        self.log_temperature = self.param("log_temperature", log_init, (), self.param_dtype)
        bias_init = nn.initializers.constant(self.bias)
        self.score_bias = self.param("score_bias", bias_init, (), self.param_dtype)

    def project_image(
        self, features: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        """``[B, F]`` → ``[B, width]`` of unit length, in the type of the parameters."""
        return _unit(self.image_block(features, train, valid).astype(self.param_dtype))

    def project_text(
        self, features: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        """``[B, F]`` → ``[B, width]`` of unit length, in the type of the parameters."""
        return _unit(self.text_block(features, train, valid).astype(self.param_dtype))

    def current_temperature(self) -> Array:
        low, high = self.temperature_range
        return jnp.exp(_clamp(self.log_temperature, jnp.log(low), jnp.log(high)))

    def watched(self) -> dict[str, Array]:
        return {"temperature": self.current_temperature()}

    def pairs(self, image: Array, text: Array) -> Array:
        """``[..., D], [..., D] -> [...]``"""
        return jnp.sum(image * text, axis=-1) / self.current_temperature() + self.score_bias

    def matrix(self, image: Array, text: Array) -> Array:
        """``[..., N, D], [..., M, D] -> [..., N, M]``"""
        cosine = jnp.einsum("...nd,...md->...nm", image, text)
        return cosine / self.current_temperature() + self.score_bias


class SeparableCritic(nn.Module):
    """``T = g(image) · h(text) + bias``, g and h perceptrons, nothing normalised.

    Unlike a cosine it is not bounded, so it can follow log r as far as that goes.
    Source: Poole et al. (arXiv 1905.06922), section 3.
    """

    width: int = 32
    hidden: int = 256
    layers: int = 2
    bias: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths = (*[self.hidden] * self.layers, self.width)
        self.image_layers = [nn.Dense(width, **types) for width in widths]
        self.text_layers = [nn.Dense(width, **types) for width in widths]
        bias_init = nn.initializers.constant(self.bias)
        self.score_bias = self.param("score_bias", bias_init, (), self.param_dtype)

    def project_image(
        self, features: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        """``[B, F]`` → ``[B, width]`` in the type of the parameters."""
        return _perceptron(self.image_layers, features).astype(self.param_dtype)

    def project_text(
        self, features: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        """``[B, F]`` → ``[B, width]`` in the type of the parameters."""
        return _perceptron(self.text_layers, features).astype(self.param_dtype)

    def watched(self) -> dict[str, Array]:
        return {}

    def pairs(self, image: Array, text: Array) -> Array:
        """``[..., D], [..., D] -> [...]``"""
        return jnp.sum(image * text, axis=-1) + self.score_bias

    def matrix(self, image: Array, text: Array) -> Array:
        """``[..., N, D], [..., M, D] -> [..., N, M]``"""
        return jnp.einsum("...nd,...md->...nm", image, text) + self.score_bias


class BilinearCritic(SeparableCritic):
    """``T = image^T W text + bias`` with W of rank `width` at most: one linear layer a side.

    Source: CPC (arXiv 1807.03748), eq. 3.
    """

    width: int = 256
    layers: int = 0


class ConcatCritic(nn.Module):
    """``T = mlp([image, text])``: no inner product stands between image and text.

    The first layer of the perceptron is linear in each, so that projections are its two halves and
    only the layers after it are computed for every pair.  `matrix` works through the images a few
    at a time, in the backward pass too: its memory is bounded, its time is not.  The published
    critic is hidden 512, layers 2.

    Source: Deep InfoMax (arXiv 1808.06670), appendix A; Poole et al. (arXiv 1905.06922), section 3.
    """

    hidden: int = 512
    layers: int = 2
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.image_layer = nn.Dense(self.hidden, **types)
        self.text_layer = nn.Dense(self.hidden, use_bias=False, **types)
        draw, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        widths = (*[self.hidden] * self.layers, 1)
        # Plain arrays, not modules: `matrix` maps over them.
        self.head = [
            (
                self.param(f"kernel_{n}", draw, (width, after), self.param_dtype),
                self.param(f"bias_{n}", zeros, (after,), self.param_dtype),
            )
            for n, (width, after) in enumerate(pairwise(widths))
        ]

    def project_image(
        self, features: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        """``[B, F]`` → ``[B, hidden]`` in the type of the parameters."""
        return self.image_layer(features).astype(self.param_dtype)

    def project_text(
        self, features: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        """``[B, F]`` → ``[B, hidden]`` in the type of the parameters."""
        return self.text_layer(features).astype(self.param_dtype)

    def watched(self) -> dict[str, Array]:
        return {}

    def pairs(self, image: Array, text: Array) -> Array:
        """``[..., D], [..., D] -> [...]``"""
        return _head(self.head, image + text, self.dtype)

    def matrix(self, image: Array, text: Array) -> Array:
        """``[..., N, D], [..., M, D] -> [..., N, M]``"""
        head, dtype = list(self.head), self.dtype

        @jax.checkpoint
        def row(one: Array, texts: Array) -> Array:  # [D], [M, D] -> [M]
            return _head(head, one + texts, dtype)

        at_once = max(1, _MAX_HIDDEN // (text.shape[-2] * self.hidden))

        def block(images: Array, texts: Array) -> Array:  # [N, D], [M, D] -> [N, M]
            return lax.map(lambda one: row(one, texts), images, batch_size=at_once)

        function = block
        for _ in image.shape[:-2]:
            function = jax.vmap(function)
        return function(image, text)


_MAX_HIDDEN = 2**22
"""Hidden units of all pairs that `ConcatCritic.matrix` holds at a time: 16 MiB in float32."""


def _head(layers: list[tuple[Array, Array]], hidden: Array, dtype: DTypeLike) -> Array:
    """The layers after the first, from its output before the activation: ``[..., D] -> [...]``."""
    x = hidden
    for kernel, bias in layers:
        x = jnp.dot(nn.relu(x).astype(dtype), kernel.astype(dtype)).astype(bias.dtype) + bias
    return x[..., 0]


def _perceptron(layers: Sequence[Callable[[Array], Array]], x: Array) -> Array:
    for layer in layers[:-1]:
        x = nn.relu(layer(x))
    return layers[-1](x)


def _unit(x: Array) -> Array:
    # The derivative of a norm at 0 is NaN, and an empty caption can be projected to 0.
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squared, 1e-12))


@jax.custom_vjp
def _clamp(x: Array, low: Array, high: Array) -> Array:
    """`jnp.clip` whose gradient still leads back inside: a plain clip is stuck once it is out."""
    return jnp.clip(x, low, high)


def _clamp_forward(x: Array, low: Array, high: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.clip(x, low, high), (x >= high, x <= low)


def _clamp_backward(limits: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    at_high, at_low = limits
    # Descent moves x against g, so a negative g pushes up.
    outward = (at_high & (g < 0)) | (at_low & (g > 0))
    return jnp.where(outward, jnp.zeros_like(g), g), None, None


_clamp.defvjp(_clamp_forward, _clamp_backward)
