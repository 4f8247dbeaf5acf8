"""VOC 2007 classification: a linear SVM for each class on frozen features, as VirTex measures."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from clip_lite_jax.config.types import STRICT, PositiveFloat, PositiveInt
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import DataError
from clip_lite_jax.evaluators.bootstrap import RESAMPLES
from clip_lite_jax.evaluators.labelled_features import (
    check_unseen,
    features_of,
    held_out_split,
)
from clip_lite_jax.evaluators.tasks import ALL, Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns
from clip_lite_jax.vectors import unit

PRESENT, ABSENT, DIFFICULT = 1, 0, -1
"""A picture's targets as VirTex has them; VOC's own files have -1 for absent, 0 for difficult."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class VocSVMOptions:
    train: tuple[str, ...] = ("train", "validation")
    """VOC's ``trainval``: those of these splits that there are."""
    split: str = ""
    """To measure on: ``test``."""
    costs: tuple[PositiveFloat, ...] = (0.01, 0.1, 1.0, 10.0)
    max_iter: PositiveInt = 2000


class VocSVM(TaskEvaluator):
    """Mean over classes of the average precision of one-against-all SVMs on unit features.

    For each class, of the costs C the one with the best mean average precision in threefold
    cross-validation (stratified, in the order of the pictures' names) is taken, and the SVM of that
    cost trained on all.  Penalty and squared hinge are L2's, an example of the class weighs twice.
    A class that is in a picture only in objects marked difficult is absent in training; in test the
    picture is left out for that class.

    VirTex's data set turns VOC's -1 (absent) into 0, and VOC's 0 (difficult) into -1; its script
    trains on both as -1 and drops -1 from the test.  Average precision is scikit-learn's, without
    interpolation, not that of 11 points of VOC's kit.

    Source: VirTex (arXiv 2006.06666), section 4.1, and its ``scripts/clf_voc07.py``, after Goyal et
    al. (arXiv 1905.01235).
    """

    def __init__(self, data: TaskData, options: VocSVMOptions) -> None:
        self.data, self.options = data, options
        self.split = held_out_split(data, options.split)
        # Where there is no test split the validation's pictures are measured on instead.
        instead = self.split if self.split == "validation" else ""
        train = [
            name
            for name in options.train
            if name != instead and (name == ALL or len(data.splits.get(name, ())))
        ]
        if not train:
            data.split(options.train[0] if options.train else "train")
        for name in train:
            check_unseen(data, self.split, train=name)
        self.train = [targets(data.split(name)) for name in train]
        self.test = targets(data.split(self.split))
        found = {name for some in (*self.train, self.test) for name in some.names}
        self.classes = tuple(sorted(found))
        if not self.classes:
            raise DataError(f"no picture of {', '.join(train)} or {self.split!r} has a label")
        size = sum(len(some.ids) for some in self.train)
        self.protocol = (
            f"{len(self.test.ids)} pictures of {self.split!r}, trained on {size} of "
            f"{'+'.join(train)}, {len(self.classes)} classes; LinearSVC on unit features, "
            f"C of {', '.join(f'{cost:g}' for cost in options.costs)} by average precision in 3 "
            "folds; difficult ones are negative in training and left out in test"
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        parts = [self._encoded(fns, some) for some in self.train]
        ids = np.concatenate([part[0] for part in parts])
        order = np.argsort(ids, kind="stable")  # folds follow it: VOC's lists are sorted
        train = np.concatenate([part[1] for part in parts])[order]
        known = np.concatenate([part[2] for part in parts])[order]
        _, test, truth = self._encoded(fns, self.test)
        rows: list[dict[str, Any]] = []
        scores = np.zeros(truth.shape)
        unfinished = 0
        for number, name in enumerate(self.classes):
            row = {"class": name, **_counts(known[:, number], truth[:, number])}
            if reason := _unusable(row, len(known)):
                rows.append(row | {"left_out": reason})
                continue
            fitted = fit_svm(train, known[:, number], self.options.costs, self.options.max_iter)
            unfinished += fitted.not_converged
            scores[:, number] = fitted.model.decision_function(test)
            precision = average_precision(scores[:, number], truth[:, number])
            row |= {"cost": fitted.cost, "cross_validation_ap": fitted.cross_validation}
            rows.append(row | {"average_precision": precision, "left_out": ""})
        used = [number for number, row in enumerate(rows) if "average_precision" in row]
        if not used:
            raise DataError(
                "no class has three training pictures with and without it, and one of both to test "
                f"on; the first: {rows[0]['class']}: {rows[0]['left_out']}"
            )
        low, high = interval(scores[:, used], truth[:, used])
        metrics = {
            "mean_average_precision": float(np.mean([rows[n]["average_precision"] for n in used])),
            "mean_average_precision_low": low,
            "mean_average_precision_high": high,
            "classes": float(len(used)),
            "classes_left_out": float(len(rows) - len(used)),
            "images": float(len(test)),
            "train_images": float(len(train)),
            "fits_not_converged": float(unfinished),
        }
        return Outcome(metrics, {"per_class": rows})

    def _encoded(
        self, fns: EncodeFns, some: "Targets"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids ``[N]``, unit features ``[N, F]`` and targets ``[N, classes]`` of what is usable."""
        features, kept = features_of(fns, self.data, some.source, np.arange(len(some.ids)))
        if not len(kept):
            raise DataError(f"none of {len(some.ids)} pictures can be used")
        return np.array(some.ids)[kept], unit(features), some.matrix(self.classes)[kept]


@dataclass(frozen=True)
class Targets:
    """What is in the pictures of a source."""

    source: Source
    ids: list[str]
    present: list[frozenset[str]]
    difficult: list[frozenset[str]]

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*self.present, *self.difficult)

    def matrix(self, classes: Iterable[str]) -> np.ndarray:
        """int ``[N, C]``: `PRESENT`, `ABSENT` or `DIFFICULT`."""
        rows = zip(self.present, self.difficult, strict=True)
        return np.array(
            [
                [PRESENT if c in easy else DIFFICULT if c in hard else ABSENT for c in classes]
                for easy, hard in rows
            ]
        )


def targets(source: Source) -> Targets:
    """The labels of all pictures of a source, those only in difficult objects apart."""
    examples = [source.metadata(index) for index in range(len(source))]
    hard = [_names(example, "difficult") for example in examples]
    every = [_names(example, "labels") | _names(example, "label") for example in examples]
    easy = [found - difficult for found, difficult in zip(every, hard, strict=True)]
    return Targets(source, [example.id for example in examples], easy, hard)


def _names(example: Example, attribute: str) -> frozenset[str]:
    return frozenset(example.attributes.get(attribute, "").split(",")) - {""}


def _counts(known: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    return {
        "train_positives": int(np.sum(known == PRESENT)),
        "test_positives": int(np.sum(truth == PRESENT)),
        "test_difficult": int(np.sum(truth == DIFFICULT)),
    }


def _unusable(row: dict[str, Any], train: int) -> str:
    """Why a class cannot be measured, or nothing."""
    if not 3 <= row["train_positives"] <= train - 3:
        return f"{row['train_positives']} of {train} training pictures; 3 folds need 3 on each side"
    if not row["test_positives"]:
        return "in no test picture"
    return ""


@dataclass(frozen=True)
class FittedSVM:
    model: LinearSVC
    cost: float
    cross_validation: float
    """Mean average precision of the three folds."""
    not_converged: int
    """Fits that reached `max_iter`."""


def fit_svm(
    features: np.ndarray, targets: np.ndarray, costs: Iterable[float], max_iter: int = 2000
) -> FittedSVM:
    """The SVM of one class on features ``[N, F]``, of the cost that cross-validates best.

    Of equally good costs the first is taken.  The problem is solved in its dual form, which was
    scikit-learn's default when the protocol was written; its order of coordinates is seeded.
    """
    labels = np.where(targets == PRESENT, 1, -1)
    best: tuple[float, float] | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        for cost in costs:
            folds = cross_val_score(
                _svc(cost, max_iter), features, labels, cv=3, scoring="average_precision"
            )
            if best is None or folds.mean() > best[0]:
                best = float(folds.mean()), cost
        if best is None:
            raise DataError("costs is empty: give one, such as 1.0")
        model = _svc(best[1], max_iter).fit(features, labels)
    slow = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return FittedSVM(model, best[1], best[0], slow)


def _svc(cost: float, max_iter: int) -> LinearSVC:
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=max_iter,
        random_state=0,
    )


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Of scores ``[N]`` and targets ``[N]``, difficult ones left out."""
    easy = truth != DIFFICULT
    return float(average_precision_score(truth[easy] == PRESENT, scores[easy]))


def interval(
    scores: np.ndarray, truth: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean average precision of ``[N, C]``, over pictures.

    A class that is in none of the pictures drawn counts in no mean of that draw.
    """
    rng = np.random.default_rng(seed)
    count = len(scores)
    means = np.empty(resamples)
    for start in range(0, resamples, at_once := max(1, 2**22 // count)):
        size = min(at_once, resamples - start)
        times = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        each = [
            _weighted_precision(scores[:, number], truth[:, number], times)
            for number in range(scores.shape[1])
        ]
        means[start : start + size] = np.nanmean(each, axis=0)
    low, high = np.nanquantile(means, (0.025, 0.975))
    return float(low), float(high)


def _weighted_precision(scores: np.ndarray, truth: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Average precision ``[R]`` where picture i occurs `times` ``[R, N]``; NaN without positives.

    As scikit-learn's: equal scores are one threshold.
    """
    easy = np.flatnonzero(truth != DIFFICULT)
    order = easy[np.argsort(-scores[easy], kind="stable")]
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    drawn = times[:, order]
    hits = np.cumsum(drawn * (truth[order] == PRESENT), axis=1)[:, ends]
    every = np.cumsum(drawn, axis=1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(every > 0, hits / every, 0)
        return np.asarray(np.sum(gained * precision, axis=1) / hits[:, -1])
