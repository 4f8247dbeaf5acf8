"""The held-out objective and what the critic's scores say about mutual information."""

import math
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass
from scipy.optimize import minimize
from scipy.special import expit

from clip_lite_jax.config import RetrievalConfig
from clip_lite_jax.config.types import STRICT, PositiveInt
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.pipeline import stable_hash
from clip_lite_jax.data.sources import IndependentPairs, Source
from clip_lite_jax.errors import DataError
from clip_lite_jax.evaluators.bootstrap import drawn_groups
from clip_lite_jax.evaluators.retrieval import Retrieval
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns

CHANCE_LOSS = 2 * math.log(2)
"""JSD loss of a critic that knows nothing, in nats."""

SMILE_TAU = 5.0
"""Scores of shuffled pairs are clipped to this, either way, for ``smile_estimate``."""


class Information:
    """Scores of held-out pairs, one caption each, against all other pairings of them.

    Pairs are used as they come, nothing masked and nothing weighted, so that P and Q are the joint
    distribution and the product of its marginals.

    A critic that was trained on chosen negatives has scores that are shifted and stretched, and
    the bounds are loose for it.  The ``calibrated_`` read-offs are those of scale · T + shift,
    fitted on one half of the pairs and read on the other, no group in both.  ``true_information``
    stands beside the read-offs where the source knows it.
    """

    def __init__(
        self,
        source: Source,
        inputs: TowerInputs,
        batch_size: int,
        captions: Literal["first", "joined"],
        max_pairs: int,
        bad: BadExamples,
    ) -> None:
        gallery = RetrievalConfig(
            name="information", validation="", test="", captions=captions, max_images=max_pairs
        )
        self.pairs = Retrieval(gallery, source, inputs, batch_size, bad)
        self.known = (
            {"true_information": source.true_information}
            if isinstance(source, IndependentPairs)
            else {}
        )

    def run(self, fns: EncodeFns) -> dict[str, float]:
        scores = self.pairs.scores(fns)
        groups = np.array([stable_hash(example.group) for example in self.pairs.examples])
        return (
            read_offs(*matched_and_shuffled(scores))
            | intervals(scores, groups)
            | infonce_read_offs(scores)
            | calibrated_read_offs(scores, groups, fit=groups % 2 == 0)
            | self.known
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InformationOptions:
    split: str = "test"
    captions: Literal["first", "joined"] = "first"
    max_pairs: PositiveInt = 1024


class InformationTask(TaskEvaluator):
    """`Information` on a source of any kind."""

    def __init__(self, data: TaskData, options: InformationOptions) -> None:
        source = data.split(options.split)
        self.evaluator = Information(
            source, data.inputs, data.batch_size, options.captions, options.max_pairs, data.bad
        )
        pairs = len(self.evaluator.pairs.examples)
        if pairs < 2:
            raise DataError(f"split {options.split!r} has {pairs} usable pairs: two are needed")
        self.protocol = (
            f"split {options.split}; {pairs} pairs, the {options.captions} caption of each; every "
            "other pairing is a draw from the marginals, nothing masked; nats; intervals by "
            "resampling groups"
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        return Outcome(self.evaluator.run(fns))


def matched_and_shuffled(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``[N, N]`` of N pairs → of the pairs ``[N]``, and of all others ``[N (N - 1)]``."""
    return np.diagonal(scores), scores[~np.eye(len(scores), dtype=bool)]


def infonce_read_offs(scores: np.ndarray) -> dict[str, float]:
    """InfoNCE of scores ``[N, N]``, each row and column a choice among N; in nats.

    The lower bound, log N minus the loss, holds in expectation for any critic and never exceeds
    log N (CPC, arXiv 1807.03748, eq. 5).
    """
    once = np.ones((1, len(scores)))
    bound = float(_infonce_bounds(scores.astype(np.float64), once)[0])
    return {"infonce_loss": math.log(len(scores)) - bound, "infonce_lower_bound": bound}


def _infonce_bounds(scores: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The bound ``[R]`` of scores ``[N, N]`` where example i occurs `weight` ``[R, N]`` times.

    Copies of an example meet as candidates only once, for they are no evidence against each other:
    a row that occurs w times chooses among w - 1 fewer.
    """
    candidates = np.log(weight.sum(axis=1, keepdims=True) - np.maximum(weight, 1) + 1)  # [R, N]
    bounds = []
    for matrix in (scores, scores.T):
        top = matrix.max(axis=1, keepdims=True)
        odds = np.exp(matrix - top)
        own = np.diagonal(odds).copy()
        np.fill_diagonal(odds, 0.0)
        losses = np.log(weight @ odds.T + own) + top[:, 0] - np.diagonal(matrix)  # [R, N]
        bounds.append(np.sum(weight * (candidates - losses), axis=1) / weight.sum(axis=1))
    return np.mean(bounds, axis=0)


def intervals(
    scores: np.ndarray, groups: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """95 % intervals, ``NAME_low`` and ``NAME_high``, of read-offs of scores ``[N, N]``, in nats.

    Percentile bootstrap over the groups ``[N]``, drawn with replacement: drawings of one thing are
    not independent evidence.  However often an example is drawn, it never meets its own partner as
    a shuffled one.  Source: Efron and Tibshirani (1993), ch. 13.
    """
    weight = drawn_groups(groups, resamples, seed)  # [resamples, N]

    def mean_p(values: np.ndarray) -> np.ndarray:
        return weight @ values / weight.sum(axis=1)

    def mean_q(values: np.ndarray) -> np.ndarray:
        others = np.where(np.eye(len(values), dtype=bool), 0.0, values)
        total = np.sum((weight @ others) * weight, axis=1)
        return total / (weight.sum(axis=1) ** 2 - np.sum(weight**2, axis=1))

    scores = scores.astype(np.float64)
    own = np.diagonal(scores)
    top = scores.max()
    clipped = np.exp(np.clip(scores, -SMILE_TAU, SMILE_TAU))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # worthless bounds are -inf
        log_mean_exp = np.log(mean_q(np.exp(scores - top))) + top
        samples = {
            "jsd_loss": mean_p(np.logaddexp(0, -own)) + mean_q(np.logaddexp(0, scores)),
            "score_positive": mean_p(own),
            # Finite, so that quantiles can be taken between two worthless ones.
            "nwj_lower_bound": 1 + mean_p(own) - np.exp(np.minimum(log_mean_exp, 700)),
            "dv_estimate": mean_p(own) - log_mean_exp,
            "smile_estimate": mean_p(own) - np.log(mean_q(clipped)),
            "infonce_lower_bound": _infonce_bounds(scores, weight),
        }
    ends = {name: np.nanquantile(sample, (0.025, 0.975)) for name, sample in samples.items()}
    ends["jsd_lower_bound"] = np.array([certified_bound(loss) for loss in ends["jsd_loss"][::-1]])
    return {
        f"{name}_{end}": float(value)
        for name, pair in ends.items()
        for end, value in zip(("low", "high"), pair, strict=True)
    }


def calibrated_read_offs(
    scores: np.ndarray, groups: np.ndarray, fit: np.ndarray
) -> dict[str, float]:
    """The loss and the lower bounds after `calibrate` on the pairs where `fit` ``[N]`` is True.

    Empty where a part has fewer than two pairs.
    """
    parts = [scores[np.ix_(rows, rows)].astype(np.float64) for rows in (fit, ~fit)]
    if min(len(part) for part in parts) < 2:
        return {}
    fitted, held_out = parts
    scale, shift = calibrate(*matched_and_shuffled(fitted))
    calibrated = scale * held_out + shift
    values = read_offs(*matched_and_shuffled(calibrated)) | intervals(calibrated, groups[~fit])
    wanted = ("jsd_loss", "jsd_lower_bound", "nwj_lower_bound", "pairs")
    chosen = {
        f"calibrated_{name}": value
        for name, value in values.items()
        if name.removesuffix("_low").removesuffix("_high") in wanted
    }
    return chosen | {"calibration_scale": scale, "calibration_shift": shift}


def calibrate(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """The scale and shift that minimise the JSD loss of scale · T + shift; a convex problem.

    Source: Platt (1999), with both classes at equal weight.
    """
    positive, negative = positive.astype(np.float64), negative.astype(np.float64)

    def loss(scale_shift: np.ndarray) -> tuple[float, np.ndarray]:
        p, q = (scale_shift[0] * part + scale_shift[1] for part in (positive, negative))
        pull, push = -expit(-p) / len(p), expit(q) / len(q)
        value = np.mean(np.logaddexp(0, -p)) + np.mean(np.logaddexp(0, q))
        return float(value), np.array([pull @ positive + push @ negative, pull.sum() + push.sum()])

    scale, shift = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B").x
    return float(scale), float(shift)


def read_offs(positive: np.ndarray, negative: np.ndarray) -> dict[str, float]:
    """Mutual information read off critic scores under P ``[N]`` and Q ``[M]``, in nats.

    Only names that say ``lower_bound`` are lower bounds, whatever the critic: ``nwj_lower_bound``,
    NWJ at T + 1 (arXiv 0809.0853), in expectation, and ``jsd_lower_bound`` (`certified_bound`) for
    the expected loss.  Read off few pairs, either can come out above the information by chance.
    ``score_positive`` estimates the information at the optimum T = log r and bounds nothing.
    ``dv_estimate`` would be a bound if the logarithm of the mean of exp T were known; of a sample
    it is too low in expectation, and the estimate too high.  ``smile_estimate`` is the same with
    clipped scores (arXiv 1910.06222, eq. 14) and no bound either.
    """
    positive, negative = positive.astype(np.float64), negative.astype(np.float64)
    loss = float(np.mean(np.logaddexp(0, -positive)) + np.mean(np.logaddexp(0, negative)))
    # exp overflows only where the bound is worthless anyway; -inf says so.
    log_mean_exp = float(np.logaddexp.reduce(negative) - math.log(len(negative)))
    nwj = (
        1 + float(np.mean(positive)) - (math.exp(log_mean_exp) if log_mean_exp < 700 else math.inf)
    )
    clipped = np.mean(np.exp(np.clip(negative, -SMILE_TAU, SMILE_TAU)))
    accuracy = (float(np.mean(positive > 0)) + float(np.mean(negative < 0))) / 2
    return {
        "jsd_loss": loss,
        "jsd_loss_chance": CHANCE_LOSS,
        "score_positive": float(np.mean(positive)),
        "score_negative": float(np.mean(negative)),
        "critic_accuracy": accuracy,
        "jsd_lower_bound": certified_bound(loss),
        "nwj_lower_bound": nwj,
        "dv_estimate": float(np.mean(positive)) - log_mean_exp,
        "smile_estimate": float(np.mean(positive) - np.log(clipped)),
        "pairs": len(positive),
    }


def certified_bound(jsd_loss: float) -> float:
    """A lower bound on the mutual information from the JSD loss of *any* critic, in nats.

    With D = log 2 - loss / 2, which never exceeds JSD(P || Q), the information is at least log c,
    where D = log 2 - log(1 + 1/c) / 2 - log(1 + c) / (2 c): among all density ratios with that
    divergence the one that takes only the values 0 and c has the least information.  The map is
    convex and never below 0, so the noise of a finite sample raises its mean: apply it to the mean
    loss of many pairs, not to batches.
    """
    divergence = math.log(2) - jsd_loss / 2
    if math.isnan(divergence):
        return math.nan
    if divergence <= 0:
        return 0.0

    def divergence_at(log_c: float) -> float:
        log_1p_c = float(np.logaddexp(0, log_c))
        log_1p_inverse = float(np.logaddexp(0, -log_c))
        return math.log(2) - log_1p_inverse / 2 - math.exp(-log_c) * log_1p_c / 2

    low, high = 0.0, 700.0  # divergence_at rises from 0 to log 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence_at(middle) < divergence else (low, middle)
    return low
