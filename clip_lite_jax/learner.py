"""What a step learns from a batch: its loss and the gradient of it, whole or in parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from clip_lite_jax.batch import Batch
from clip_lite_jax.combinations import check_combination, draws_within_parts
from clip_lite_jax.config import NegativesConfig, ObjectiveConfig
from clip_lite_jax.gathering import gathered
from clip_lite_jax.models import Embedded, Model
from clip_lite_jax.negatives import (
    Pairs,
    Sampler,
    build_sampler,
    uses_memory,
    uses_momentum_encoder,
)
from clip_lite_jax.objectives import (
    STREAMED,
    Objective,
    Scores,
    Totals,
    build_objective,
    prior_matching,
)
from clip_lite_jax.train_state import TrainState, step_keys


@dataclass(frozen=True)
class Learner:
    """The loss of a model on a batch; `build_learner` makes one that is consistent."""

    model: Model
    objective: Objective
    sampler: Sampler
    self_sampler: Sampler
    terms: ObjectiveConfig
    negatives: NegativesConfig
    batch: int
    parts: int
    within_parts: bool
    seed: int


@flax.struct.dataclass
class Learned:
    """What else comes of a loss."""

    metrics: dict[str, Array]
    model_state: Any
    pairs: Pairs | None  # of the whole batch; None where negatives are drawn within parts
    index: Any  # rows of the negatives, see `negatives.Drawn`


GradientFn = Callable[[TrainState, Batch], tuple[tuple[Array, Learned], Any]]
"""``(state, batch) -> ((loss [], Learned), gradient of the parameters)``"""


def build_learner(
    model: Model,
    objective: ObjectiveConfig,
    negatives: NegativesConfig,
    batch: int,
    mesh: Mesh,
    seed: int,
    parts: int = 1,
) -> Learner:
    """The learner for global batches of `batch` rows that are encoded in `parts`.

    Raises:
      ConfigError: what does not go together, unknown names, or sizes that do not divide.
    """
    check_combination(objective, negatives, batch, parts)
    within = parts > 1 and draws_within_parts(objective, negatives)
    rows = batch // parts if within else batch
    bound = STREAMED.get(objective.name)
    without_memory = replace(negatives, name="shuffle") if uses_memory(negatives) else negatives
    return Learner(
        model=model,
        objective=build_objective(objective.name, **objective.options),
        sampler=build_sampler(negatives, rows, mesh, bound),
        self_sampler=build_sampler(without_memory, rows, mesh, bound),
        terms=objective,
        negatives=negatives,
        batch=batch,
        parts=parts,
        within_parts=within,
        seed=seed,
    )


def make_gradient(learner: Learner) -> GradientFn:
    """The loss and its gradient; see `_in_one_pass` and `_in_two_passes` for parts."""
    if learner.parts == 1:
        gradient = _of_the_whole(learner)
    else:
        gradient = _in_one_pass(learner) if learner.within_parts else _in_two_passes(learner)

    def with_spreads(state: TrainState, batch: Batch) -> tuple[tuple[Array, Learned], Any]:
        (value, learned), grads = gradient(state, batch)
        return (value, replace(learned, metrics=_spreads(learned.metrics))), grads

    return with_spreads


def _of_the_whole(learner: Learner) -> GradientFn:
    def gradient(state: TrainState, batch: Batch) -> tuple[tuple[Array, Learned], Any]:
        rows = jnp.arange(learner.batch, dtype=jnp.int32)
        return _gradient(learner, state, batch, 0, rows)

    return gradient


def _gradient(
    learner: Learner,
    state: TrainState,
    batch: Batch,
    part: Array | int,
    row: Array,
    totals: dict[str, Totals] | None = None,
) -> tuple[tuple[Array, Learned], Any]:
    """``((loss, Learned), gradient)`` of rows that draw their negatives among themselves."""

    def loss(params: Any) -> tuple[Array, Learned]:
        params = gathered(params)
        embedded, keys, model_state = _embed(learner, params, state, batch, part)
        labels = (batch.group, batch.valid, row)
        inputs = (batch.image, (batch.tokens, batch.mask)) if learner.negatives.reembed else None
        value, learned = _loss(learner, params, state, embedded, keys, labels, totals, inputs)
        return value, replace(learned, model_state=model_state)

    return jax.value_and_grad(loss, has_aux=True)(state.params)


def _in_one_pass(learner: Learner) -> GradientFn:
    """Negatives stay within a part, so the losses of the parts add up to that of the batch.

    That batch has the same block-diagonal negatives: `negatives.block` is a part.  Sums and counts
    are kept apart, the counts found first: which negatives are valid does not depend on scores.
    """
    rows = learner.batch // learner.parts

    def gradient(state: TrainState, batch: Batch) -> tuple[tuple[Array, Learned], Any]:
        row = jnp.arange(learner.batch, dtype=jnp.int32).reshape(learner.parts, rows)
        totals = _count(learner, state, batch, row)

        def of_part(model_state: Any, part: Array, batch: Batch, row: Array) -> Any:
            current = replace(state, model_state=model_state)
            (value, learned), grads = _gradient(learner, current, batch, part, row, totals)
            return (value, learned.metrics, grads), (learned.model_state, learned.index)

        def add(carry: tuple[Any, Any], part: tuple[Array, Batch, Array]) -> Any:
            model_state, so_far = carry
            new, (model_state, index) = of_part(model_state, *part)
            return (model_state, jax.tree.map(jnp.add, so_far, new)), index

        given = (jnp.arange(learner.parts), batch, row)
        first = jax.tree.map(lambda x: x[0], given)
        shapes = jax.eval_shape(of_part, state.model_state, *first)[0]
        start = jax.tree.map(jnp.zeros_like, shapes)
        carry, index = lax.scan(add, (state.model_state, start), given)
        model_state, (value, metrics, grads) = carry
        return (value, Learned(metrics, model_state, None, index)), grads

    return gradient


def _count(learner: Learner, state: TrainState, batch: Batch, row: Array) -> dict[str, Totals]:
    """Valid pairs and negatives of the whole batch, for every term that draws negatives."""
    samplers = dict.fromkeys(_self_terms(learner), learner.self_sampler)
    samplers["bound"] = learner.sampler
    keys = _draw_keys(learner, state)
    return {
        name: _count_draw(sampler, keys[name], learner.parts, state.step, batch, row)
        for name, sampler in samplers.items()
    }


def _count_draw(
    sampler: Sampler, key: Array, parts: int, step: Array, batch: Batch, row: Array
) -> Totals:
    """Of one draw, by a critic that scores nothing: what is valid does not depend on scores."""

    def of_part(batch: Batch, row: Array) -> tuple[Array, Array]:
        blank = jnp.zeros((*row.shape, 1), jnp.float32)
        pairs = Pairs(blank, blank, batch.group, batch.valid, row)
        scores = sampler(key, step, pairs, _Indifferent()).scores
        assert isinstance(scores, Scores)
        negatives = jnp.sum(jnp.where(scores.valid, scores.multiplicity, 0.0))
        return jnp.sum(batch.valid), negatives

    pairs, negatives = lax.map(lambda part: of_part(*part), (batch, row))
    return Totals(jnp.sum(pairs), jnp.sum(negatives), parts)


def _draw_keys(learner: Learner, state: TrainState) -> dict[str, Array]:
    """The keys of the draws of a step, by term of the loss."""
    _, key = step_keys(learner.seed, state.step)
    fold = jax.random.fold_in
    return {"bound": key, "visual": fold(key, 10), "textual": fold(key, 11)}


def _direction(embeddings: Array, valid: Array, count: Array) -> Array:
    """The sum over valid rows of the unit vectors of embeddings ``[B, D]``, by `count`: ``[D]``."""
    x = lax.stop_gradient(embeddings)
    units = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return jnp.sum(jnp.where(valid[:, None], units, 0), axis=0) / jnp.maximum(count, 1)


def _spreads(metrics: dict[str, Array]) -> dict[str, Array]:
    """Metrics with, for each mean direction of the batch, how far directions lie apart.

    1 − |mean of the unit vectors|², their variance: 0 if all are one, 1 if they point all ways.
    """
    metrics = dict(metrics)
    for side in ("image", "text"):
        metrics[f"{side}_spread"] = 1 - jnp.sum(metrics.pop(f"{side}_direction") ** 2)
    return metrics


def _self_terms(learner: Learner) -> dict[str, float]:
    """Weights of the self-supervised terms that are on."""
    terms = learner.terms
    weights = {"visual": terms.visual_weight, "textual": terms.textual_weight}
    return {name: weight for name, weight in weights.items() if weight}


@flax.struct.dataclass
class _Indifferent:
    def pairs(self, image: Any, text: Any) -> Array:
        return jnp.sum(image * text, axis=-1)

    def matrix(self, image: Any, text: Any) -> Array:
        return jnp.zeros((*image.shape[:-1], text.shape[-2]), image.dtype)


def _in_two_passes(learner: Learner) -> GradientFn:
    """The parts are encoded, the loss of all embeddings taken, and the parts encoded once more.

    Equal to the whole batch for any loss, as long as no layer mixes examples (BatchNorm).  Row
    i · parts + m of the batch is row i of part m: that leaves every row on its device.
    Source: GradCache (arXiv 2101.06983), section 3.
    """

    def joined(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)

    def gradient(state: TrainState, batch: Batch) -> tuple[tuple[Array, Learned], Any]:
        numbers = jnp.arange(learner.parts)

        def first_pass(model_state: Any, given: tuple[Array, Batch]) -> tuple[Any, Any]:
            current = replace(state, model_state=model_state)
            params = gathered(state.params)
            embedded, keys, model_state = _embed(learner, params, current, given[1], given[0])
            return model_state, (embedded, keys)

        model_state, (embedded, keys) = lax.scan(first_pass, state.model_state, (numbers, batch))
        rows = jnp.arange(learner.batch, dtype=jnp.int32)
        labels = (*joined((batch.group, batch.valid)), rows)

        def head(params: Any, embedded: Embedded) -> tuple[Array, Learned]:
            return _loss(learner, gathered(params), state, joined(embedded), joined(keys), labels)

        function = jax.value_and_grad(head, argnums=(0, 1), has_aux=True)
        (value, learned), (grads, pulls) = function(state.params, embedded)

        def second_pass(grads: Any, given: tuple[Array, Batch, Embedded]) -> tuple[Any, None]:
            part, part_batch, pull = given

            def embed(params: Any) -> Embedded:
                return _embed(learner, gathered(params), state, part_batch, part)[0]

            _, back = jax.vjp(embed, state.params)
            return jax.tree.map(jnp.add, grads, back(pull)[0]), None

        grads, _ = lax.scan(second_pass, grads, (numbers, batch, pulls))
        return (value, replace(learned, model_state=model_state)), grads

    return gradient


# --- The loss -------------------------------------------------------------------------------------

Keys = tuple[Any, Any]
"""Embeddings ``[B, D]`` of images and texts by the momentum encoders, or None."""
Labels = tuple[Array, Array, Array]
"""Groups ``[B, G]``, validity ``[B]`` and row in the whole batch ``[B]``."""


def _embed(
    learner: Learner, params: Any, state: TrainState, batch: Batch, part: Array | int
) -> tuple[Embedded, Keys, Any]:
    """The embedded rows of a part, their keys, and the new model state."""
    dropout_key, _ = step_keys(learner.seed, state.step)
    dropout_key = jax.random.fold_in(dropout_key, part)
    model = learner.model
    embedded, model_state = model.embed(
        params, state.model_state, batch.inputs, dropout_key, batch.second
    )
    if not uses_momentum_encoder(learner.negatives) or state.target is None:
        return embedded, (None, None), model_state
    slow = state.target.params
    keys = (
        model.encode_image(slow, state.model_state, batch.image),
        model.encode_text(slow, state.model_state, batch.tokens, batch.mask),
    )
    return embedded, lax.stop_gradient(keys), model_state


def _loss(
    learner: Learner,
    params: Any,
    state: TrainState,
    embedded: Embedded,
    keys: Keys,
    labels: Labels,
    totals: dict[str, Totals] | None = None,
    inputs: Any = None,
) -> tuple[Array, Learned]:
    """The loss [] of embedded rows: the bound, and the terms beside it.

    `totals` by term where the rows are a part of a batch; `inputs` as in `Pairs`.
    """
    keys_of, totals = _draw_keys(learner, state), totals or {}
    group, valid, row = labels
    memory = None if state.target is None else state.target.memory
    key_image, key_text = keys
    pairs = Pairs(
        embedded.image, embedded.text, group, valid, row, key_image, key_text, memory, inputs
    )
    model, critic = learner.model, learner.model.critic(params)
    if inputs is not None:
        dropout_key = jax.random.fold_in(step_keys(learner.seed, state.step)[0], 1)  # 0: the pairs
        critic = model.embedding_critic(params, state.model_state, dropout_key)
    drawn = learner.sampler(keys_of["bound"], state.step, pairs, critic)
    scores = replace(drawn.scores, totals=totals.get("bound"))
    if isinstance(scores, Scores):
        scores = replace(scores, log_normalizer=state.log_normalizer)
    value, metrics = learner.objective(scores)
    terms = learner.terms
    count = totals["bound"].pairs if totals else jnp.sum(valid)
    metrics = metrics | {
        "image_direction": _direction(embedded.image, valid, count),
        "text_direction": _direction(embedded.text, valid, count),
        "bound_loss": value,
    }

    twice = {"visual": embedded.views, "textual": embedded.captions}
    for name, weight in _self_terms(learner).items():
        both = twice[name]
        if both is None:
            raise ValueError(f"the {name} term needs Batch.second: another view and caption")
        views = Pairs(both[0], both[1], group, valid, row)
        critic = model.critic(params, f"{name}_critic")
        scores = learner.self_sampler(keys_of[name], state.step, views, critic).scores
        own, _ = learner.objective(replace(scores, totals=totals.get(name)))
        metrics = metrics | {f"{name}_loss": own}
        value = value + weight * own

    if terms.prior_weight:
        prior = jnp.zeros((), value.dtype)
        for number, name in enumerate(terms.prior_of):
            discriminator = partial(model.prior_logits, prior=name)
            features = getattr(embedded, f"{name}_features")
            # By the first row: every part of a batch draws its own.
            prior_key = jax.random.fold_in(keys_of["bound"], 20 + number)
            prior_key = jax.random.fold_in(prior_key, row[0])
            prior += prior_matching(
                discriminator,
                params,
                features,
                valid,
                prior_key,
                terms.prior,
                totals.get("bound"),
            )
        metrics = metrics | {"prior_loss": prior}
        value = (1 - terms.prior_weight) * value + terms.prior_weight * prior
    return value, Learned(metrics, None, pairs, drawn.index)
