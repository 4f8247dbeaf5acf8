"""The dual encoder: two towers and a critic, as pure functions of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import pydantic
from jax import Array

from clip_lite_jax.config import ModelConfig, Options
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.convnet import ConvNet
from clip_lite_jax.models.critics import (
    BilinearCritic,
    ConcatCritic,
    DotCritic,
    SeparableCritic,
)
from clip_lite_jax.models.transformer import Transformer

IMAGE_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
}
TEXT_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "transformer": Transformer,
}
CRITICS: dict[str, Callable[..., nn.Module]] = {
    "bilinear": BilinearCritic,
    "concat": ConcatCritic,
    "dot": DotCritic,
    "separable": SeparableCritic,
}

PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@flax.struct.dataclass
class Inputs:
    """What the two towers read."""

    image: Array  # [B, H, W, 3] uint8
    tokens: Array  # [B, L] int32
    mask: Array  # [B, L] bool, True for real tokens
    valid: Array | None = None  # [B] bool; False keeps an example out of batch statistics


class DualEncoder(nn.Module):
    """Image encoder, text encoder and critic under one parameter tree."""

    image_encoder: nn.Module
    text_encoder: nn.Module
    critic: nn.Module
    dtype: Any

    def __call__(self, inputs: Inputs, train: bool = False) -> tuple[Array, Array]:
        image = self.encode_image(inputs.image, train, inputs.valid)
        text = self.encode_text(inputs.tokens, inputs.mask, train, inputs.valid)
        self.critic.pairs(image, text)  # so that `init` creates the parameters of the score
        return image, text

    def encode_image(self, images: Array, train: bool = False, valid: Array | None = None) -> Array:
        mean, std = jnp.asarray(PIXEL_MEAN, self.dtype), jnp.asarray(PIXEL_STD, self.dtype)
        pixels = (images.astype(self.dtype) / 255 - mean) / std
        return self.critic.project_image(self.image_encoder(pixels, train), train, valid)

    def encode_text(
        self, tokens: Array, mask: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        return self.critic.project_text(self.text_encoder(tokens, mask, train), train, valid)

    def pairs(self, image: Array, text: Array) -> Array:
        return self.critic.pairs(image, text)

    def matrix(self, image: Array, text: Array) -> Array:
        return self.critic.matrix(image, text)

    def watched(self) -> dict[str, Array]:
        return self.critic.watched()


@flax.struct.dataclass
class BoundCritic:
    """The critic with its parameters: `negatives.Critic`."""

    params: Any
    module: DualEncoder = flax.struct.field(pytree_node=False)

    def pairs(self, image: Any, text: Any) -> Any:
        return self.module.apply({"params": self.params}, image, text, method="pairs")

    def matrix(self, image: Any, text: Any) -> Any:
        return self.module.apply({"params": self.params}, image, text, method="matrix")


@dataclass(frozen=True)
class Model:
    """Pure functions over the parameters of a `DualEncoder`."""

    module: DualEncoder
    image_size: int
    max_tokens: int

    def init(self, key: Array) -> tuple[Any, Any]:
        """Fresh ``(params, model_state)``; `model_state` holds what is not trained by gradient."""
        inputs = Inputs(
            jnp.zeros((1, self.image_size, self.image_size, 3), jnp.uint8),
            jnp.zeros((1, self.max_tokens), jnp.int32),
            jnp.ones((1, self.max_tokens), bool),
        )
        variables = dict(self.module.init(key, inputs))
        return variables.pop("params"), variables

    def embed(
        self, params: Any, model_state: Any, inputs: Inputs, dropout_key: Array
    ) -> tuple[Array, Array, Any]:
        """Training pass: embeddings ``[B, D]`` of images and texts, and the new model state."""
        (image, text), new_state = self.module.apply(
            {"params": params, **model_state},
            inputs,
            True,
            rngs={"dropout": dropout_key},
            mutable=list(model_state),
        )
        return image, text, new_state

    def encode_image(self, params: Any, model_state: Any, images: Array) -> Any:
        """``[B, H, W, 3]`` uint8 → ``[B, D]``."""
        variables = {"params": params, **model_state}
        return self.module.apply(variables, images, method="encode_image")

    def encode_text(self, params: Any, model_state: Any, tokens: Array, mask: Array) -> Any:
        """``[B, L]`` int32 and bool → ``[B, D]``."""
        variables = {"params": params, **model_state}
        return self.module.apply(variables, tokens, mask, method="encode_text")

    def critic(self, params: Any) -> BoundCritic:
        # Only its own parameters: what travels with them round a ring of devices stays small.
        return BoundCritic({"critic": params["critic"]}, self.module)

    def watched(self, params: Any) -> Any:
        """Numbers [] of the critic that a run logs, by name."""
        return self.module.apply({"params": params}, method="watched")


def build_model(config: ModelConfig, image_size: int, vocab_size: int, max_tokens: int) -> Model:
    """The model that `config` describes.

    Raises:
      ConfigError: an unknown encoder or critic, or an option it does not have.
    """
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    types = {
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype("float64" if config.dtype == "float64" else "float32"),
    }
    image = _build(IMAGE_ENCODERS, "model.image", config.image.name, config.image.options, types)
    text_fixed = types | {"vocab_size": vocab_size, "max_tokens": max_tokens}
    text = _build(TEXT_ENCODERS, "model.text", config.text.name, config.text.options, text_fixed)
    critic = _build(CRITICS, "model.critic", config.critic.name, config.critic.options, types)
    module = DualEncoder(image, text, critic, types["dtype"])
    return Model(module, image_size, max_tokens)


def _build(
    known: dict[str, Callable[..., nn.Module]],
    field: str,
    name: str,
    options: Options,
    fixed: dict[str, Any],
) -> nn.Module:
    if name not in known:
        raise ConfigError(f"{field}.name={name!r}: choose one of {', '.join(sorted(known))}")
    module = known[name](**fixed)
    valid = set(module.__dataclass_fields__) - set(fixed) - {"parent", "name"}
    types = get_type_hints(known[name])
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in valid:
            raise ConfigError(f"{field}.options.{option}: {name} takes {', '.join(sorted(valid))}")
        try:
            checked = pydantic.TypeAdapter(types[option]).validate_python(value)
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"{field}.options.{option}={value!r}: {problem}") from error
        values[option] = tuple(checked) if isinstance(checked, list) else checked
    return module.clone(**values)
