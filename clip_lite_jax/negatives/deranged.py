"""Negatives that nothing is known about: the next row, or a random one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.negatives.layout import (
    compose,
    exchange,
    from_lanes,
    inverse,
    lane_keys,
    layout_of,
    per_shard,
    random_orders,
    ring_of,
)
from clip_lite_jax.negatives.pairs import (
    Critic,
    Drawn,
    Pairs,
    Rows,
    Sampler,
    candidates_of,
    drawn_scores,
    expand,
    sides_of,
)
from clip_lite_jax.sharding import batch_shards, batch_spec


def build_roll(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """The negative of pair i is row i + 1 of its block.  One row crosses each device boundary.

    A derangement with a single cycle; as random as the order of the batch, which the input pipeline
    draws afresh every epoch.
    """
    ring = ring_of(config, batch, batch_shards(mesh))

    def local(rows: Rows) -> Rows:  # [B / shards, ...]
        blocks = ring.split(rows)
        first_of_next = ring.hop(jax.tree.map(lambda x: x[:, :1], blocks))

        def rolled(x: Array, first: Array) -> Array:
            return jnp.concatenate([x[:, 1:], first], axis=1)

        return from_lanes(jax.tree.map(rolled, blocks, first_of_next))

    roll = per_shard(local, mesh, (batch_spec(),))

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del key, step
        drawn = [expand(roll(candidates_of(pairs, side))) for side in sides_of(config.sides)]
        return drawn_scores(pairs, critic, config.sides, drawn)

    return sample


def build_shuffle(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """One uniformly shuffled negative per pair: a random derangement of every block.

    Each lane sends a random `1 / lanes` of its rows to each lane of its block and deals what it
    receives to its rows along a random cycle, so that no row keeps its own partner.  Another row of
    the same lane is drawn with probability 1 / (lanes (rows - 1)), a row of another lane with
    1 / (lanes rows); with one lane it is a uniformly random cyclic permutation.
    """
    layout = layout_of(config, batch, batch_shards(mesh))

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del step

        def negatives_of(side: int) -> Any:
            send_key, cycle_key = jax.random.split(jax.random.fold_in(key, side))
            send = random_orders(lane_keys(send_key, pairs.rows, layout), layout)
            order = random_orders(lane_keys(cycle_key, pairs.rows, layout), layout)
            # Were row q to take the row that arrived in slot inverse(send)[q], it would get its own
            # row back whenever that slot came from its own lane.  One step along a random cycle
            # over the rows of the lane makes that impossible, and treats all other rows alike.
            cycle = compose(jnp.roll(order, -1, axis=-1), inverse(order))
            take = compose(inverse(send), cycle)
            return expand(exchange(candidates_of(pairs, side), send, take, layout, mesh))

        drawn = [negatives_of(side) for side in sides_of(config.sides)]
        return drawn_scores(pairs, critic, config.sides, drawn)

    return sample
