"""The bounds on mutual information that a run can maximise, as losses over critic scores.

`OBJECTIVES` names them; `build_objective` binds their parameters.  An objective owns no weights and
knows nothing of encoders, meshes or batches: it maps `Scores` to ``(loss, metrics)``.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from jax import Array

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.objectives.bounds import (
    INFONCE,
    JSD,
    NWJ,
    SIGMOID,
    Bound,
    dv,
    infonce,
    jsd,
    nwj,
    sigmoid,
    smile,
    sum_negatives,
)
from clip_lite_jax.objectives.prior import prior_matching
from clip_lite_jax.objectives.scores import RowScores, Scores, Sums, Totals

__all__ = [
    "OBJECTIVES",
    "OPTIMAL_CRITIC",
    "STREAMED",
    "Bound",
    "Objective",
    "RowScores",
    "Scores",
    "Sums",
    "Totals",
    "build_objective",
    "prior_matching",
    "sum_negatives",
]

Objective = Callable[[Scores | RowScores], tuple[Array, dict[str, Array]]]

OBJECTIVES: dict[str, Callable[..., tuple[Array, dict[str, Array]]]] = {
    "dv": dv,
    "infonce": infonce,
    "jsd": jsd,
    "nwj": nwj,
    "sigmoid": sigmoid,
    "smile": smile,
}

STREAMED: dict[str, Bound] = {bound.name: bound for bound in (INFONCE, JSD, NWJ, SIGMOID)}
"""Objectives whose negatives can be summed up pair by pair, without the scores of all of them."""

OPTIMAL_CRITIC = {
    "dv": "log r plus a constant",
    "infonce": "log r plus a constant",
    "jsd": "log r",
    "nwj": "1 + log r",
    "sigmoid": "log r minus the log of the negatives per pair",
    "smile": "log r",
}
"""The T that each objective has its optimum at with plain negatives, r = dP/dQ."""


def build_objective(name: str, **params: Any) -> Objective:
    """The objective `name` with its parameters fixed.

    Raises:
      ConfigError: unknown name or parameter; the message lists the valid ones.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective.name={name!r}: choose one of {', '.join(sorted(OBJECTIVES))}")
    objective = OBJECTIVES[name]
    valid = list(inspect.signature(objective).parameters)[1:]
    for param in params:
        if param not in valid:
            raise ConfigError(
                f"objective.options.{param}: {name} takes {', '.join(valid) or 'none'}"
            )
    for param, (allowed, rule) in _RANGES.items():
        if param in params and not allowed(params[param]):
            raise ConfigError(f"objective.options.{param}={params[param]!r}: {rule}")
    return partial(objective, **params)


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "decay": (lambda x: _is_number(x) and 0 <= x < 1, "a number from 0 to below 1 is needed"),
    "tau": (lambda x: _is_number(x) and x > 0, "a number above 0 is needed"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
