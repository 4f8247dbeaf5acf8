"""Whether σ(T) is the probability that a pair is real, before and after a scale and a shift.

A pair is real, or its caption is another's, with even odds.  Scale and shift are fitted on one set
of pairs (Platt, 1999) and judged on another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from scipy.special import expit

from clip_lite_jax.config import RetrievalConfig
from clip_lite_jax.config.types import STRICT, PositiveInt
from clip_lite_jax.data.pipeline import stable_hash
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.bootstrap import drawn_groups
from clip_lite_jax.evaluators.information import calibrate
from clip_lite_jax.evaluators.pair_scores import other_captions
from clip_lite_jax.evaluators.retrieval import Retrieval
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns

BINS = 15
"""As Guo et al. (arXiv 1706.04599)."""


@dataclass(frozen=True)
class Calibration:
    """σ(scale · T + shift) is the probability that a pair is real, at even odds."""

    scale: float = 1.0
    shift: float = 0.0

    def logit(self, scores: np.ndarray) -> np.ndarray:
        return self.scale * np.asarray(scores, np.float64) + self.shift

    def probability(self, scores: np.ndarray) -> np.ndarray:
        return expit(self.logit(scores))


@dataclass(frozen=True)
class Trials:
    """Real pairs and wrong ones: N images, each with its caption and with K of other images."""

    real: np.ndarray  # float64 [N]
    wrong: np.ndarray  # float64 [N, K]
    valid: np.ndarray  # bool [N, K]: a caption of the same thing is not wrong
    other: np.ndarray  # int64 [N, K]: the pair that the wrong caption comes from
    groups: np.ndarray  # [N]

    def usable(self) -> bool:
        return len(self.real) > 1 and bool(self.valid.any())

    def fit(self) -> Calibration:
        """Raises `DataError` where there is no wrong pair to compare with."""
        if not self.usable():
            raise DataError(
                f"{len(self.real)} pairs cannot calibrate: two of different things are needed"
            )
        return Calibration(*calibrate(self.real, self.wrong[self.valid]))

    def flat(self, times: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, whether each is real, and weights, half of them for either kind: ``[M]`` each.

        `times` ``[N]`` is how often each pair occurs; a wrong pair then occurs as often as its
        image times its caption.
        """
        times = np.ones(len(self.real)) if times is None else times
        weight = (times[:, None] * times[self.other])[self.valid]
        scores = np.concatenate([self.real, self.wrong[self.valid]])
        real = np.arange(len(scores)) < len(self.real)
        halves = [part / max(part.sum(), 1e-300) / 2 for part in (times, weight)]
        return scores, real, np.concatenate(halves)


def trials_of(
    scores: np.ndarray, groups: np.ndarray, captions: np.ndarray, wrong: int = 16, seed: int = 0
) -> Trials:
    """Trials from scores ``[N, N]`` of N pairs with their `groups` and `captions`.

    The wrong captions of all images are, K times, a random derangement of the captions.
    """
    count = len(scores)
    # Rolls of one random order by different steps: no pairing twice, none a pair's own.
    order = np.random.default_rng(seed).permutation(count)
    place = np.argsort(order)
    steps = 1 + np.arange(min(wrong, max(count - 1, 0)))
    other = order[(place[:, None] + steps) % max(count, 1)]
    valid = other_captions(groups, captions, np.arange(count))
    rows = np.arange(count)[:, None]
    scores = scores.astype(np.float64)
    return Trials(np.diagonal(scores), scores[rows, other], valid[rows, other], other, groups)


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins, low to high; empty bins are left out."""

    predicted: np.ndarray  # float64 [B]: mean probability
    observed: np.ndarray  # float64 [B]: share that is real
    weight: np.ndarray  # float64 [B]: sum 1

    @property
    def error(self) -> float:
        """The expected calibration error: mean distance of predicted and observed."""
        return float(self.weight @ np.abs(self.predicted - self.observed))


def equal_width(probability: np.ndarray, weight: np.ndarray, bins: int) -> np.ndarray:
    """Inner edges ``[bins - 1]`` that part [0, 1] evenly."""
    del probability, weight
    return np.linspace(0, 1, bins + 1)[1:-1]


def equal_mass(probability: np.ndarray, weight: np.ndarray, bins: int) -> np.ndarray:
    """Inner edges that put equal weight into every bin, as far as ties allow."""
    order = np.argsort(probability, kind="stable")
    reached = np.cumsum(weight[order])
    # A hair less, so that sums that are off in the last bit fall on the right side.
    wanted = np.arange(1, bins) / bins * reached[-1] * (1 - 1e-12)
    return np.unique(probability[order][np.searchsorted(reached, wanted)])


BINNINGS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "equal_width": equal_width,
    "equal_mass": equal_mass,
}


def reliability(
    probability: np.ndarray,
    real: np.ndarray,
    weight: np.ndarray | None = None,
    bins: int = BINS,
    binning: str = "equal_width",
) -> Reliability:
    """Bins of predictions ``[M]``; a bin holds what is above its lower edge, and its upper edge."""
    if binning not in BINNINGS:
        raise ConfigError(f"binning {binning!r}: choose from {', '.join(BINNINGS)}")
    probability = np.asarray(probability, np.float64)
    weight = np.ones(len(probability)) if weight is None else np.asarray(weight, np.float64)
    if not weight.sum() > 0:
        nothing = np.zeros(0)
        return Reliability(nothing, nothing, nothing)
    edges = BINNINGS[binning](probability, weight, bins)
    bin_of = np.searchsorted(edges, probability, side="left")
    sums = [
        np.bincount(bin_of, weight * values, len(edges) + 1)
        for values in (np.ones(len(probability)), probability, np.asarray(real, np.float64))
    ]
    filled = sums[0] > 0
    mass, predicted, observed = (total[filled] for total in sums)
    return Reliability(predicted / mass, observed / mass, mass / mass.sum())


def quality(calibration: Calibration, trials: Trials, bins: int = BINS) -> dict[str, float]:
    """ECE with both binnings, Brier score and log loss (nats) of σ(scale · T + shift)."""
    return _quality(calibration, trials.flat(), bins)


def _quality(
    calibration: Calibration, flat: tuple[np.ndarray, np.ndarray, np.ndarray], bins: int
) -> dict[str, float]:
    scores, real, weight = flat
    logit = calibration.logit(scores)
    probability = expit(logit)
    return {
        "ece": reliability(probability, real, weight, bins).error,
        "ece_equal_mass": reliability(probability, real, weight, bins, "equal_mass").error,
        "brier": float(weight @ (probability - real) ** 2),
        "log_loss": float(weight @ np.logaddexp(0, np.where(real, -logit, logit))),
    }


def quality_with_intervals(
    calibration: Calibration,
    trials: Trials,
    bins: int = BINS,
    resamples: int = 300,
    seed: int = 0,
) -> dict[str, float]:
    """`quality`, with 95 % intervals ``NAME_low`` and ``NAME_high``.

    Percentile bootstrap over the groups of images and, with them, of captions.  An ECE of few pairs
    comes out too high, for noise adds to every bin, and resampling adds some more: its interval
    lies above the truth rather than below.
    """
    found = quality(calibration, trials, bins)
    samples: dict[str, list[float]] = {name: [] for name in found}
    for times in drawn_groups(trials.groups, resamples, seed):
        for name, value in _quality(calibration, trials.flat(times), bins).items():
            samples[name].append(value)
    for name, values in samples.items():
        low, high = np.quantile(values, (0.025, 0.975))
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class CalibrationOptions:
    """Of the task ``calibration``."""

    fit: str = "validation"
    """Split whose pairs choose scale and shift."""
    read: str = "test"
    """Split that is judged; where it is `fit`, the groups are halved, one half for each."""
    captions: Literal["first", "joined"] = "first"
    max_images: PositiveInt = 2000
    """Of either split."""
    wrong: PositiveInt = 16
    """Wrong captions of an image: so many derangements."""
    bins: PositiveInt = Field(default=BINS)


class CalibrationTask(TaskEvaluator):
    """ECE, Brier score and log loss of σ(T) as it is and after calibration."""

    def __init__(self, data: TaskData, options: CalibrationOptions) -> None:
        self.options = options
        self.galleries = {
            split: Retrieval(
                RetrievalConfig(
                    name=split,
                    validation="",
                    test="",
                    captions=options.captions,
                    max_images=options.max_images,
                ),
                data.split(split),
                data.inputs,
                data.batch_size,
                data.bad,
            )
            for split in dict.fromkeys((options.fit, options.read))
        }
        for split, gallery in self.galleries.items():
            if len({example.group for example in gallery.examples}) < 2:
                raise DataError(
                    f"calibration: split {split!r} has no two pairs of different things"
                )
        sizes = " and ".join(f"{len(some.examples):,}" for some in self.galleries.values())
        halved = " halved by group" if options.fit == options.read else ""
        captions = {"first": "the first caption of each", "joined": "captions of each joined"}
        used = (
            f"{sizes} pairs{halved}, at most {options.max_images:,} of a split by a hash of ids, "
            f"{captions[options.captions]}"
        )
        self.protocol = (
            f"scale and shift fitted on {options.fit!r}, judged on {options.read!r} ({used}); "
            f"real pairs and {options.wrong} derangements of their captions at even odds, captions "
            f"of the same group or text left out; {options.bins} bins, equally wide and of equal "
            "mass; 95 % intervals by bootstrap over groups"
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        scores = {split: gallery.scores(fns) for split, gallery in self.galleries.items()}
        fit, read = self.options.fit, self.options.read
        if fit == read:
            return self.judged(*self.halves(scores))
        return self.judged(self.of(fit, scores), self.of(read, scores))

    def judged(self, fit: Trials, read: Trials) -> Outcome:
        """Fitted on the first, judged by the second."""
        bins, calibration = self.options.bins, fit.fit()
        after = quality_with_intervals(calibration, read, bins)
        before = quality_with_intervals(Calibration(), read, bins)
        metrics = after | {f"uncalibrated_{name}": value for name, value in before.items()}
        metrics |= {"scale": calibration.scale, "shift": calibration.shift}
        metrics |= {"pairs": len(read.real), "fitted_on": len(fit.real)}
        tables = {
            "reliability_uncalibrated": reliability_rows(Calibration(), read, bins),
            "reliability_calibrated": reliability_rows(calibration, read, bins),
        }
        return Outcome(metrics, tables)

    def halves(self, scores: Mapping[str, np.ndarray]) -> tuple[Trials, Trials]:
        """Of the split to fit on, no group in both; raises `DataError` where one is too small."""
        split = self.options.fit
        groups = [example.group for example in self.galleries[split].examples]
        even = np.array([stable_hash(group) % 2 == 0 for group in groups])
        fit, read = (self.of(split, scores, half) for half in (even, ~even))
        return fit, read

    def of(
        self, split: str, scores: Mapping[str, np.ndarray], rows: np.ndarray | None = None
    ) -> Trials:
        """The pairs of a split, or those where `rows` ``[N]`` is True, with wrong ones."""
        gallery = self.galleries[split]
        rows = np.ones(len(gallery.examples), bool) if rows is None else rows
        groups = np.array([example.group for example in gallery.examples])[rows]
        captions = np.array(gallery.captions)[rows]
        trials = trials_of(scores[split][np.ix_(rows, rows)], groups, captions, self.options.wrong)
        if not trials.usable():
            raise DataError(f"calibration: {len(groups)} pairs of {split!r} are too few")
        return trials


def reliability_rows(
    calibration: Calibration, trials: Trials, bins: int = BINS
) -> list[dict[str, Any]]:
    """The points of a reliability plot, equally wide bins, as plain values."""
    scores, real, weight = trials.flat()
    points = reliability(calibration.probability(scores), real, weight, bins)
    columns = (points.predicted, points.observed, points.weight)
    return [
        {"predicted": float(p), "observed": float(o), "share": float(w)}
        for p, o, w in zip(*columns, strict=True)
    ]
