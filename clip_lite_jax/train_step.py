"""The jitted functions: one training step, and encoding with a given state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from clip_lite_jax.models import Inputs, Model
from clip_lite_jax.negatives import Drawn, Pairs, Sampler
from clip_lite_jax.objectives import Objective
from clip_lite_jax.sharding import batch_sharding, batch_shards, replicated
from clip_lite_jax.train_state import TrainState, step_keys


@flax.struct.dataclass
class Batch:
    """One global batch, or this process's rows of it."""

    image: Any  # [B, H, W, 3] uint8
    tokens: Any  # [B, L] int32
    mask: Any  # [B, L] bool
    group: Any  # [B, 2] int32: what is shown, and the caption; equal in either is no negative
    valid: Any  # [B] bool; False marks the slot of an unusable example
    index: Any  # [B] int32, position in the source

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.image, self.tokens, self.mask)


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_loss(
    model: Model, objective: Objective, sampler: Sampler, seed: int
) -> Callable[..., Any]:
    """``loss(params, model_state, step, batch) -> (loss, (metrics, model_state, drawn))``."""

    def loss(
        params: Any, model_state: Any, step: Array, batch: Batch
    ) -> tuple[Array, tuple[dict[str, Array], Any, Drawn]]:
        dropout_key, negatives_key = step_keys(seed, step)
        image, text, model_state = model.embed(params, model_state, batch.inputs, dropout_key)
        pairs = Pairs(image, text, batch.group, batch.valid)
        drawn = sampler(negatives_key, step, pairs, model.critic(params))
        value, metrics = objective(drawn.scores)
        return value, (metrics, model_state, drawn)

    return loss


def make_train_step(
    model: Model,
    objective: Objective,
    sampler: Sampler,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    ema_decay: float = 0.0,
) -> TrainStep:
    """``step(state, batch) -> (state, metrics)``, compiled for `mesh`; consumes the old state."""
    gradient = jax.value_and_grad(make_loss(model, objective, sampler, seed), has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        (loss, (metrics, model_state, _)), grads = gradient(
            state.params, state.model_state, state.step, batch
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Short at first, so that the average never drags the random initial weights along.
            decay = jnp.minimum(ema_decay, (state.step + 1) / (state.step + 10))
            ema = optax.incremental_update(params, ema, 1 - decay)
        metrics |= {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(params),
            "bad_examples": jnp.sum(~batch.valid),
        } | model.watched(state.params)
        return TrainState(state.step + 1, params, model_state, opt_state, ema), metrics

    whole = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, batch_sharding(mesh)),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


@dataclass(frozen=True)
class EncodeFns:
    """A trained state as functions of arrays: all that evaluators and apps know of a model.

    Batches are split over the mesh; results are whole on every device.
    """

    image: Callable[[Any], Array]  # [B, H, W, 3] uint8 -> [B, D]
    text: Callable[[Any, Any], Array]  # [B, L] int32, [B, L] bool -> [B, D]
    pairs: Callable[[Any, Any], Array]  # [B, D], [B, D] -> [B]
    matrix: Callable[[Any, Any], Array]  # [N, D], [M, D] -> [N, M]


def make_encode_fns(model: Model, mesh: Mesh) -> Callable[[Any, Any], EncodeFns]:
    """``bind(params, model_state) -> EncodeFns``; compiled once, whatever the parameters."""
    rows, whole = batch_sharding(mesh), replicated(mesh)
    image = jax.jit(model.encode_image, in_shardings=(whole, whole, rows), out_shardings=whole)
    text = jax.jit(model.encode_text, in_shardings=(whole, whole, rows, rows), out_shardings=whole)
    pairs = jax.jit(lambda params, i, t: model.critic(params).pairs(i, t))
    matrix = jax.jit(lambda params, i, t: model.critic(params).matrix(i, t))

    def padded(encode: Callable[..., Array]) -> Callable[..., Array]:
        """Takes any number of rows, which need not divide over the devices."""

        def call(*arrays: Any) -> Array:
            count = len(arrays[0])
            missing = -count % batch_shards(mesh)
            if missing:
                arrays = tuple(
                    jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1), mode="edge")
                    for a in arrays
                )
            return encode(*arrays)[:count]

        return call

    def bind(params: Any, model_state: Any) -> EncodeFns:
        return EncodeFns(
            image=padded(lambda x: image(params, model_state, x)),
            text=padded(lambda tokens, mask: text(params, model_state, tokens, mask)),
            pairs=lambda i, t: pairs(params, i, t),
            matrix=lambda i, t: matrix(params, i, t),
        )

    return bind
