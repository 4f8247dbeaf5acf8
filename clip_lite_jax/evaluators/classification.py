"""What is measured of a classifier: accuracies with intervals, per class, and confusions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_lite_jax.evaluators.bootstrap import Z, wilson, with_intervals
from clip_lite_jax.evaluators.tasks import Outcome

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of N pictures."""

    ranks: np.ndarray
    """int64 ``[N]`` of the right class, 1 is best."""
    predicted: np.ndarray
    """int64 ``[N]``: the class with the highest score, a wrong one where that ties with it."""

    @classmethod
    def joined(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Of several batches, as one."""
        ranks, predicted = zip(*((part.ranks, part.predicted) for part in parts), strict=True)
        return cls(np.concatenate(ranks), np.concatenate(predicted))


def predictions(scores: np.ndarray, labels: np.ndarray) -> Predictions:
    """From scores ``[N, C]`` and right classes ``[N]``.

    A tie counts against the classifier, and so does a score that is not a number.
    """
    rows = np.arange(len(scores))
    own = scores[rows, labels]
    ranks = np.sum(~(scores < own[:, None]), axis=1)
    others = np.where(np.isnan(scores), np.inf, scores.astype(np.float64))
    others[rows, labels] = -np.inf
    predicted = np.where(ranks == 1, labels, np.argmax(others, axis=1))
    return Predictions(ranks.astype(np.int64), predicted.astype(np.int64))


def outcome(found: Predictions, labels: np.ndarray, names: Sequence[str]) -> Outcome:
    """Metrics, and the tables ``per_class`` and ``confusion``, of right classes ``[N]``.

    ``top1``, ``top5`` (of more than five classes) and ``mean_per_class``, the mean of the classes'
    own top-1, of those that occur.  Intervals are of 95 %: the bootstrap's over pictures, Wilson's
    for one class, and for ``mean_per_class`` that of a sum of independent shares.
    """
    right = found.ranks == 1
    values = {"top1": right}
    if len(names) > TOP:
        values["top5"] = found.ranks <= TOP
    metrics = with_intervals({name: hit.astype(np.float64) for name, hit in values.items()})
    counts = np.bincount(labels, minlength=len(names))
    hits = np.bincount(labels, right, minlength=len(names))
    metrics |= mean_per_class(hits, counts)
    metrics |= {"images": float(len(labels)), "classes": float(len(names))}
    metrics["top1_chance"] = 1 / len(names)
    confusion = _confusion(found.predicted, labels, names)
    return Outcome(
        metrics,
        {"per_class": _per_class(found, labels, names, confusion), "confusion": confusion},
    )


def mean_per_class(hits: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The mean over classes of hits / pictures, ``[C]`` each, and its normal interval of 95 %.

    The variance of a class is p (1 - p) / n with two hits and two misses added to its own for p:
    resampling one or two pictures of a class, all right or all wrong, would find no spread at all.
    It is drawn around the mean itself, and not around that of these p, nor of draws from
    Beta(hits + 1/2, misses + 1/2): both lie off the truth where many classes have few pictures.
    There it is wider than it must be.
    Source: Agresti and Coull (1998), "Approximate is better than 'exact'", section 3.
    """
    there = counts > 0
    counts, hits = counts[there], hits[there]
    mean = float(np.mean(hits / counts))
    smooth = (hits + Z**2 / 2) / (counts + Z**2)
    half = Z * float(np.sqrt(np.sum(smooth * (1 - smooth) / counts))) / len(counts)
    return {
        "mean_per_class": mean,
        "mean_per_class_low": max(mean - half, 0.0),
        "mean_per_class_high": min(mean + half, 1.0),
    }


def _confusion(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each pair of classes that occurs; those with equal names are one row each."""
    pairs, counts = np.unique(np.stack([labels, predicted], 1), axis=0, return_counts=True)
    return [
        {"class": names[label], "predicted": names[said], "images": int(count)}
        for (label, said), count in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]


def _per_class(
    found: Predictions,
    labels: np.ndarray,
    names: Sequence[str],
    confusion: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    worst: dict[str, dict[str, Any]] = {}
    for row in confusion:
        before = worst.get(row["class"])
        if row["class"] != row["predicted"] and (not before or row["images"] > before["images"]):
            worst[row["class"]] = row
    rows = []
    for code, name in enumerate(names):
        ranks = found.ranks[labels == code]
        if not len(ranks):
            continue
        hits = int(np.sum(ranks == 1))
        low, high = wilson(hits / len(ranks), len(ranks))
        row = {
            "class": name,
            "images": len(ranks),
            "top1": hits / len(ranks),
            "top1_low": low,
            "top1_high": high,
        }
        if len(names) > TOP:
            row["top5"] = float(np.mean(ranks <= TOP))
        taken = worst.get(name)
        row["mostly_taken_for"] = taken["predicted"] if taken else ""
        row["taken_for_it"] = taken["images"] if taken else 0
        rows.append(row)
    return rows
