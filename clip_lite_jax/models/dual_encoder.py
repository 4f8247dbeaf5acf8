"""The dual encoder: two towers and a critic, as pure functions of parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import pydantic
from jax import Array, lax

from clip_lite_jax.config import CriticConfig, ModelConfig, ObjectiveConfig, Options
from clip_lite_jax.config.types import Triple
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.critics import (
    BilinearCritic,
    ConcatCritic,
    DotCritic,
    PriorDiscriminator,
    SeparableCritic,
)
from clip_lite_jax.models.image_encoders import IMAGE_ENCODERS
from clip_lite_jax.models.text_encoders import TEXT_ENCODERS

CRITICS: dict[str, Callable[..., nn.Module]] = {
    "bilinear": BilinearCritic,
    "concat": ConcatCritic,
    "condot": ConcatCritic,
    "dot": DotCritic,
    "dotcon": DotCritic,
    "separable": SeparableCritic,
}
SELF_CRITICS = {"condot": "dot", "dotcon": "concat"}
"""The published mixes: another critic within a modality than across."""

HALF = (0.5, 0.5, 0.5)


@flax.struct.dataclass
class Inputs:
    """What the two towers read, or features that a frozen tower made of it before."""

    image: Any  # [B, H, W, 3] uint8, or features [B, F]
    tokens: Any  # [B, L] int32, or features [B, F]
    mask: Any  # [B, L] bool, True for real tokens; [B, 1] beside features
    valid: Any = None  # [B] bool; False keeps an example out of batch statistics


@flax.struct.dataclass
class Embedded:
    """A batch after encoders and critics' projections; None where the loss has no such term."""

    image: Any  # [B, D]
    text: Any  # [B, D]
    image_features: Any = None  # [B, F] for the prior
    text_features: Any = None
    views: Any = None  # ([B, D], [B, D]) the image and its second view
    captions: Any = None  # ([B, D], [B, D]) the caption and a second one


class DualEncoder(nn.Module):
    """Image encoder, text encoder and critics under one parameter tree."""

    image_encoder: nn.Module
    text_encoder: nn.Module
    critic: nn.Module
    dtype: Any
    visual_critic: nn.Module | None = None
    textual_critic: nn.Module | None = None
    image_prior: nn.Module | None = None
    text_prior: nn.Module | None = None
    pixel_mean: Triple = HALF
    pixel_std: Triple = HALF
    frozen: tuple[str, ...] = ()
    """Towers, ``image`` or ``text``, that run as in evaluation and get no gradient."""

    def __call__(
        self, inputs: Inputs, second: Inputs | None = None, train: bool = False
    ) -> Embedded:
        valid = inputs.valid
        image = self.image_features(inputs.image, train, valid)
        text = self.text_features(inputs.tokens, inputs.mask, train)
        views = captions = None
        if self.visual_critic is not None and second is not None:
            other = self.image_features(second.image, train, valid)
            views = _project(self.visual_critic, image, other, train, valid)
        if self.textual_critic is not None and second is not None:
            other = self.text_features(second.tokens, second.mask, train)
            captions = _project(self.textual_critic, text, other, train, valid)
        return Embedded(
            *_project(self.critic, image, text, train, valid),
            image if self.image_prior is not None else None,
            text if self.text_prior is not None else None,
            views,
            captions,
        )

    def create(self, inputs: Inputs) -> None:
        """Touches every parameter, for `init`."""
        embedded = self(inputs, inputs)
        self.pairs(embedded.image, embedded.text)
        if embedded.views is not None:
            self.pairs(embedded.views[0], embedded.views[1], "visual_critic")
        if embedded.captions is not None:
            self.pairs(embedded.captions[0], embedded.captions[1], "textual_critic")
        for prior in ("image", "text"):
            if getattr(self, f"{prior}_prior") is not None:
                self.prior_logits(getattr(embedded, f"{prior}_features"), prior)

    def image_features(
        self, images: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        if images.ndim == 2:
            return images.astype(self.dtype)
        # In float32: eight bits of a pixel and its mean do not fit into bfloat16.
        kind = jnp.promote_types(self.dtype, jnp.float32)
        mean, std = jnp.asarray(self.pixel_mean, kind), jnp.asarray(self.pixel_std, kind)
        pixels = ((images.astype(kind) / 255 - mean) / std).astype(self.dtype)
        return self.normalised_image_features(pixels, train, valid)

    def normalised_image_features(
        self, pixels: Array, train: bool = False, valid: Array | None = None
    ) -> Array:
        if "image" in self.frozen:
            return lax.stop_gradient(self.image_encoder(pixels))
        return self.image_encoder(pixels, train, valid)

    def text_features(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens.astype(self.dtype)
        if "text" in self.frozen:
            return lax.stop_gradient(self.text_encoder(tokens, mask))
        return self.text_encoder(tokens, mask, train)

    def encode_image(self, images: Array, train: bool = False) -> Array:
        return self.critic.project_image(self.image_features(images, train), train)

    def encode_text(self, tokens: Array, mask: Array, train: bool = False) -> Array:
        return self.critic.project_text(self.text_features(tokens, mask, train), train)

    def pairs(self, image: Array, text: Array, critic: str = "critic") -> Array:
        return getattr(self, critic).pairs(image, text)

    def matrix(self, image: Array, text: Array, critic: str = "critic") -> Array:
        return getattr(self, critic).matrix(image, text)

    def feature_scores(self, image: Array, text: Array) -> Array:
        return self.critic.pairs(self.critic.project_image(image), self.critic.project_text(text))

    def prior_logits(self, features: Array, prior: str) -> Array:
        return getattr(self, f"{prior}_prior")(features)

    def watched(self) -> dict[str, Array]:
        return self.critic.watched()


def _project(
    critic: nn.Module, one: Array, other: Array, train: bool, valid: Array | None
) -> tuple[Array, Array]:
    return critic.project_image(one, train, valid), critic.project_text(other, train, valid)


@flax.struct.dataclass
class BoundCritic:
    """A critic with its parameters: `negatives.Critic`."""

    params: Any
    module: DualEncoder = flax.struct.field(pytree_node=False)
    name: str = flax.struct.field(pytree_node=False, default="critic")

    def pairs(self, image: Any, text: Any) -> Any:
        return self.module.apply({"params": self.params}, image, text, self.name, method="pairs")

    def matrix(self, image: Any, text: Any) -> Any:
        return self.module.apply({"params": self.params}, image, text, self.name, method="matrix")


@flax.struct.dataclass
class EmbeddingCritic(BoundCritic):
    """A critic together with the encoders: `negatives.EmbeddingCritic`."""

    model_state: Any = flax.struct.field(default_factory=dict)
    dropout_key: Any = None

    def embed_image(self, inputs: Any) -> Any:
        return self._embed((inputs,), "encode_image", 0)

    def embed_text(self, inputs: Any) -> Any:
        return self._embed(inputs, "encode_text", 1)

    def _embed(self, inputs: tuple[Any, ...], method: str, number: int) -> Any:
        # As in training, or the critic could tell negatives by the lack of dropout.
        embedded, _ = self.module.apply(
            {"params": self.params, **self.model_state},
            *inputs,
            train=True,
            rngs={"dropout": jax.random.fold_in(self.dropout_key, number)},
            mutable=list(self.model_state),
            method=method,
        )
        return embedded


@dataclass(frozen=True)
class Model:
    """Pure functions over the parameters of a `DualEncoder`."""

    module: DualEncoder
    image_size: int
    max_tokens: int
    cached: tuple[str, ...] = ()
    """Towers, ``image`` or ``text``, whose features training reads in place of what they encode."""

    def freeze(self, towers: tuple[str, ...]) -> "Model":
        """The model with these towers, ``image`` or ``text``, frozen."""
        return replace(self, module=self.module.clone(frozen=towers))

    def example_inputs(self, batch: int) -> Inputs:
        """Inputs of the right shapes and types: blank images, one empty caption each."""
        return Inputs(
            jnp.zeros((batch, self.image_size, self.image_size, 3), jnp.uint8),
            jnp.zeros((batch, self.max_tokens), jnp.int32),
            jnp.ones((batch, self.max_tokens), bool),
        )

    def train_inputs(self, params: Any, model_state: Any, batch: int) -> Inputs:
        """As `example_inputs`, with features where training reads those."""
        inputs = self.example_inputs(batch)
        if "image" in self.cached:
            image = self.image_features(params, model_state, inputs.image)
            inputs = replace(inputs, image=image.astype(jnp.float32))
        if "text" in self.cached:
            text = self.text_features(params, model_state, inputs.tokens, inputs.mask)
            inputs = replace(inputs, tokens=text.astype(jnp.float32), mask=inputs.mask[:, :1])
        return inputs

    def init(self, key: Array) -> tuple[Any, Any]:
        """Fresh ``(params, model_state)``; `model_state` holds what is not trained by gradient."""
        variables = dict(self.module.init(key, self.example_inputs(1), method="create"))
        return variables.pop("params"), variables

    def embed(
        self,
        params: Any,
        model_state: Any,
        inputs: Inputs,
        dropout_key: Array,
        second: Inputs | None = None,
    ) -> tuple[Embedded, Any]:
        """Training pass: the embedded batch and the new model state.

        `second` holds another view and another caption of every example, for self-supervision.
        """
        return self.module.apply(
            {"params": params, **model_state},
            inputs,
            second,
            True,
            rngs={"dropout": dropout_key},
            mutable=list(model_state),
        )

    def image_features(self, params: Any, model_state: Any, images: Array) -> Any:
        """``[B, H, W, 3]`` uint8 → ``[B, F]``, before the critic's projection."""
        variables = {"params": params, **model_state}
        return self.module.apply(variables, images, method="image_features")

    def text_features(self, params: Any, model_state: Any, tokens: Array, mask: Array) -> Any:
        """``[B, L]`` int32 and bool → ``[B, F]``, before the critic's projection."""
        variables = {"params": params, **model_state}
        return self.module.apply(variables, tokens, mask, method="text_features")

    def encode_image(self, params: Any, model_state: Any, images: Array) -> Any:
        """``[B, H, W, 3]`` uint8 → ``[B, D]``."""
        variables = {"params": params, **model_state}
        return self.module.apply(variables, images, method="encode_image")

    def encode_text(self, params: Any, model_state: Any, tokens: Array, mask: Array) -> Any:
        """``[B, L]`` int32 and bool → ``[B, D]``."""
        variables = {"params": params, **model_state}
        return self.module.apply(variables, tokens, mask, method="encode_text")

    def critic(self, params: Any, name: str = "critic") -> BoundCritic:
        # Only its own parameters: what is differentiated round a ring of devices stays small.
        return BoundCritic({name: params[name]}, self.module, name)

    def embedding_critic(
        self, params: Any, model_state: Any, dropout_key: Array
    ) -> EmbeddingCritic:
        """One that embeds images ``[B, H, W, 3]`` and ``(tokens [B, L], mask [B, L])`` too."""
        return EmbeddingCritic(params, self.module, "critic", model_state, dropout_key)

    def prior_logits(self, params: Any, features: Array, prior: str) -> Any:
        """Features ``[B, F]`` → logits ``[B]`` of the discriminator ``image`` or ``text``."""
        own = {"params": {f"{prior}_prior": params[f"{prior}_prior"]}}
        return self.module.apply(own, features, prior, method="prior_logits")

    def watched(self, params: Any) -> Any:
        """Numbers [] of the critic that a run logs, by name."""
        return self.module.apply({"params": params}, method="watched")


def build_model(
    config: ModelConfig,
    image_size: int,
    vocab_size: int,
    max_tokens: int,
    objective: ObjectiveConfig | None = None,
) -> Model:
    """The model that `config` describes, with what the terms of `objective` need.

    Raises:
      ConfigError: an unknown encoder or critic, or an option it does not have.
    """
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    types: dict[str, Any] = {
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype("float64" if config.dtype == "float64" else "float32"),
    }
    image = _build(IMAGE_ENCODERS, "model.image", config.image.name, config.image.options, types)
    text_fixed = types | {"vocab_size": vocab_size, "max_tokens": max_tokens}
    text = _build(TEXT_ENCODERS, "model.text", config.text.name, config.text.options, text_fixed)
    terms = objective or ObjectiveConfig()

    def critic(wanted: bool, field: str, chosen: CriticConfig) -> nn.Module | None:
        return _build(CRITICS, field, chosen.name, chosen.options, types) if wanted else None

    def prior(name: str) -> nn.Module | None:
        wanted = terms.prior_weight > 0 and name in terms.prior_of
        return PriorDiscriminator(**types) if wanted else None

    mixed = SELF_CRITICS.get(config.critic.name)
    own = terms.self_critic or (CriticConfig(name=mixed) if mixed else config.critic)
    module = DualEncoder(
        image,
        text,
        _build(CRITICS, "model.critic", config.critic.name, config.critic.options, types),
        types["dtype"],
        critic(terms.visual_weight > 0, "objective.self_critic", own),
        critic(terms.textual_weight > 0, "objective.self_critic", own),
        prior("image"),
        prior("text"),
        config.pixel_mean or HALF,
        config.pixel_std or HALF,
    )
    towers = {"image": config.image, "text": config.text}
    cached = tuple(name for name, tower in towers.items() if tower.cache)
    return Model(module, image_size, max_tokens, cached)


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
    types = get_type_hints(type(module))
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
