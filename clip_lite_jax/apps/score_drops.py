"""Which pairs of a source are dropped without a look at them.

What could not be read this time stays: its scores are not known.
"""

import math
from collections.abc import Iterator

import numpy as np

from clip_lite_jax.apps.data_decisions import Decision, Decisions, make_decisions
from clip_lite_jax.apps.score import Found
from clip_lite_jax.errors import ConfigError


def dropped_below(found: Found, threshold: float) -> Decisions:
    """Drops all pairs whose T is below a number, and what cannot be used."""
    return _dropping(found, np.flatnonzero(found.scores.score < threshold))


def dropped_share(found: Found, share: float) -> Decisions:
    """Drops a share of the pairs, the worst, and what cannot be used.

    Raises:
      ConfigError: it is no share.
    """
    check_share(share)
    count = math.floor(share * len(found.scores.score) + 1e-9)
    return _dropping(found, np.sort(found.worst_first[:count]))


def check_share(share: float) -> None:
    """Raises `ConfigError` where it is none, or would leave nothing."""
    if not 0 < share < 1:
        raise ConfigError(f"--drop-share {share}: a number between 0 and 1 is needed")


def unusable(found: Found) -> Iterator[Decision]:
    """All captions of the examples whose image cannot be used are dropped."""
    for split, index in found.unusable:
        example = found.sources[split].metadata(index)
        for place in range(len(example.captions)):
            yield Decision(split=split, id=example.id, caption=place, drop=True)


def _dropping(found: Found, numbers: np.ndarray) -> Decisions:
    pairs = (found.pair(int(number)) for number in numbers)
    listed = (
        Decision(split=split, id=example.id, caption=place, drop=True)
        for split, example, place in pairs
    )
    return make_decisions(found.fingerprint, (*listed, *unusable(found)))
