"""How the rows of a batch lie in blocks, lanes and devices, and how they are exchanged.

The exchange between devices is written out (`shard_map`, `ppermute`, `all_to_all`) because the
partitioner would turn a gather by a random permutation into an all-gather of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.sharding import BATCH_AXES, batch_shards, batch_spec


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
    block = _block_of(config, batch)
    fitting = (n for n in (8, 4, 2) if block % n**2 == 0 and block >= 2 * n)
    layout = Layout(batch, block, config.lanes or next(fitting, 1))
    what = f"negatives.block={layout.block}, negatives.lanes={layout.lanes}"
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
            f"{shards} devices; change batch_size, or set negatives.lanes to a multiple of "
            f"{shards} whose square divides the block"
        )
    return layout


def _block_of(config: NegativesConfig, batch: int) -> int:
    block = config.block or batch
    if batch % block:
        raise ConfigError(f"batch_size={batch} is not a multiple of negatives.block={block}")
    return block


# --- Lanes ----------------------------------------------------------------------------------------


def to_lanes(tree: Any, layout: Layout) -> Any:
    """``[B, ...] -> [total lanes, rows, ...]``"""
    return jax.tree.map(lambda x: x.reshape(layout.total_lanes, layout.rows, *x.shape[1:]), tree)


def from_lanes(tree: Any) -> Any:
    """The inverse of `to_lanes`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def take_rows(tree: Any, index: Array) -> Any:
    """Rows `index` ``[L, ...]`` of every lane or block: ``[L, M, F] -> [L, ..., F]``."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, i: rows[i])(x, index), tree)


def lane_keys(key: Array, rows: Array, layout: Layout) -> Array:
    """A key for every lane ``[total lanes]``, by its place in the whole batch; `rows` ``[B]``."""
    lane = rows[:: layout.rows] // layout.rows
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(lane)


def random_orders(keys: Array, layout: Layout) -> Array:
    """A random permutation of the rows of every lane: ``[total lanes, rows]``."""
    return jax.vmap(lambda k: jax.random.permutation(k, layout.rows))(keys)


def inverse(order: Array) -> Array:
    """The inverse of permutations ``[lanes, rows]``."""
    return jax.vmap(lambda p: jnp.zeros_like(p).at[p].set(jnp.arange(p.size)))(order)


def compose(first: Array, then: Array) -> Array:
    """``first[then]`` in every lane: ``[lanes, rows]``."""
    return jnp.take_along_axis(first, then, axis=-1)


def deal(key: Array, tree: Any, rows: Array, layout: Layout, mesh: Mesh) -> Any:
    """Deals the rows of every block to its lanes at random.

    ``[B, ...] -> [total lanes, rows, ...]``; a lane receives every row of its block with
    probability 1 / lanes.
    """
    send = random_orders(lane_keys(key, rows, layout), layout)
    identity = jnp.broadcast_to(jnp.arange(layout.rows), send.shape)
    return to_lanes(exchange(tree, send, identity, layout, mesh), layout)


def exchange(tree: Any, send: Array, take: Array, layout: Layout, mesh: Mesh) -> Any:
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
        return take_rows(x.reshape(lanes_here, layout.rows, *x.shape[1:]), order)

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

    by_leaf = per_shard(local, mesh, (batch_spec(), batch_spec(), batch_spec()))
    return _moved(lambda x: by_leaf(x, send, take), tree, row_dimensions=1)


def in_chunks(tree: Any, valid: Array, size: int) -> Any:
    """Rows ``[L, M, ...]`` in chunks ``[chunks, L, size, ...]``; the last is filled with zeros.

    `valid` ``[L, M]`` may be part of the tree: zero is False, so what is filled in is not valid.
    """
    size = min(size, valid.shape[1])
    missing = -valid.shape[1] % size

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


# --- Rings of devices -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """The devices that share a block, in a ring; or one device with several blocks."""

    blocks: int  # blocks on one device
    rows: int  # rows of one block on one device
    spread: int  # devices that share a block
    shards: int

    @property
    def peers(self) -> list[list[int]]:
        return [list(range(n, n + self.spread)) for n in range(0, self.shards, self.spread)]

    def hop(self, tree: Any) -> Any:
        """Every device passes its rows on to the one before it in its ring."""
        if self.spread == 1:
            return tree
        to_previous = [(ring[i], ring[i - 1]) for ring in self.peers for i in range(self.spread)]
        return _moved(lambda x: lax.ppermute(x, BATCH_AXES, to_previous), tree, row_dimensions=2)

    def travel(self, visit: Callable[[Any, Any], tuple[Any, Any]], start: Any, rows: Any) -> Any:
        """``visit(carry, visiting) -> (carry, visiting)`` with the rows of every device in turn.

        Every device's rows go round the ring with what is added to them, and are one `hop` from
        home in the end: what is wanted there has yet to make it.
        """
        first = visit(start, rows)
        if self.spread == 1:
            return first

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            carry, visiting = state
            return visit(carry, self.hop(visiting)), None

        return lax.scan(step, first, None, length=self.spread - 1)[0]

    def split(self, tree: Any) -> Any:
        """On one device: ``[local rows, ...] -> [blocks, rows, ...]``."""
        return jax.tree.map(lambda x: x.reshape(self.blocks, self.rows, *x.shape[1:]), tree)


def ring_of(config: NegativesConfig, batch: int, shards: int) -> Ring:
    """The ring for a batch over `shards` devices.

    Raises:
      ConfigError: sizes that do not divide.
    """
    block, local = _block_of(config, batch), batch // shards
    if block % local and local % block:
        raise ConfigError(
            f"negatives.block={block} does not spread evenly over devices with {local} rows each "
            f"(batch_size={batch} over {shards}): set it to a multiple or a divisor of {local}"
        )
    blocks = max(local // block, 1)
    return Ring(blocks, local // blocks, max(block // local, 1), shards)


def per_shard(
    local: Callable[..., Any], mesh: Mesh, specs: tuple[PartitionSpec, ...]
) -> Callable[..., Any]:
    """`local` on the rows that each device holds; everything it returns is split by rows."""
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=batch_spec(), check_vma=False)


def _moved(move: Callable[[Array], Array], tree: Any, row_dimensions: int) -> Any:
    """`move` for every leaf ``[rows, ...]``, all of int32 and booleans as one array.

    Group, index, validity and captions are so small that an exchange of them costs its start.
    """
    leaves, form = jax.tree.flatten(tree)
    small = [n for n, x in enumerate(leaves) if x.dtype in (jnp.int32, jnp.bool_)]
    columns = [leaves[n].reshape(*leaves[n].shape[:row_dimensions], -1) for n in small]
    moved = [None if n in small else move(x) for n, x in enumerate(leaves)]
    if small:
        ends = np.cumsum([x.shape[-1] for x in columns])[:-1]
        parts = jnp.split(move(jnp.concatenate(columns, axis=-1)), ends, axis=-1)
        for n, part in zip(small, parts, strict=True):
            moved[n] = part.reshape(leaves[n].shape).astype(leaves[n].dtype)
    return jax.tree.unflatten(form, moved)
