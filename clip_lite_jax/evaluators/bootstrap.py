"""Confidence intervals by resampling what is independent: images, groups, classes."""

from collections.abc import Mapping

import numpy as np

RESAMPLES = 1000


def mean_interval(
    values: np.ndarray,
    clusters: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values` ``[N]``.

    Values of one cluster (int or text ``[N]``; the captions of an image, drawings of one thing) are
    drawn together, for they are not independent evidence.  NaN where there is no value.
    Source: Efron and Tibshirani (1993), ch. 13; clusters: Davison and Hinkley (1997), section 3.8.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return float("nan"), float("nan")
    sums, counts = _by_cluster(values, clusters)
    means = resampled_means(sums, counts, resamples, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def resampled_means(
    sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means ``[R]`` of clusters drawn with replacement, from the sum and count ``[C]`` of each."""
    rng = np.random.default_rng(seed)
    number = len(sums)
    means = np.empty(resamples)
    for start in range(0, resamples, at_once := max(1, 2**22 // number)):
        size = min(at_once, resamples - start)
        times = rng.multinomial(number, np.full(number, 1 / number), size=size).astype(np.float64)
        means[start : start + size] = (times @ sums) / (times @ counts)
    return means


def with_intervals(
    values: Mapping[str, np.ndarray], clusters: np.ndarray | None = None, seed: int = 0
) -> dict[str, float]:
    """``NAME``, ``NAME_low`` and ``NAME_high`` of the mean of each array ``[N]``."""
    found: dict[str, float] = {}
    for name, array in values.items():
        found[name] = float(np.mean(array)) if len(array) else float("nan")
        found[f"{name}_low"], found[f"{name}_high"] = mean_interval(array, clusters, seed=seed)
    return found


def _by_cluster(values: np.ndarray, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if clusters is None:
        return values, np.ones(len(values))
    _, member = np.unique(clusters, return_inverse=True)
    return np.bincount(member, values), np.bincount(member).astype(np.float64)
