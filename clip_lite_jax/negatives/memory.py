"""Negatives that were kept from earlier steps: MoCo's queue and cross-batch memory.

Every lane keeps the rows that it was dealt, first in, first out, so that nothing but one deal of
the batch crosses the network.  What is kept has no gradient.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.negatives.layout import Layout, deal, from_lanes, layout_of, to_lanes
from clip_lite_jax.negatives.pairs import (
    TEXT,
    Critic,
    Drawn,
    Memory,
    Pairs,
    Rows,
    Sampler,
    anchors_of,
    candidates_of,
    every_pair,
    remembered_of,
    score_matrix,
    sides_of,
)
from clip_lite_jax.objectives import Scores
from clip_lite_jax.sharding import batch_shards

FROM_A_POOL = ("hard", "importance", "k")
"""Negatives for which `NegativesConfig.pool` says where they are drawn from."""


def uses_memory(config: NegativesConfig) -> bool:
    """Whether a step needs embeddings of earlier ones."""
    from_memory = config.name in FROM_A_POOL and config.pool == "memory"
    return config.name in ("queue", "memory") or from_memory


def uses_momentum_encoder(config: NegativesConfig) -> bool:
    """Whether those are made by a slow copy of the encoders."""
    return config.name == "queue"


def build_queue(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """All `memory` keys of earlier steps that a momentum encoder made, as in MoCo.

    The pair itself is scored against keys too, T(image, key of its text) on the text side, so that
    the critic cannot tell pairs by the encoder.  With both sides the result has one side of 2 B
    rows, image and text of a pair in turn: so every row stays on the device of its pair, where a
    list of all images before all texts would move half of them.  The first step has no negatives.

    Source: MoCo (arXiv 1911.05722), algorithm 1.
    """
    layout = memory_layout(config, batch, mesh)

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del key, step
        if pairs.key_image is None or pairs.key_text is None:
            raise ValueError("queue needs Pairs.key_image and key_text, of a momentum encoder")
        by_side = {
            TEXT: critic.pairs(pairs.image, pairs.key_text),
            1 - TEXT: critic.pairs(pairs.key_image, pairs.text),
        }
        sides = sides_of(config.sides)
        parts = [_remembered_scores(pairs, critic, side, layout) for side in sides]
        negative, valid, index = (_in_turn(x)[None] for x in zip(*parts, strict=True))
        scores = Scores(
            positive=_in_turn([by_side[side] for side in sides]),
            negative=negative,  # [1, S B, M]
            valid=valid,
            log_weight=jnp.zeros_like(negative),
            positive_valid=_in_turn([pairs.valid] * len(sides)),
        )
        return Drawn(scores, index)

    return sample


def _in_turn(sides: Sequence[Array]) -> Array:
    """``[B, ...]`` of each side -> ``[S B, ...]``, the sides of a row beside each other."""
    return from_lanes(jnp.stack(sides, axis=1))


def build_memory(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """The rows that a pair's lane was dealt, and `memory` embeddings of earlier steps.

    Source: cross-batch memory (arXiv 1912.06798), algorithm 1.
    """
    layout = memory_layout(config, batch, mesh)

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del step
        parts = []
        for side in sides_of(config.sides):
            side_key = jax.random.fold_in(key, side)
            dealt = deal(side_key, candidates_of(pairs, side), pairs.rows, layout, mesh)
            now = _lane_scores(pairs, critic, side, layout, dealt)
            before = _remembered_scores(pairs, critic, side, layout)
            parts.append([jnp.concatenate(both, axis=-1) for both in zip(now, before, strict=True)])
        negative, valid, index = (jnp.stack(x) for x in zip(*parts, strict=True))
        scores = Scores(
            positive=critic.pairs(pairs.image, pairs.text),
            negative=negative,  # [S, B, rows of a lane + M]
            valid=valid,
            log_weight=jnp.zeros_like(negative),
            positive_valid=pairs.valid,
        )
        return Drawn(scores, index)

    return sample


def _lane_scores(
    pairs: Pairs, critic: Critic, side: int, layout: Layout, candidates: Rows
) -> tuple[Array, Array, Array]:
    """Scores, validity and index ``[B, M]`` of the candidates ``[lanes, M, ...]`` of each lane."""
    anchors = to_lanes(anchors_of(pairs, side), layout)
    scores = score_matrix(critic, side, anchors.embedding, candidates.embedding)
    index = jnp.broadcast_to(candidates.index[:, None], scores.shape)
    return from_lanes((scores, every_pair(anchors, candidates), index))


def _remembered_scores(
    pairs: Pairs, critic: Critic, side: int, layout: Layout
) -> tuple[Array, Array, Array]:
    return _lane_scores(pairs, critic, side, layout, remembered_of(pairs, side))


# --- Keeping --------------------------------------------------------------------------------------


def memory_layout(config: NegativesConfig, batch: int, mesh: Mesh) -> Layout:
    """The lanes of the memory.

    Raises:
      ConfigError: a memory that a lane's rows do not fill evenly.
    """
    layout = layout_of(config, batch, batch_shards(mesh))
    if config.memory % layout.rows:
        raise ConfigError(
            f"negatives.memory={config.memory}: each step brings {layout.rows} rows to a lane; set "
            f"it to a multiple of {layout.rows}"
        )
    return layout


def init_memory(config: NegativesConfig, batch: int, mesh: Mesh, pairs: Pairs) -> Memory:
    """An empty memory for pairs of these shapes and types, `inputs` included for `reembed`."""
    layout = memory_layout(config, batch, mesh)

    def empty(x: Any) -> Array:
        return jnp.zeros((layout.total_lanes, config.memory, *x.shape[1:]), x.dtype)

    return jax.tree.map(empty, _kept(config, pairs))


@jax.named_scope("negatives")
def remember(
    config: NegativesConfig, batch: int, mesh: Mesh, key: Array, step: Array, pairs: Pairs
) -> Memory:
    """The memory of `pairs` with this step's rows in place of the oldest ones.

    Keys of a momentum encoder are kept where there are any, otherwise the embeddings themselves.
    """
    layout = memory_layout(config, batch, mesh)
    new = deal(key, _kept(config, pairs), pairs.rows, layout, mesh)
    slot = step % (config.memory // layout.rows) * layout.rows

    def write(old: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=1)

    return lax.stop_gradient(jax.tree.map(write, pairs.memory, new))


def _kept(config: NegativesConfig, pairs: Pairs) -> Memory:
    """What of a batch goes into the memory: ``[B, ...]``."""
    image = pairs.image if pairs.key_image is None else pairs.key_image
    text = pairs.text if pairs.key_text is None else pairs.key_text
    inputs = pairs.inputs if config.reembed else None
    return Memory(image, text, pairs.group, pairs.valid, inputs)
