"""Parameters that lie in pieces on the devices, and are whole where they are used.

The compiler would find out by itself where to gather a parameter whose sharding it knows, but not
well: it moves activations instead, and gathers all layers of a scan before it runs.
Source: ZeRO (arXiv 1910.02054), section 5.3.  Blocks with ``remat="full"`` gather their parameters
again in the backward pass, as it has it; what others gathered is kept until then.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from clip_lite_jax.parameter_paths import path_name

SCANNED = "blocks"
"""Name of the parameters of many layers in one array, each gathered when its turn comes."""


def in_pieces(mesh: Mesh) -> AbstractContextManager[Any]:
    """While a function is traced here, its parameters are known to lie in pieces."""
    if mesh.shape["fsdp"] == 1:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def gathered(params: Any) -> Any:
    """`params` whole on every device, but for those that a scan gathers; as they are elsewhere."""
    if jax.sharding.get_abstract_mesh().empty:
        return params

    def gather(path: Any, x: Any) -> Any:
        return x if SCANNED in path_name(path).split("/") else _gather(x)

    return jax.tree_util.tree_map_with_path(gather, params)


def gathered_layer(params: Any) -> Any:
    """`params` of one layer of a scan, whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(_gather, params)


@jax.custom_vjp
def _gather(x: Any) -> Any:
    return lax.with_sharding_constraint(x, PartitionSpec())


# The gradient may lie as the step wants it: in pieces, each summed where it is needed.
_gather.defvjp(lambda x: (_gather(x), None), lambda _, gradient: (gradient,))
