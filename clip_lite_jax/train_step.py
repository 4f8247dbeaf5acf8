"""The jitted functions: one training step, and encoding with a given state."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

from clip_lite_jax.batch import Batch
from clip_lite_jax.color_jitter import color_jitter
from clip_lite_jax.config import MeshConfig
from clip_lite_jax.files import cache_folder
from clip_lite_jax.flops import flops
from clip_lite_jax.gathering import in_pieces
from clip_lite_jax.learner import Learner, make_gradient
from clip_lite_jax.models import Model
from clip_lite_jax.models.heat_maps import heat_maps
from clip_lite_jax.models.score_counts import block_counts
from clip_lite_jax.negatives import Pairs, remember
from clip_lite_jax.sharding import (
    any_rows,
    batch_sharding,
    batch_shards,
    replicated,
    shardings_like,
    spread_rows,
)
from clip_lite_jax.train_state import Target, TrainState, state_shardings, step_keys

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    learner: Learner,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ema_decay: float = 0.0,
    mesh_config: MeshConfig | None = None,
    skip_non_finite: bool = False,
) -> TrainStep:
    """``step(state, batch) -> (state, metrics)``, compiled for `mesh`; consumes the old state.

    The state comes as `state_shardings` says, and the new one lies like it.  With
    `skip_non_finite` a step whose loss or gradient is not finite changes nothing but the number of
    the step.
    """
    gradient = make_gradient(learner)
    settings = mesh_config or MeshConfig()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        # Part by part where a batch has parts, which are there to save memory.
        batch = lax.map(_jittered, batch) if learner.parts > 1 else _jittered(batch)
        with in_pieces(mesh):
            (loss, learned), grads = gradient(state, batch)
        # Each device sums the part of the gradients that it updates, not all of them.
        grads = lax.with_sharding_constraint(
            grads, shardings_like(grads, state.params, mesh, settings)
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Short at first, so that the average never drags the random initial weights along.
            decay = jnp.minimum(ema_decay, (state.step + 1) / (state.step + 10))
            ema = optax.incremental_update(params, ema, 1 - decay)
        metrics = learned.metrics | {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(params),
            "bad_examples": jnp.sum(~batch.valid),
            **{f"gradient_norm/{part}": optax.tree.norm(tree) for part, tree in grads.items()},
            **{f"parameter_norm/{part}": optax.tree.norm(tree) for part, tree in params.items()},
            **learner.model.watched(state.params),
        }
        new = TrainState(
            step=state.step + 1,
            params=params,
            model_state=learned.model_state,
            opt_state=opt_state,
            ema=ema,
            target=_new_target(learner, mesh, state, params, learned.pairs),
            log_normalizer=metrics.get("dv_log_normalizer", state.log_normalizer),
        )
        if skip_non_finite:
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
            metrics["skipped"] = ~finite
            kept = replace(state, step=new.step)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        return lax.with_sharding_constraint(new, state_shardings(mesh, settings, new)), metrics

    return jax.jit(
        step,
        in_shardings=(None, batch_sharding(mesh, parts=learner.parts > 1)),
        out_shardings=(None, replicated(mesh)),
        donate_argnums=0,
    )


@dataclass(frozen=True)
class Compiled:
    """A training step after compilation, and what it costs."""

    step: TrainStep
    seconds: float
    """That it took to compile."""
    flops: float
    """Of its products, on each device; see `flops.flops`."""
    temporaries: int
    """Bytes that it needs on a device beside its arguments."""


def compiled(step: TrainStep, state: TrainState, batch: Batch, mesh: Mesh) -> Compiled:
    """`step` for such a state and batch, compiled now."""
    start = time.perf_counter()
    traced = step.trace(state, batch)  # type: ignore[attr-defined]
    program = traced.lower().compile()
    analysis = program.memory_analysis()
    return Compiled(
        program,
        time.perf_counter() - start,
        flops(traced) / mesh.size,
        analysis.temp_size_in_bytes if analysis else 0,
    )


def use_compilation_cache() -> None:
    """Programs for accelerators are compiled once, and read from the user's cache then.

    Those for CPUs are not: one that was read back can hang in its exchange between devices
    (jaxlib 0.10.2).
    """
    if jax.default_backend() != "cpu" and jax.config.read("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _jittered(batch: Batch) -> Batch:
    """The batch with the changes of its colours made, once for all that reads its images."""
    if batch.changes is None:
        return batch
    second = batch.second
    if second is not None:
        second = replace(second, image=color_jitter(second.image, batch.changes[..., 1, :, :]))
    image = color_jitter(batch.image, batch.changes[..., 0, :, :])
    return replace(batch, image=image, second=second, changes=None)


def _new_target(
    learner: Learner, mesh: Mesh, state: TrainState, params: Any, pairs: Pairs | None
) -> Target | None:
    """Momentum encoders a step further, and this step's embeddings in the memory."""
    if state.target is None or pairs is None:
        return state.target
    config = learner.negatives
    slow = state.target.params
    if slow is not None:
        slow = optax.incremental_update(params, slow, 1 - config.momentum)
    _, key = step_keys(learner.seed, state.step)
    key = jax.random.fold_in(key, 30)
    return Target(slow, remember(config, learner.batch, mesh, key, state.step, pairs))


@dataclass(frozen=True)
class EncodeFns:
    """A trained state as functions of arrays: all that evaluators and apps know of a model.

    Batches are split over the mesh; results are whole on every device.
    """

    image: Callable[[Any], Array]  # [B, H, W, 3] uint8 -> [B, D]
    text: Callable[[Any, Any], Array]  # [B, L] int32, [B, L] bool -> [B, D]
    pairs: Callable[[Any, Any], Array]  # [B, D], [B, D] -> [B]
    matrix: Callable[[Any, Any], Array]  # [N, D], [M, D] -> [N, M]
    image_features: Callable[[Any], Array]  # [B, H, W, 3] uint8 -> [B, F], before the critic
    counts: Callable[..., tuple[Array, Array, Array]]  # `score_counts.block_counts`
    heat_maps: Callable[[Any, Any, Any], Array]  # image and text inputs -> [B, h, w], `heat_maps`


def make_encode_fns(model: Model, mesh: Mesh) -> Callable[[Any, Any], EncodeFns]:
    """``bind(params, model_state) -> EncodeFns``; compiled once, whatever the parameters."""
    rows, whole = batch_sharding(mesh), replicated(mesh)  # parameters lie as they lie
    image = jax.jit(model.encode_image, in_shardings=(None, None, rows), out_shardings=whole)
    text = jax.jit(model.encode_text, in_shardings=(None, None, rows, rows), out_shardings=whole)
    features = jax.jit(model.image_features, in_shardings=(None, None, rows), out_shardings=whole)
    heat = jax.jit(
        partial(heat_maps, model),
        in_shardings=(None, None, rows, rows, rows),
        out_shardings=whole,
    )
    pairs = jax.jit(lambda params, i, t: model.critic(params).pairs(i, t))
    matrix = jax.jit(lambda params, i, t: model.critic(params).matrix(i, t))

    counts = jax.jit(
        lambda params, *arrays: block_counts(model.critic(params).matrix, *arrays),
        in_shardings=(None, rows, whole, rows, whole, whole, rows),
        out_shardings=whole,
    )

    def counted(params: Any, images: Any, texts: Any, *others: Any) -> tuple[Array, Array, Array]:
        numbers, owner, text_limits, image_limits = others
        count, missing = len(images), -len(images) % batch_shards(mesh)
        if missing:
            images = np.pad(images, [(0, missing), (0, 0)])
            numbers = np.pad(numbers, (0, missing), constant_values=-1)
            image_limits = np.pad(image_limits, [(0, missing), (0, 0)])
        images, numbers, image_limits = (
            spread_rows(mesh, array) for array in (images, numbers, image_limits)
        )
        own, above_text, above_image = counts(
            params, images, texts, numbers, owner, text_limits, image_limits
        )
        return own, above_text, above_image[:count]

    def bind(params: Any, model_state: Any) -> EncodeFns:
        return EncodeFns(
            image=any_rows(mesh, lambda x: image(params, model_state, x)),
            text=any_rows(mesh, lambda tokens, mask: text(params, model_state, tokens, mask)),
            pairs=lambda i, t: pairs(params, i, t),
            matrix=lambda i, t: matrix(params, i, t),
            image_features=any_rows(mesh, lambda x: features(params, model_state, x)),
            counts=lambda *arrays: counted(params, *arrays),
            heat_maps=any_rows(mesh, lambda *inputs: heat(params, model_state, *inputs)),
        )

    return bind
