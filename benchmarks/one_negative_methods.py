"""The rows of `one_negative`: objectives with the negatives of the library."""

import math
from dataclasses import dataclass, replace
from typing import Any

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.negatives import uses_memory


@dataclass(frozen=True)
class Recipe:
    """An objective with its negatives."""

    label: str
    objective: str
    negatives: NegativesConfig
    log_bias: bool = False
    """The bias of the critic starts at minus the log of the candidates of a pair, and not at 0."""

    def negatives_at(self, batch: int) -> NegativesConfig:
        """With a memory of one batch at least: it takes whole batches."""
        return replace(self.negatives, memory=max(self.negatives.memory, batch))

    def candidates(self, batch: int) -> int:
        """Candidates of a pair and side, groups aside."""
        negatives = self.negatives_at(batch)
        return batch - 1 + (negatives.memory if uses_memory(negatives) else 0)

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


def _both_sides(name: str, **options: Any) -> NegativesConfig:
    return NegativesConfig(name=name, sides="both", lanes=1, chunk=2048, **options)


_FROM_MEMORY = {"pool": "memory", "reembed": True}

RECIPES = {
    "infonce": Recipe("InfoNCE, all", "infonce", _both_sides("all")),
    "sigmoid": Recipe("sigmoid, all", "sigmoid", _both_sides("all"), log_bias=True),
    "jsd_hard_memory": Recipe(
        "JSD, one hard of batch and memory",
        "jsd",
        _both_sides("hard", memory=256, **_FROM_MEMORY),
    ),
    "infonce_importance_memory": Recipe(
        "InfoNCE, one by importance of batch and memory",
        "infonce",
        _both_sides("importance", proposal="exp", memory=1024, **_FROM_MEMORY),
    ),
    "infonce_importance": Recipe(
        "InfoNCE, one by importance",
        "infonce",
        _both_sides("importance", pool="block", proposal="exp"),
    ),
    "sigmoid_importance": Recipe(
        "sigmoid, one by importance",
        "sigmoid",
        _both_sides("importance", pool="block"),
        log_bias=True,
    ),
    "jsd_hard": Recipe("JSD, one hard", "jsd", _both_sides("hard", pool="block")),
    "jsd_shuffle": Recipe("JSD, one shuffled", "jsd", _both_sides("shuffle")),
}
"""In the order of the tables."""
