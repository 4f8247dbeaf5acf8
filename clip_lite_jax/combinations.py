"""What goes together: objectives, negatives and accumulation.  Nothing here is compiled."""

from clip_lite_jax.config import NegativesConfig, ObjectiveConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.negatives import FROM_A_POOL, uses_memory
from clip_lite_jax.objectives import STREAMED

WITHIN_PARTS = ("hard", "importance", "k", "roll", "shuffle")
"""Negatives that may be drawn within a part of the batch."""


def check_combination(
    objective: ObjectiveConfig, negatives: NegativesConfig, batch: int, parts: int = 1
) -> None:
    """Raises `ConfigError`, with what to use instead, for what does not go together.

    Unknown names pass: `build_objective` and `build_sampler` list the valid ones.
    """
    streaming = negatives.name == "all" and negatives.implementation != "dense"
    if streaming and objective.name not in STREAMED:
        raise ConfigError(
            f"objective.name={objective.name!r} needs all scores at once, and "
            f"negatives.implementation={negatives.implementation!r} keeps none: set it to dense"
        )
    exact = objective.name == "infonce" and negatives.proposal == "exp" and negatives.pool != "lane"
    of_a_logarithm = objective.name in ("dv", "infonce", "smile") and not exact
    if negatives.name == "importance" and of_a_logarithm:
        raise ConfigError(
            f"negatives.name='importance' estimates a sum over negatives without bias, and "
            f"objective.name={objective.name!r} takes its logarithm: use the negatives all or hard,"
            " the objectives jsd, nwj or sigmoid, or infonce with negatives.proposal=exp and "
            "negatives.pool=block (or, nearly unbiased, memory with reembed)"
        )
    if negatives.reembed:
        _check_reembed(negatives, parts)
    if parts == 1:
        return
    if batch % parts:
        raise ConfigError(f"batch_size={batch} does not divide into accumulate={parts} parts")
    if draws_within_parts(objective, negatives) and negatives.block not in (None, batch // parts):
        raise ConfigError(
            f"negatives.block={negatives.block}: with accumulate={parts} negatives are drawn "
            f"within parts of {batch // parts} rows; leave it out or set it to that"
        )


def _check_reembed(negatives: NegativesConfig, parts: int) -> None:
    if negatives.pool != "memory" or negatives.name not in FROM_A_POOL:
        raise ConfigError(
            f"negatives.reembed=true with negatives.name={negatives.name!r} and "
            f"negatives.pool={negatives.pool!r}: what is drawn from a memory can be embedded again,"
            f" so set the pool to memory and the name to one of {', '.join(FROM_A_POOL)}"
        )
    if parts > 1:
        raise ConfigError(
            f"negatives.reembed=true with accumulate={parts}: the negatives would be embedded all "
            "at once; set accumulate=1 or negatives.reembed=false"
        )


def draws_within_parts(objective: ObjectiveConfig, negatives: NegativesConfig) -> bool:
    """Whether accumulation draws negatives within parts, and so encodes every part only once.

    Not for the logarithm of a mean (`dv`, `smile`), which does not add up over parts.
    """
    return (
        negatives.name in WITHIN_PARTS
        and not uses_memory(negatives)
        and objective.name not in ("dv", "smile")
    )
