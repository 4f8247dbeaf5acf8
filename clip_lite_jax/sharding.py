"""The device mesh and how arrays lie on it."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_lite_jax.config import MeshConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.parameter_paths import by_path, compile_pattern, path_name

BATCH_AXES = ("replica", "data", "fsdp")
"""Mesh axes over which the rows of a batch are split, outermost first: all there are.

``replica`` is over slices, between which the network is slow; the parameters are whole over it and
over ``data``, and split over ``fsdp``.
"""


def build_mesh(
    devices: Sequence[jax.Device] | None = None, config: MeshConfig | None = None
) -> Mesh:
    """A mesh over `devices` (default: all of them, over all processes).

    Raises:
      ConfigError: the devices do not divide as `config` asks.
    """
    devices = jax.devices() if devices is None else list(devices)
    config = config or MeshConfig()
    replica, count = config.replica, len(devices)
    fsdp = count // replica if config.fsdp == "all" else config.fsdp
    if count % (replica * max(fsdp, 1)):
        raise ConfigError(
            f"mesh.replica={replica}, mesh.fsdp={config.fsdp}: {count} devices do not divide by "
            f"{replica * fsdp}; choose a product that divides them"
        )
    shape = (replica, count // (replica * fsdp), fsdp)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if len(slices) != replica:
            raise ConfigError(f"mesh.replica={replica}: there are {len(slices)} slices, give that")
        order = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (replica, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        order = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(order, BATCH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def pieces_of_process(mesh: Mesh, process: int | None = None) -> tuple[list[int], int]:
    """Which pieces of a batch a process (default: this one) reads, and of how many equal ones.

    One for each process, or for each device where those of a process are no neighbours in the
    mesh, as is usual in a torus of TPUs.
    """
    process = jax.process_index() if process is None else process
    owners = [device.process_index for device in mesh.devices.flat]
    in_turn = [owner for owner, _ in groupby(owners)]
    if len(set(in_turn)) == len(in_turn):
        return [in_turn.index(process)], len(in_turn)
    return [n for n, owner in enumerate(owners) if owner == process], len(owners)


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


def parameter_shardings(mesh: Mesh, config: MeshConfig, params: Any) -> dict[str, NamedSharding]:
    """How each parameter lies on the mesh, by its path; `params` may be shapes.

    A parameter is split over the axis ``fsdp`` along its longest dimension that divides, the last
    of equal ones, unless the first of ``mesh.rules`` that its path matches names another or none.
    Source: ZeRO (arXiv 1910.02054), section 5, stage 3, in the form of Xu et al. (arXiv
    2004.13336): the compiler makes the exchange from the shardings.

    Raises:
      ConfigError: a rule that is no regular expression or names a dimension that does not divide.
    """
    rules = {text: compile_pattern("mesh.rules", text) for text in config.rules}
    shards = mesh.shape["fsdp"]

    def split(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        found = next((text for text, pattern in rules.items() if pattern.search(path)), None)
        if shards == 1:
            return PartitionSpec()
        if found is not None:
            dimension = config.rules[found]
            if dimension is None:
                return PartitionSpec()
            if dimension >= len(shape) or shape[dimension] % shards:
                raise ConfigError(
                    f"mesh.rules: {found!r} splits {path} {shape} along dimension {dimension}, "
                    f"which does not divide over mesh.fsdp={shards}; name another, or None"
                )
        else:
            fitting = [n for n, size in enumerate(shape) if size % shards == 0]
            if not fitting or np.prod(shape) < config.min_size:
                return PartitionSpec()
            dimension = max(fitting, key=lambda n: (shape[n], n))
        return PartitionSpec(*[None] * dimension, "fsdp")

    return {
        path: NamedSharding(mesh, split(path, leaf.shape)) for path, leaf in by_path(params).items()
    }


def shardings_like(tree: Any, params: Any, mesh: Mesh, config: MeshConfig) -> Any:
    """How `tree` lies on the mesh: what is kept for a parameter as the parameter, the rest whole.

    An optimizer names what it keeps for a parameter by the path of that, after words of its own.
    """
    of_params = parameter_shardings(mesh, config, params)
    shapes = {path: leaf.shape for path, leaf in by_path(params).items()}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = path_name(path).split("/")
        ends = ("/".join(names[start:]) for start in range(len(names)))
        found = next((end for end in ends if shapes.get(end) == leaf.shape), None)
        return replicated(mesh) if found is None else of_params[found]

    return jax.tree_util.tree_map_with_path(sharding, tree)


def any_rows(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays ``[B, ...]`` for a B that need not divide over the devices.

    The arrays are NumPy's, and of a mesh over several processes each has the whole of them.
    """

    def call(*arrays: Any) -> Any:
        missing = -len(arrays[0]) % batch_shards(mesh)
        if missing:
            arrays = tuple(
                jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1), mode="edge") for a in arrays
            )
        return function(*(spread_rows(mesh, a) for a in arrays))[: len(arrays[0]) - missing]

    return call


def spread_rows(mesh: Mesh, array: Any) -> Any:
    """An array ``[B, ...]``, the same in all processes, for a program that splits its rows."""
    if jax.process_count() == 1:
        return array
    # Of arrays of NumPy jit would not know that they are the same in all processes.
    sharding = batch_sharding(mesh)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_batch(mesh: Mesh, batch: Any, parts: bool = False) -> Any:
    """Global arrays ``[B, ...]`` from the rows of this process, as `pieces_of_process` has them.

    With `parts` both have a leading dimension of parts.
    """
    sharding = batch_sharding(mesh, parts)
    pieces, of = pieces_of_process(mesh)
    axis = int(parts)

    def put(local: np.ndarray) -> jax.Array:
        rows = local.shape[axis] // len(pieces)
        shape = (*local.shape[:axis], rows * of, *local.shape[axis + 1 :])

        def of_device(index: Any) -> np.ndarray:
            first, last, _ = index[axis].indices(shape[axis])
            start = pieces.index(first // rows) * rows + first % rows
            here = slice(start, start + last - first)
            return local[(slice(None),) * axis + (here,)]

        return jax.make_array_from_callback(shape, sharding, of_device)

    return jax.tree.map(put, batch)
