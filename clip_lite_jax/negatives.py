"""Which text (or image) is the negative of which pair, across all devices.

A sampler sees the embeddings of the global batch, sharded over devices by rows, and returns
`Drawn`: the critic scores of every pair and of its negatives.  Whatever is random depends on the
step's key and on numbers of the configuration, never on how many devices there are.

The exchange between devices is written out (`shard_map`, `ppermute`, `all_to_all`) because the
partitioner would turn a gather by a random permutation into an all-gather of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.objectives import Scores
from clip_lite_jax.sharding import BATCH_AXES, batch_shards, batch_spec


class Critic(Protocol):
    """Scores of embedding pairs; see `models.critics`."""

    def pairs(self, image: Any, text: Any) -> Array:
        """``[..., D], [..., D] -> [...]``: row i of one with row i of the other."""
        ...

    def matrix(self, image: Any, text: Any) -> Array:
        """``[..., N, D], [..., M, D] -> [..., N, M]``: every row with every row."""
        ...


@flax.struct.dataclass
class Pairs:
    """The embedded global batch; arrays or pytrees of arrays ``[B, ...]``."""

    image: Any  # [B, D]
    text: Any  # [B, D]
    group: Array  # [B, G] int32; two rows that agree in any column are not negatives of each other
    valid: Array  # [B] bool; False marks the slot of an unusable example


@flax.struct.dataclass
class Drawn:
    scores: Scores
    index: Array  # [S, B, K] int32, global row of each negative


Sampler = Callable[[Array, Array, Pairs, Critic], Drawn]
"""``(key, step [], pairs, critic) -> Drawn``"""


@dataclass(frozen=True)
class Layout:
    """Logical division of the batch: blocks of lanes of rows, all numbers of the configuration."""

    batch: int
    block: int
    lanes: int

    @property
    def rows(self) -> int:
        """Rows of one lane."""
        return self.block // self.lanes

    @property
    def total_lanes(self) -> int:
        return self.batch // self.rows


def layout_of(config: NegativesConfig, batch: int, shards: int) -> Layout:
    """The layout for a batch over `shards` devices.

    Raises:
      ConfigError: sizes that do not divide; the message says which to change.
    """
    block = config.block or batch
    fitting = (n for n in (8, 4, 2) if block % n**2 == 0 and block >= 2 * n)
    layout = Layout(batch, block, config.lanes or next(fitting, 1))
    what = f"negatives.block={layout.block}, negatives.lanes={layout.lanes}"
    if batch % layout.block:
        raise ConfigError(f"batch_size={batch} is not a multiple of negatives.block={layout.block}")
    if layout.block % layout.lanes**2 or layout.rows < 2:
        raise ConfigError(
            f"{what}: every lane sends an equal part to each lane, so the block must be a multiple "
            f"of lanes² = {layout.lanes**2} with at least two rows per lane; change batch_size, "
            "negatives.block or negatives.lanes"
        )
    per_shard, remainder = divmod(layout.total_lanes, shards)
    if remainder or (per_shard % layout.lanes and layout.lanes % per_shard):
        raise ConfigError(
            f"{what}: {layout.total_lanes} lanes of batch_size={batch} do not spread evenly over "
            f"{shards} devices; set negatives.lanes to a multiple of {shards}"
        )
    return layout


def build_sampler(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """The sampler that `config` names, for global batches of `batch` rows on `mesh`.

    Raises:
      ConfigError: an unknown name, or sizes that do not divide.
    """
    if config.name not in NEGATIVES:
        known = ", ".join(sorted(NEGATIVES))
        raise ConfigError(f"negatives.name={config.name!r}: choose one of {known}")
    if batch % batch_shards(mesh):
        raise ConfigError(f"batch_size={batch} does not divide over {batch_shards(mesh)} devices")
    return NEGATIVES[config.name](config, batch, mesh)


# --- The samplers ---------------------------------------------------------------------------------


def build_roll(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """The negative of pair i is row i + 1.  One row crosses each device boundary.

    A derangement with a single cycle; as random as the order of the batch, which the input pipeline
    draws afresh every epoch.
    """
    shards = batch_shards(mesh)
    to_previous = [(i, (i - 1) % shards) for i in range(shards)]

    def local(x: Array) -> Array:  # [B / shards, ...]
        first_of_next = lax.ppermute(x[:1], BATCH_AXES, to_previous)
        return jnp.concatenate([x[1:], first_of_next])

    roll = _per_shard(local, mesh, batch_spec())

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del key, step
        return _score(pairs, critic, config.sides, lambda side, rows: jax.tree.map(roll, rows))

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

        def negatives_of(side: int, rows: Any) -> Any:
            send, order = _random_orders(jax.random.fold_in(key, side), 2, layout)
            # Were row q to take the row that arrived in slot inverse(send)[q], it would get its own
            # row back whenever that slot came from its own lane.  One step along a random cycle
            # over the rows of the lane makes that impossible, and treats all other rows alike.
            cycle = _compose(jnp.roll(order, -1, axis=-1), _inverse(order))
            return _exchange(rows, send, _compose(_inverse(send), cycle), layout, mesh)

        return _score(pairs, critic, config.sides, negatives_of)

    return sample


def build_hard(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """One negative per pair, drawn with probability proportional to exp(beta · T) from its lane.

    The rows of the block are dealt to its lanes at random, as in `build_shuffle`; a pair's
    candidates are the rows its lane received, so traffic does not grow with the pool.  Candidates
    are scored without gradient, `chunk` at a time (Gumbel-max), and only the drawn one is scored
    again with gradient.

    The optimum is *not* log r: with the whole batch as pool T = (log r + log Z(x)) / (1 + beta).
    Read no information off such scores without a bound that holds for any critic.
    """
    layout = layout_of(config, batch, batch_shards(mesh))
    if layout.rows % min(config.chunk, layout.rows):
        raise ConfigError(
            f"negatives.chunk={config.chunk} does not divide the {layout.rows} candidates of a lane"
        )

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        beta = config.beta * jnp.minimum(1.0, (step + 1) / (config.beta_warmup_steps + 1))

        def negatives_of(side: int, rows: Any) -> Any:
            deal_key, draw_key = jax.random.split(jax.random.fold_in(key, side))
            (send,) = _random_orders(deal_key, 1, layout)
            identity = jnp.broadcast_to(jnp.arange(layout.rows), send.shape)
            pool = _lanes(_exchange(rows, send, identity, layout, mesh), layout)
            anchors = _lanes(_anchors(pairs, side), layout)
            choice = _draw_hard(draw_key, anchors, pool, side, critic, beta, config.chunk)
            drawn = jax.tree.map(lambda x: jax.vmap(lambda a, i: a[i])(x, choice), pool)
            return _rows(drawn)

        return _score(pairs, critic, config.sides, negatives_of)

    return sample


def build_all(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """All other rows of the batch, as CLIP does: a dense ``[B, B]`` matrix of scores per side.

    Every device gathers all embeddings; traffic and memory grow with the global batch.
    """
    del mesh
    sides = _sides(config.sides)

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del key, step
        matrix = critic.matrix(pairs.image, pairs.text)  # [B, B] image rows, text columns
        negative = jnp.stack([matrix if side == TEXT else matrix.T for side in sides])
        rows = jnp.arange(batch, dtype=jnp.int32)
        allowed = _allowed(
            pairs.group[:, None], pairs.group[None], pairs.valid[:, None], pairs.valid
        )
        shape = (len(sides), batch, batch)
        scores = Scores(
            positive=jnp.diagonal(matrix),
            negative=negative,
            valid=jnp.broadcast_to(allowed & (rows[:, None] != rows), shape),
            log_weight=jnp.zeros_like(negative),
            positive_valid=pairs.valid,
        )
        return Drawn(scores, jnp.broadcast_to(rows, shape))

    return sample


NEGATIVES: dict[str, Callable[[NegativesConfig, int, Mesh], Sampler]] = {
    "all": build_all,
    "hard": build_hard,
    "roll": build_roll,
    "shuffle": build_shuffle,
}


# --- Shared parts ---------------------------------------------------------------------------------

TEXT, IMAGE = 0, 1
"""Sides: a negative text for each image, or a negative image for each text."""


@flax.struct.dataclass
class _Rows:
    """What travels with a candidate."""

    embedding: Any  # [B, D]
    group: Array  # [B, G]
    valid: Array  # [B]
    index: Array  # [B] global row


def _sides(sides: str) -> tuple[int, ...]:
    return {"text": (TEXT,), "image": (IMAGE,), "both": (TEXT, IMAGE)}[sides]


def _candidates(pairs: Pairs, side: int) -> _Rows:
    """The rows that can become negatives on this side."""
    index = jnp.arange(pairs.valid.shape[0], dtype=jnp.int32)
    return _Rows(pairs.text if side == TEXT else pairs.image, pairs.group, pairs.valid, index)


def _anchors(pairs: Pairs, side: int) -> _Rows:
    """The rows that need a negative on this side."""
    return _candidates(pairs, IMAGE if side == TEXT else TEXT)


def _critic_order(side: int, anchor: Any, candidate: Any) -> tuple[Any, Any]:
    """(image, text) for the critic."""
    return (anchor, candidate) if side == TEXT else (candidate, anchor)


def _allowed(group: Array, other_group: Array, valid: Array, other_valid: Array) -> Array:
    """Whether two examples may be negatives of each other; broadcasts over leading dimensions."""
    return valid & other_valid & ~jnp.any(group == other_group, axis=-1)


def _score(
    pairs: Pairs, critic: Critic, sides: str, negatives_of: Callable[[int, _Rows], _Rows]
) -> Drawn:
    """Scores of the pairs and of one negative per pair and side."""
    negative, valid, index = [], [], []
    for side in _sides(sides):
        anchor = _anchors(pairs, side)
        drawn = negatives_of(side, _candidates(pairs, side))
        negative.append(critic.pairs(*_critic_order(side, anchor.embedding, drawn.embedding)))
        allowed = _allowed(anchor.group, drawn.group, anchor.valid, drawn.valid)
        valid.append(allowed & (anchor.index != drawn.index))
        index.append(drawn.index)
    stacked = jnp.stack(negative)[..., None]  # [S, B, 1]
    scores = Scores(
        positive=critic.pairs(pairs.image, pairs.text),
        negative=stacked,
        valid=jnp.stack(valid)[..., None],
        log_weight=jnp.zeros_like(stacked),
        positive_valid=pairs.valid,
    )
    return Drawn(scores, jnp.stack(index)[..., None])


def _draw_hard(
    key: Array, anchors: _Rows, pool: _Rows, side: int, critic: Critic, beta: Array, chunk: int
) -> Array:
    """Slots ``[lanes, rows]`` drawn with probability ∝ exp(beta · score), `chunk` at a time."""
    lanes, rows = pool.index.shape
    chunk = min(chunk, rows)
    anchors, pool = jax.tree.map(lax.stop_gradient, (anchors, pool))
    chunks = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(lanes, rows // chunk, chunk, *x.shape[2:]), 1, 0), pool
    )

    def visit(best: tuple[Array, Array], this: tuple[Array, _Rows]) -> tuple[Any, None]:
        number, candidates = this
        scores = critic.matrix(*_critic_order(side, anchors.embedding, candidates.embedding))
        if side == IMAGE:
            scores = jnp.swapaxes(scores, -1, -2)  # [lanes, rows, chunk]
        allowed = _allowed(
            anchors.group[:, :, None],
            candidates.group[:, None],
            anchors.valid[:, :, None],
            candidates.valid[:, None],
        ) & (anchors.index[:, :, None] != candidates.index[:, None])
        noise = jax.random.gumbel(jax.random.fold_in(key, number), scores.shape, scores.dtype)
        perturbed = jnp.where(allowed, beta * scores + noise, -jnp.inf)
        slot = jnp.argmax(perturbed, axis=-1)
        value = jnp.max(perturbed, axis=-1)
        best_value, best_slot = best
        better = value > best_value
        slot = (number * chunk + slot).astype(jnp.int32)
        return (jnp.where(better, value, best_value), jnp.where(better, slot, best_slot)), None

    dtype = jnp.result_type(*jax.tree.leaves(pool.embedding))
    start = (jnp.full((lanes, rows), -jnp.inf, dtype), jnp.zeros((lanes, rows), jnp.int32))
    (_, slot), _ = lax.scan(visit, start, (jnp.arange(rows // chunk), chunks))
    return slot


def _lanes(tree: Any, layout: Layout) -> Any:
    """``[B, ...] -> [total lanes, rows, ...]``"""
    return jax.tree.map(lambda x: x.reshape(layout.total_lanes, layout.rows, *x.shape[1:]), tree)


def _rows(tree: Any) -> Any:
    """The inverse of `_lanes`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _random_orders(key: Array, count: int, layout: Layout) -> Array:
    """`count` random permutations of the rows of every lane: ``[count, total lanes, rows]``."""
    keys = jax.random.split(key, (count, layout.total_lanes))
    return jax.vmap(jax.vmap(lambda k: jax.random.permutation(k, layout.rows)))(keys)


def _inverse(order: Array) -> Array:
    """The inverse of permutations ``[lanes, rows]``."""
    return jax.vmap(lambda p: jnp.zeros_like(p).at[p].set(jnp.arange(p.size)))(order)


def _compose(first: Array, then: Array) -> Array:
    """``first[then]`` in every lane: ``[lanes, rows]``."""
    return jnp.take_along_axis(first, then, axis=-1)


def _per_shard(local: Callable[..., Any], mesh: Mesh, *specs: PartitionSpec) -> Callable[..., Any]:
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=batch_spec(), check_vma=False)


def _exchange(tree: Any, send: Array, take: Array, layout: Layout, mesh: Mesh) -> Any:
    """Deals the rows of every block to its lanes: local order, all-to-all, local order.

    `send` ``[total lanes, rows]`` is the order in which a lane sends its rows, an equal part to
    each lane of the block; `take` the order in which it lays out what arrives, slots numbered by
    sending lane.  Every leaf ``[B, ...]`` crosses the network at most once.
    """
    shards = batch_shards(mesh)
    lanes_here = layout.total_lanes // shards
    lanes = min(layout.lanes, lanes_here)  # lanes of one block on one device
    spread = layout.lanes // lanes  # devices that share a block
    part = layout.rows // layout.lanes
    peers = [list(range(first, first + spread)) for first in range(0, shards, spread)]

    def reorder(x: Array, order: Array) -> Array:
        by_lane = x.reshape(lanes_here, layout.rows, *x.shape[1:])
        return jax.vmap(lambda rows, i: rows[i])(by_lane, order)

    def local(x: Array, send: Array, take: Array) -> Array:
        feature = x.shape[1:]
        x = reorder(x, send)
        # [blocks here, sending lane, receiving device, receiving lane, part, ...]
        x = x.reshape(-1, lanes, spread, lanes, part, *feature)
        x = jnp.moveaxis(x, 2, 0)
        if spread > 1:
            x = lax.all_to_all(x, BATCH_AXES, 0, 0, axis_index_groups=peers, tiled=True)
        # [sending device, blocks here, sending lane, receiving lane, part, ...]
        x = jnp.moveaxis(x, (1, 3, 0, 2), (0, 1, 2, 3))
        return reorder(x.reshape(-1, *feature), take).reshape(-1, *feature)

    exchange = _per_shard(local, mesh, batch_spec(), batch_spec(), batch_spec())
    return jax.tree.map(lambda x: exchange(x, send, take), tree)
