"""What a training run carries from step to step, and how it comes into being on the mesh."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from clip_lite_jax.config import MeshConfig, NegativesConfig
from clip_lite_jax.models import Model
from clip_lite_jax.negatives import (
    Memory,
    Pairs,
    init_memory,
    uses_memory,
    uses_momentum_encoder,
)
from clip_lite_jax.sharding import batch_sharding, shardings_like

GROUP_COLUMNS = 2
"""Columns of `Batch.group`: what is shown, and the caption."""


@flax.struct.dataclass
class Target:
    """What negatives of earlier steps need."""

    params: Any  # of the momentum encoders, or None
    memory: Memory | None


@flax.struct.dataclass
class TrainState:
    step: Array  # [] int32, steps taken
    params: Any
    model_state: Any  # statistics that are not trained by gradient; {} for the built-in encoders
    opt_state: Any
    ema: Any  # moving average of params, or None
    target: Target | None
    log_normalizer: Array  # [] running log E_Q[exp T] that `objectives.dv` divides by

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and to hand out."""
        return self.params if self.ema is None else self.ema


def init_state(
    model: Model,
    optimizer_of: Callable[[Any], optax.GradientTransformation],
    seed: int,
    with_ema: bool,
    mesh: Mesh,
    negatives: NegativesConfig | None = None,
    batch: int = 0,
    towers: Mapping[str, Any] | None = None,
    mesh_config: MeshConfig | None = None,
    shapes_only: bool = False,
) -> tuple[TrainState, optax.GradientTransformation]:
    """A fresh state, born in its sharding, and the optimizer for it.

    `optimizer_of(params)` builds the optimizer; it sees shapes only.  `negatives` and `batch` say
    what is to be remembered from step to step, if anything.  `towers` holds the variables of
    encoders that do not start at random: ``{"image_encoder": {"params": ..., ...}}``.
    With `shapes_only` nothing is computed and nothing lies on the devices: the state has shapes,
    types and shardings in place of arrays, for a checkpoint to be restored into.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optimizer_of(shapes[0])

    def fresh(key: Array) -> tuple[Any, Any]:
        if shapes_only:  # what is known already is not traced a second time: it takes a second
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return model.init(key)

    def init(key: Array, towers: Mapping[str, Any]) -> TrainState:
        params, model_state = _with_towers(*fresh(key), towers)
        target = None
        if negatives is not None and uses_memory(negatives):
            pairs = _example_pairs(model, params, model_state, batch)
            memory = init_memory(negatives, batch, mesh, pairs)
            target = Target(params if uses_momentum_encoder(negatives) else None, memory)
        return TrainState(
            step=jnp.zeros((), "int32"),
            params=params,
            model_state=model_state,
            opt_state=optimizer.init(params),
            ema=params if with_ema else None,
            target=target,
            # Strongly typed: what a step returns is, and another type would compile it again.
            log_normalizer=jnp.full((), -jnp.inf, jnp.result_type(float)),
        )

    given = (jax.random.key(seed), towers or {})
    born = jax.eval_shape(init, *given)
    shardings = state_shardings(mesh, mesh_config or MeshConfig(), born)
    if shapes_only:
        return jax.tree.map(_placed, born, shardings), optimizer
    return jax.jit(init, out_shardings=shardings)(*given), optimizer


def _placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _with_towers(params: Any, model_state: Any, towers: Mapping[str, Any]) -> tuple[Any, Any]:
    variables = {"params": params, **model_state}
    for tower, collections in towers.items():
        for collection, values in collections.items():
            variables[collection] = {**variables[collection], tower: values}
    return variables.pop("params"), variables


def state_shardings(mesh: Mesh, config: MeshConfig, state: TrainState) -> TrainState:
    """How a state lies on the mesh; `state` may be of shapes.

    Parameters, and what is kept for each of them, as `sharding.parameter_shardings` says; the
    memory by its lanes, like the batch; the rest whole on every device.
    """
    shardings = shardings_like(state, state.params, mesh, config)
    if state.target is None or state.target.memory is None:
        return shardings
    memory = jax.tree.map(lambda _: batch_sharding(mesh), state.target.memory)
    return replace(shardings, target=replace(shardings.target, memory=memory))


def _example_pairs(model: Model, params: Any, model_state: Any, batch: int) -> Pairs:
    """Shapes and types of a batch's embeddings and of what they are made of."""

    def pairs() -> Pairs:
        inputs = model.train_inputs(params, model_state, batch)
        embedded, _ = model.embed(params, model_state, inputs, jax.random.key(0))
        group = jnp.zeros((batch, GROUP_COLUMNS), jnp.int32)
        valid, texts = jnp.zeros(batch, bool), (inputs.tokens, inputs.mask)
        return Pairs(embedded.image, embedded.text, group, valid, inputs=(inputs.image, texts))

    return jax.eval_shape(pairs)


def step_keys(seed: int, step: Array) -> tuple[Array, Array]:
    """The keys of one step for (dropout, negatives): functions of seed and step alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    dropout, negatives = jax.random.split(key)
    return dropout, negatives
