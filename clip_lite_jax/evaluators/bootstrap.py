"""Confidence intervals by resampling what is independent: images, groups, classes.

Where all values are 0, or all are 1, every resample is the same, and the interval is Wilson's.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 1000
ENDS = ("_low", "_high")
"""What names of intervals' ends end in, after the name of what they are of."""
DRAWS = 2 * 10**7
"""Clusters drawn for shared intervals, at most: of 50,000 images there are 400 resamples."""
Z = NormalDist().inv_cdf(0.975)


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent things (Wilson 1927); NaN of none."""
    if not count:
        return math.nan, math.nan
    n, p = count, share
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    scale = 1 + Z**2 / n
    low, high = (middle - half) / scale, (middle + half) / scale
    return max(low, 0.0) if p > 0 else 0.0, min(high, 1.0) if p < 1 else 1.0


def _without_spread(values: np.ndarray, clusters: int) -> tuple[float, float] | None:
    """`wilson` of values ``[N]`` that are all 0 or all 1; None of others.

    Of values between 0 and 1 too, such as average precisions: no mean varies more than a share.
    """
    if values[0] in (0, 1) and np.all(values == values[0]):
        return wilson(float(values[0]), clusters)
    return None


def mean_interval(
    values: np.ndarray,
    clusters: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values` ``[N]``.

    Values of one cluster (int or text ``[N]``; the captions of an image, drawings of one thing) are
    drawn together, for they are not independent evidence.  NaN where there is no value; `wilson`
    over clusters where all are 0 or all are 1.
    Source: Efron and Tibshirani (1993), ch. 13; clusters: Davison and Hinkley (1997), section 3.8.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return float("nan"), float("nan")
    sums, counts = _by_cluster(values[:, None], clusters)
    if (certain := _without_spread(values, len(counts))) is not None:
        return certain
    means = resampled_means(sums[:, 0], counts, resamples, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def resampled_means(
    sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means of clusters drawn with replacement, from the sum and the count ``[C]`` of each.

    Sums may be of several values, ``[C, V]`` with counts ``[C]`` or ``[C, V]``: all have the same
    draws.  Returns ``[R]``, or ``[R, V]``.
    """
    rng = np.random.default_rng(seed)
    number, columns = len(sums), np.prod(sums.shape[1:], dtype=int)
    means = np.empty((resamples, *sums.shape[1:]))
    counts = counts if counts.ndim == sums.ndim else counts[:, None]
    for start in range(0, resamples, at_once := max(1, 2**22 // (number * max(1, columns // 8)))):
        size = min(at_once, resamples - start)
        times = rng.multinomial(number, np.full(number, 1 / number), size=size).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw without any value has no mean
            means[start : start + size] = (times @ sums) / (times @ counts)
    return means


def with_intervals(
    values: Mapping[str, np.ndarray], clusters: np.ndarray | None = None, seed: int = 0
) -> dict[str, float]:
    """``NAME``, ``NAME_low`` and ``NAME_high`` of the mean of each array ``[N]``."""
    return with_shared_intervals([(values, clusters)], seed)


def with_shared_intervals(
    parts: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray | None]], seed: int = 0
) -> dict[str, float]:
    """`with_intervals` of several sets of values, all of the same clusters: drawn once for all.

    Clusters of each set are ``[N]`` of its own; a set that has none is a cluster for each value.
    An array of 0 alone, or of 1, has `wilson`'s interval over its clusters.
    The queries of both directions of a search are two such sets: the captions of an image are drawn
    with it.
    """
    found: dict[str, float] = {}
    names, sums, counts = [], [], []
    certain: dict[str, tuple[float, float]] = {}
    for values, clusters in parts:
        for name, array in values.items():
            found[name] = float(np.mean(array)) if len(array) else float("nan")
            found[f"{name}_low"] = found[f"{name}_high"] = float("nan")
        if not values or not len(next(iter(values.values()))):
            continue
        table = np.stack([np.asarray(array, np.float64) for array in values.values()], axis=1)
        total, count = _by_cluster(table, clusters)
        names += list(values)
        for name, column in zip(values, table.T, strict=True):
            if (ends := _without_spread(column, len(count))) is not None:
                certain[name] = ends
        sums.append(total)
        counts.append(np.broadcast_to(count[:, None], total.shape))
    if names:
        resamples = min(RESAMPLES, max(200, DRAWS // len(sums[0])))
        means = resampled_means(np.concatenate(sums, 1), np.concatenate(counts, 1), resamples, seed)
        quantiles = np.nanquantile(means, (0.025, 0.975), axis=0)
        drawn = {
            name: (float(low), float(high))
            for name, low, high in zip(names, *quantiles, strict=True)
        }
        for name, (low, high) in (drawn | certain).items():
            found[f"{name}_low"], found[f"{name}_high"] = low, high
    return found


def drawn_groups(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each of N examples occurs when groups are drawn with replacement, ``[R, N]``."""
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return times[:, member].astype(np.float64)


def _by_cluster(values: np.ndarray, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums ``[C, V]`` and counts ``[C]`` of values ``[N, V]``."""
    if clusters is None:
        return values, np.ones(len(values))
    _, member = np.unique(clusters, return_inverse=True)
    sums = np.stack([np.bincount(member, column) for column in values.T], axis=1)
    return sums, np.bincount(member).astype(np.float64)
