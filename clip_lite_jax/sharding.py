"""The device mesh and how arrays lie on it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data",)
"""Mesh axes over which the rows of a batch are split, outermost first."""


def build_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them, over all processes)."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Parts into which the rows of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_spec() -> PartitionSpec:
    """Rows over the batch axes, all other dimensions whole."""
    return PartitionSpec(BATCH_AXES)


def batch_sharding(mesh: Mesh, parts: bool = False) -> NamedSharding:
    """Rows over the devices; with `parts` the arrays are ``[parts, rows, ...]``."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES) if parts else batch_spec())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def any_rows(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays ``[B, ...]`` for a B that need not divide over the devices.

    The arrays are NumPy's, and of a mesh over several processes each has the whole of them.
    """
    sharding = batch_sharding(mesh)

    def spread(array: Any) -> Any:
        if jax.process_count() == 1:
            return array
        # Of arrays of NumPy jit would not know that they are the same in all processes.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def call(*arrays: Any) -> Any:
        count = len(arrays[0])
        missing = -count % batch_shards(mesh)
        if missing:
            arrays = tuple(
                jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1), mode="edge") for a in arrays
            )
        return function(*map(spread, arrays))[:count]

    return call


def put_batch(mesh: Mesh, batch: Any, parts: bool = False) -> Any:
    """Global arrays ``[B, ...]`` from this process's contiguous rows ``[B / processes, ...]``.

    With `parts` both have a leading dimension of parts, the rows of each contiguous.
    """
    sharding = batch_sharding(mesh, parts)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
