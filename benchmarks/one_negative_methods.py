"""The rows of `one_negative`: samplers of the library, and one that is tried here first."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.negatives import (
    Critic,
    Pairs,
    build_sampler,
    init_memory,
    remember,
    uses_memory,
)
from clip_lite_jax.negatives.pairs import (
    TEXT,
    Rows,
    anchors_of,
    every_pair,
    score_matrix,
    score_pairs,
    sides_of,
)
from clip_lite_jax.objectives import Scores, build_objective
from clip_lite_jax.sharding import build_mesh

SIDES = sides_of("both")


@flax.struct.dataclass
class Visits:
    """Which examples and captions a step sees; the leading dimension of all may be steps."""

    step: Any  # [] int32
    example: Any  # [B] int32
    caption: Any  # [B] int32


Embed = Callable[[Any, Any], Pairs]
"""Examples and captions ``[B]`` → pairs, with the parameters of this step."""


@dataclass(frozen=True)
class Recipe:
    """An objective with its negatives."""

    label: str
    objective: str
    negatives: NegativesConfig
    log_bias: bool = False
    """The bias of the critic starts at minus the log of the candidates of a pair, and not at 0."""
    embeds_again: bool = False
    """A drawn negative is embedded again; see `Reembedding`."""

    def candidates(self, batch: int) -> int:
        """Candidates of a pair and side, groups aside."""
        return batch - 1 + (self.negatives.memory if uses_memory(self.negatives) else 0)

    def bias(self, batch: int) -> float:
        return -math.log(self.candidates(batch)) if self.log_bias else 0.0

    def scored(self, batch: int) -> int:
        """Scores of a step, with and without gradient."""
        if self.negatives.name == "all":
            return batch * batch
        if self.negatives.name == "shuffle":
            return 3 * batch
        return batch + 2 * batch * (self.candidates(batch) + 1) + 2 * batch

    def back_propagated(self, batch: int) -> int:
        return batch * batch if self.negatives.name == "all" else 3 * batch


class FromLibrary:
    """Objective, sampler and memory as `train_step` uses them, on one device."""

    def __init__(self, recipe: Recipe, batch: int) -> None:
        self.config, self.batch = recipe.negatives, batch
        self.mesh = build_mesh(jax.devices()[:1])
        self.objective = build_objective(recipe.objective)
        self.sampler = build_sampler(self.config, batch, self.mesh)

    def loss(
        self, key: Array, visit: Visits, pairs: Pairs, critic: Critic, memory: Any, embed: Embed
    ) -> Array:
        del embed
        pairs = pairs.replace(memory=memory)  # type: ignore[attr-defined]
        return self.objective(self.sampler(key, visit.step, pairs, critic).scores)[0]

    def empty(self, pairs: Pairs, visit: Visits) -> Any:
        del visit
        if uses_memory(self.config):
            return init_memory(self.config, self.batch, self.mesh, pairs)
        return None

    def remember(self, key: Array, visit: Visits, pairs: Pairs, memory: Any) -> Any:
        if not uses_memory(self.config):
            return None
        pairs = pairs.replace(memory=memory)  # type: ignore[attr-defined]
        return remember(self.config, self.batch, self.mesh, key, visit.step, pairs)


# --- Prototype ------------------------------------------------------------------------------------


@flax.struct.dataclass
class Kept:
    """Embeddings with what they were made of; ``[M, ...]``."""

    image: Array
    text: Array
    group: Array
    valid: Array
    example: Array
    caption: Array


class Reembedding:
    """One negative drawn ∝ exp(beta · T) of the batch and of earlier steps, then embedded again.

    Old embeddings only choose; what is scored with gradient is a negative of today's parameters,
    so that the critic cannot tell a negative by its age.
    """

    def __init__(self, recipe: Recipe, batch: int) -> None:
        self.objective, self.batch = build_objective(recipe.objective), batch
        self.beta = recipe.negatives.beta
        self.slots = max(recipe.negatives.memory // batch, 1)

    def loss(
        self, key: Array, visit: Visits, pairs: Pairs, critic: Critic, memory: Kept, embed: Embed
    ) -> Array:
        pool = jax.tree.map(
            lambda new, old: jnp.concatenate([new, old]), _kept(pairs, visit), memory
        )
        index = jnp.arange(len(pool.valid), dtype=jnp.int32)
        negative, valid = [], []
        for side in SIDES:
            anchors = anchors_of(pairs, side)
            rows = Rows(pool.text if side == TEXT else pool.image, pool.group, pool.valid, index)
            frozen = lax.stop_gradient((critic, anchors.embedding, rows.embedding))
            scores = score_matrix(frozen[0], side, *frozen[1:])
            allowed = every_pair(anchors, rows)
            slot = draw(jax.random.fold_in(key, side), self.beta * scores, allowed)
            fresh = embed(pool.example[slot], pool.caption[slot])
            drawn = fresh.text if side == TEXT else fresh.image
            negative.append(score_pairs(critic, side, anchors.embedding, drawn))
            valid.append(jnp.any(allowed, -1))
        scores = jnp.stack(negative)[..., None]
        return self.objective(
            Scores(
                positive=critic.pairs(pairs.image, pairs.text),
                negative=scores,
                valid=jnp.stack(valid)[..., None],
                log_weight=jnp.zeros_like(scores),
                positive_valid=pairs.valid,
            )
        )[0]

    def empty(self, pairs: Pairs, visit: Visits) -> Kept:
        def zeros(x: Array) -> Array:
            return jnp.zeros((self.slots * len(x), *x.shape[1:]), x.dtype)

        return jax.tree.map(zeros, _kept(pairs, visit))

    def remember(self, key: Array, visit: Visits, pairs: Pairs, memory: Kept) -> Kept:
        del key
        first = visit.step % self.slots * self.batch

        def write(old: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(old, new, first, 0)

        return jax.tree.map(write, memory, _kept(pairs, visit))


def _kept(pairs: Pairs, visit: Visits) -> Kept:
    ids = jnp.asarray(visit.example), jnp.asarray(visit.caption)
    return Kept(pairs.image, pairs.text, pairs.group, pairs.valid, *ids)


def draw(key: Array, log_weight: Array, allowed: Array) -> Array:
    """One column ``[B]`` for each row of ``[B, M]``, in proportion to the weights allowed."""
    log_weight = jnp.where(allowed, log_weight, -jnp.inf)
    largest = jnp.max(log_weight, -1, keepdims=True, where=allowed, initial=-1e30)
    mass = jnp.cumsum(jnp.exp(log_weight - largest), -1)
    # At most the whole mass, and above 0: a column without weight is never drawn.
    point = mass[:, -1:] * (1 - jax.random.uniform(key, (len(mass), 1)))
    return jnp.minimum(jnp.sum(mass < point, -1), mass.shape[1] - 1)


# --- Rows -----------------------------------------------------------------------------------------


def _both_sides(name: str, **options: Any) -> NegativesConfig:
    return NegativesConfig(name=name, sides="both", lanes=1, chunk=2048, **options)


RECIPES = {
    "infonce": Recipe("InfoNCE, all", "infonce", _both_sides("all")),
    "sigmoid": Recipe("sigmoid, all", "sigmoid", _both_sides("all"), log_bias=True),
    "jsd_shuffle": Recipe("JSD, one shuffled", "jsd", _both_sides("shuffle")),
    "jsd_hard": Recipe("JSD, one hard", "jsd", _both_sides("hard", pool="block")),
    "ranking_hard": Recipe("ranking, one hard", "infonce", _both_sides("hard", pool="block")),
    "sigmoid_importance": Recipe(
        "sigmoid, one by importance",
        "sigmoid",
        _both_sides("importance", pool="block"),
        log_bias=True,
    ),
    "jsd_hard_memory": Recipe(
        "JSD, one hard of batch and memory", "jsd", _both_sides("hard", pool="memory")
    ),
    "reembedded_ranking": Recipe(
        "ranking, one hard, embedded again",
        "infonce",
        _both_sides("hard", pool="memory"),
        embeds_again=True,
    ),
}
