"""Critics T(image, text): learned scores of how much likelier a pair is than chance.

A critic projects the features of each encoder to embeddings once per example; scores of pairs are
functions of embeddings alone, so that negatives cost no second pass through an encoder.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


class ProjectionBlock(nn.Module):
    """``norm(mlp(x) + shortcut(x))``: the residual projection of CLIP-Lite, with LayerNorm."""

    width: int
    hidden: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, F] -> [B, width]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.Dense(self.hidden, **types)(x)
        h = nn.relu(nn.LayerNorm(**types)(h))
        h = nn.Dense(self.width, **types)(h)
        shortcut = nn.Dense(self.width, use_bias=False, **types)(x)
        return nn.LayerNorm(**types)(h + shortcut)


class DotCritic(nn.Module):
    """``T = cosine(image, text) / temperature + bias``.

    The temperature is learned and kept within `temperature_range`; the bias lets T reach log r,
    which is negative for most pairs that do not belong together.
    """

    width: int = 256
    hidden: int = 512
    temperature: float = 0.07
    temperature_range: tuple[float, float] = (0.01, 1.0)
    bias: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.image_block = ProjectionBlock(self.width, self.hidden, **types)
        self.text_block = ProjectionBlock(self.width, self.hidden, **types)
        log_init = nn.initializers.constant(jnp.log(self.temperature))
        self.log_temperature = self.param("log_temperature", log_init, (), self.param_dtype)
        bias_init = nn.initializers.constant(self.bias)
        self.score_bias = self.param("score_bias", bias_init, (), self.param_dtype)

    def project_image(self, features: Array) -> Array:
        """``[B, F]`` → ``[B, width]`` of unit length, in the type of the parameters."""
        return _unit(self.image_block(features).astype(self.param_dtype))

    def project_text(self, features: Array) -> Array:
        """``[B, F]`` → ``[B, width]`` of unit length, in the type of the parameters."""
        return _unit(self.text_block(features).astype(self.param_dtype))

    def current_temperature(self) -> Array:
        low, high = self.temperature_range
        return jnp.exp(_clamp(self.log_temperature, jnp.log(low), jnp.log(high)))

    def pairs(self, image: Array, text: Array) -> Array:
        """``[..., D], [..., D] -> [...]``"""
        return jnp.sum(image * text, axis=-1) / self.current_temperature() + self.score_bias

    def matrix(self, image: Array, text: Array) -> Array:
        """``[..., N, D], [..., M, D] -> [..., N, M]``"""
        cosine = jnp.einsum("...nd,...md->...nm", image, text)
        return cosine / self.current_temperature() + self.score_bias


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


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
