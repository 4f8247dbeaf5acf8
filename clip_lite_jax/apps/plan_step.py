"""The training step of a configuration, compiled without data, weights or accelerator."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from clip_lite_jax.batch import Batch
from clip_lite_jax.color_jitter import draw_changes
from clip_lite_jax.config import Config, EncoderConfig
from clip_lite_jax.data.tokenizer import load_tokenizer
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.features import check_cache
from clip_lite_jax.learner import Learner, build_learner
from clip_lite_jax.models import Inputs, Model, build_model
from clip_lite_jax.optim import build_optimizer, frozen_towers
from clip_lite_jax.sharding import batch_sharding, batch_shards
from clip_lite_jax.train_state import GROUP_COLUMNS, TrainState, init_state, state_shardings
from clip_lite_jax.train_step import make_train_step

VOCABULARIES = {
    "bert": 30_522,
    "minilm": 30_522,
    "mpnet": 30_527,
    "clip_text": 49_408,
    "clip_text_l": 49_408,
}
"""Pieces of the tokenizer that the published weights of a text encoder come with."""


@dataclass(frozen=True)
class AbstractStep:
    """A training step and what it takes, as shapes."""

    model: Model
    state: TrainState
    batch: Batch
    lowered: Any  # jax.stages.Lowered


def vocabulary(config: Config) -> tuple[int, str]:
    """Pieces of the tokenizer, and where the number is from.

    Raises:
      ConfigError: `data.tokenizer` is there and cannot be read.
    """
    path = config.data.tokenizer or config.model.text.init_from
    if path is None:
        return config.data.vocab_size, "data.vocab_size"
    if Path(path).exists():
        return load_tokenizer(path, config.data).vocab_size, f"of {path}"
    name = config.model.text.name
    if name in VOCABULARIES:
        return VOCABULARIES[name], f"assumed, of the published {name}: {path} is not there"
    return config.data.vocab_size, f"assumed, data.vocab_size: {path} is not there"


def without_weights(config: Config) -> Config:
    """The configuration with encoders that start at random: a plan reads no weights."""

    def random(encoder: EncoderConfig) -> EncoderConfig:
        return replace(encoder, init_from=None)

    model = config.model
    return replace(config, model=replace(model, image=random(model.image), text=random(model.text)))


def abstract_step(config: Config, mesh: Mesh) -> AbstractStep:
    """The step that `train.train` would take with `config`, on devices that need not exist.

    Raises:
      ConfigError: what does not go together, or sizes that do not divide.
    """
    check_batch(config, batch_shards(mesh))
    config = without_weights(config)
    model = build_model(
        config.model,
        config.data.image_size,
        vocabulary(config)[0],
        config.data.max_tokens,
        config.objective,
    )
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    if config.optim.frozen:
        model = model.freeze(frozen_towers(config.optim, config.steps, params))
    check_cache(config, model.module.frozen)
    learner = learner_of(config, model, mesh)
    optimizer = build_optimizer(config.optim, config.steps, params)
    state = _abstract_state(config, model, optimizer, mesh)
    batch = _abstract_batch(config, model, state, mesh)
    step: Any = make_train_step(learner, optimizer, mesh, config.optim.ema_decay, config.mesh)
    return AbstractStep(model, state, batch, step.lower(state, batch))


def learner_of(config: Config, model: Model, mesh: Mesh) -> Learner:
    """The learner of a run; raises `ConfigError`, see `build_learner`."""
    return build_learner(
        model,
        config.objective,
        config.negatives,
        config.batch_size,
        mesh,
        config.seed,
        config.accumulate,
    )


def check_batch(config: Config, devices: int) -> None:
    """Raises `ConfigError` unless every device gets as many rows of every part of a batch."""
    rows, parts = config.batch_size, config.accumulate
    if rows % (devices * parts):
        step = devices * parts
        near = sorted({max(1, rows // step) * step, -(-rows // step) * step})
        of_parts = f" in accumulate={parts} parts" if parts > 1 else ""
        raise ConfigError(
            f"batch_size={rows}{of_parts} does not divide over {devices} devices: use "
            f"{' or '.join(map(str, near))}"
        )


def _abstract_state(
    config: Config, model: Model, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    def init() -> TrainState:
        state, _ = init_state(
            model,
            lambda _: optimizer,
            config.seed,
            config.optim.ema_decay > 0,
            mesh,
            config.negatives,
            config.batch_size,
            mesh_config=config.mesh,
        )
        return state

    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, config.mesh, shapes),
    )


def _abstract_batch(config: Config, model: Model, state: TrainState, mesh: Mesh) -> Batch:
    """Shapes of a batch as `data.pipeline.train_batches` makes it."""
    sharding = batch_sharding(mesh, parts=config.accumulate > 1)
    change = None
    if "image" not in model.cached:
        change = draw_changes(config.data.augment, np.random.default_rng())

    def make(params: Any, model_state: Any) -> Batch:
        rows = config.batch_size
        inputs = model.train_inputs(params, model_state, rows)
        twice = config.objective.visual_weight + config.objective.textual_weight > 0
        index = jnp.zeros(rows, jnp.int32)
        return Batch(
            inputs.image,
            inputs.tokens,
            inputs.mask,
            jnp.zeros((rows, GROUP_COLUMNS), jnp.int32),
            jnp.zeros(rows, bool),
            index,
            Inputs(inputs.image, inputs.tokens, inputs.mask) if twice else None,
            None if change is None else jnp.zeros((rows, 1 + twice, *change.shape)),
        )

    batch = jax.eval_shape(make, state.params, state.model_state)
    parts = config.accumulate

    def spread(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = x.shape if parts == 1 else (parts, x.shape[0] // parts, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree.map(spread, batch)
