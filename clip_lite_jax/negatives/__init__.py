"""Which text (or image) is the negative of which pair, across all devices.

A sampler sees the embeddings of the global batch, sharded over devices by rows, and returns
`Drawn`: the critic scores of every pair and of its negatives.  Whatever is random depends on the
step's key, on the row in the batch and on numbers of the configuration, never on how many devices
there are.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.negatives.chosen import build_hard, build_importance, build_k
from clip_lite_jax.negatives.deranged import build_roll, build_shuffle
from clip_lite_jax.negatives.layout import Layout, layout_of
from clip_lite_jax.negatives.memory import (
    FROM_A_POOL,
    build_memory,
    build_queue,
    init_memory,
    remember,
    uses_memory,
    uses_momentum_encoder,
)
from clip_lite_jax.negatives.pairs import Critic, Drawn, Memory, Pairs, Sampler
from clip_lite_jax.negatives.whole import build_all
from clip_lite_jax.objectives import Bound
from clip_lite_jax.sharding import batch_shards

__all__ = [
    "FROM_A_POOL",
    "NEGATIVES",
    "Critic",
    "Drawn",
    "Layout",
    "Memory",
    "Pairs",
    "Sampler",
    "build_sampler",
    "init_memory",
    "layout_of",
    "remember",
    "uses_memory",
    "uses_momentum_encoder",
]

NEGATIVES: dict[str, Callable[[NegativesConfig, int, Mesh], Sampler]] = {
    "all": build_all,
    "hard": build_hard,
    "importance": build_importance,
    "k": build_k,
    "memory": build_memory,
    "queue": build_queue,
    "roll": build_roll,
    "shuffle": build_shuffle,
}


def build_sampler(
    config: NegativesConfig, batch: int, mesh: Mesh, bound: Bound | None = None
) -> Sampler:
    """The sampler that `config` names, for global batches of `batch` rows on `mesh`.

    `bound` is what the negatives are summed up for, where ``all`` does not keep their scores
    (`NegativesConfig.implementation`).

    Raises:
      ConfigError: an unknown name, or sizes that do not divide.
    """
    if config.name not in NEGATIVES:
        known = ", ".join(sorted(NEGATIVES))
        raise ConfigError(f"negatives.name={config.name!r}: choose one of {known}")
    if batch % batch_shards(mesh):
        raise ConfigError(f"batch_size={batch} does not divide over {batch_shards(mesh)} devices")
    if config.name == "all":
        sampler = build_all(config, batch, mesh, bound)
    else:
        sampler = NEGATIVES[config.name](config, batch, mesh)
    # In profiles, and in programs whose exchanges are listed (`hlo_collectives`).
    return jax.named_scope("negatives")(sampler)
