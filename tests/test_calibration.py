"""Is σ(T) the probability that a pair is real?  Against loops, scikit-learn and known answers."""

import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.calibration import (
    Calibration,
    Trials,
    quality,
    quality_with_intervals,
    reliability,
    trials_of,
)
from clip_lite_jax.evaluators.pair_scores import contrasts, other_captions, ranks_among


def brute_force_ece(
    probability: np.ndarray, real: np.ndarray, weight: np.ndarray, edges: list[float]
) -> float:
    """The definition, bin by bin: each holds what is above its lower edge, and its upper edge."""
    total = 0.0
    for low, high in zip([-math.inf, *edges], [*edges, math.inf], strict=True):
        rows = [i for i, p in enumerate(probability) if low < p <= high]
        mass = sum(weight[i] for i in rows)
        if mass:
            confidence = sum(weight[i] * probability[i] for i in rows) / mass
            share = sum(weight[i] * real[i] for i in rows) / mass
            total += mass * abs(confidence - share)
    return total / float(np.sum(weight))


def predictions(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    probability = {
        "spread": rng.random(200),
        "ties": rng.integers(0, 6, 200) / 5,  # on edges of bins, 0 and 1 among them
        "one bin": 0.5 + 0.01 * rng.random(200),
        "one value": np.full(200, 0.3),
        "one item": np.array([0.7]),
    }[kind]
    count = len(probability)
    return probability, rng.random(count) < probability, rng.random(count) + 0.1


KINDS = ("spread", "ties", "one bin", "one value", "one item")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [1, 5, 15])
def test_ece_of_bins_of_equal_width_is_the_definition(kind: str, bins: int) -> None:
    probability, real, weight = predictions(kind)
    edges = np.linspace(0, 1, bins + 1)[1:-1].tolist()
    for weights in (weight, np.ones(len(weight))):
        expected = brute_force_ece(probability, real, weights, edges)
        assert reliability(probability, real, weights, bins).error == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_ece_of_bins_of_equal_mass_is_the_definition(kind: str) -> None:
    probability, real, weight = predictions(kind)
    order = np.argsort(probability)
    edges = []
    for part in range(1, 5):  # the value where so much of the weight is reached
        reached = 0.0
        for i in order:
            reached += weight[i]
            if reached >= part / 5 * weight.sum() - 1e-9:
                edges.append(float(probability[i]))
                break
    found = reliability(probability, real, weight, 5, "equal_mass")
    expected = brute_force_ece(probability, real, weight, sorted(set(edges)))
    assert found.error == pytest.approx(expected)
    assert found.weight.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("binning", "theirs"), [("equal_width", "uniform"), ("equal_mass", "quantile")]
)
def test_points_are_those_of_scikit_learn(binning: str, theirs: str) -> None:
    probability, real, _ = predictions("spread")
    found = reliability(probability, real, None, 10, binning)
    observed, predicted = calibration_curve(real, probability, n_bins=10, strategy=theirs)
    np.testing.assert_allclose(found.predicted, predicted)
    np.testing.assert_allclose(found.observed, observed)


def test_bins_are_named() -> None:
    with pytest.raises(ConfigError, match="choose from equal_width, equal_mass"):
        reliability(np.array([0.5]), np.array([True]), binning="even")


def some_trials(count: int = 60, seed: int = 0) -> Trials:
    rng = np.random.default_rng(seed)
    scores = rng.normal(-1, 1, (count, count)) + 3 * np.eye(count)
    groups = np.array([f"g{i // 2}" for i in range(count)])
    captions = np.array([f"c{i if i else 5}" for i in range(count)])
    return trials_of(scores, groups, captions, wrong=7)


def test_trials_are_derangements_without_captions_that_fit() -> None:
    trials = some_trials()
    rows = np.arange(60)
    assert np.all(trials.other != rows[:, None])
    for column in trials.other.T:
        assert sorted(column) == rows.tolist()
    for i in rows:
        assert len(set(trials.other[i])) == 7
        for place, j in enumerate(trials.other[i]):
            same = i // 2 == j // 2 or {i, j} == {0, 5}
            assert trials.valid[i, place] == (not same)


def test_quality_is_that_of_scikit_learn_with_both_kinds_at_half() -> None:
    trials = some_trials()
    calibration = Calibration(0.8, -0.3)
    found = quality(calibration, trials)
    wrong = trials.wrong[trials.valid]
    probability = expit(0.8 * np.concatenate([trials.real, wrong]) - 0.3)
    real = np.arange(len(probability)) < 60
    weight = np.where(real, 0.5 / 60, 0.5 / len(wrong))
    assert found["brier"] == pytest.approx(
        brier_score_loss(real, probability, sample_weight=weight)
    )
    assert found["log_loss"] == pytest.approx(log_loss(real, probability, sample_weight=weight))
    edges = np.linspace(0, 1, 16)[1:-1].tolist()
    assert found["ece"] == pytest.approx(brute_force_ece(probability, real, weight, edges))


def test_the_fit_is_that_of_logistic_regression() -> None:
    trials = some_trials()
    scores, real, weight = trials.flat()
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    theirs.fit(scores[:, None], real, sample_weight=weight)
    fitted = trials.fit()
    assert fitted.scale == pytest.approx(theirs.coef_[0, 0], rel=1e-3)
    assert fitted.shift == pytest.approx(theirs.intercept_[0], rel=1e-3)


def test_a_shifted_and_stretched_log_ratio_is_mended() -> None:
    """Of two Gaussians log r is linear: what was made of it is undone, up to chance."""
    rng = np.random.default_rng(1)

    def trials(count: int) -> Trials:
        real, wrong = rng.normal(1, 1, count), rng.normal(-1, 1, (count, 4))
        # log r = 2 x; the critic says T = x - 2
        valid, other = np.ones((count, 4), bool), rng.integers(0, count, (count, 4))
        return Trials(real - 2, wrong - 2, valid, other, np.arange(count))

    fitted = trials(4000).fit()
    assert fitted.scale == pytest.approx(2, abs=0.15)
    assert fitted.shift == pytest.approx(4, abs=0.3)
    read = trials(4000)
    assert quality(Calibration(), read)["ece"] > 0.15
    assert quality(fitted, read)["ece"] < 0.02


def test_intervals_resample_groups() -> None:
    trials = some_trials()
    found = quality_with_intervals(Calibration(), trials, resamples=100)
    for name, value in quality(Calibration(), trials).items():
        assert found[name] == value
        assert found[f"{name}_low"] < found[f"{name}_high"]
    assert found["brier_low"] < found["brier"] < found["brier_high"]
    times = np.ones(60)
    times[:2] = 0  # one group is not drawn
    _, real, weight = trials.flat(times)
    assert weight[:2].tolist() == [0, 0]
    assert weight[real].sum() == pytest.approx(0.5)
    kept = ~np.isin(trials.other[trials.valid], [0, 1])
    kept &= ~np.isin(np.nonzero(trials.valid)[0], [0, 1])
    np.testing.assert_allclose(weight[~real], kept / kept.sum() / 2)


def test_too_few_pairs_are_refused() -> None:
    one = trials_of(np.zeros((1, 1)), np.array(["a"]), np.array(["x"]))
    alike = trials_of(np.zeros((2, 2)), np.array(["a", "a"]), np.array(["x", "y"]))
    for trials in (one, alike):
        with pytest.raises(DataError, match="two of different things"):
            trials.fit()


def test_ranks_and_contrasts_are_the_definition() -> None:
    rng = np.random.default_rng(2)
    own, others = rng.integers(0, 4, 9).astype(float), rng.integers(0, 4, (9, 6)).astype(float)
    valid = rng.random((9, 6)) < 0.7
    valid[3] = False
    rank, count = ranks_among(own, others, valid)
    found = contrasts(own, others, valid)
    for i in range(9):
        seen = [others[i, j] for j in range(6) if valid[i, j]]
        assert count[i] == len(seen)
        assert rank[i] == 1 + sum(score >= own[i] for score in seen)
        if seen:
            mean = math.log(sum(map(math.exp, seen)) / len(seen))
            assert found[i] == pytest.approx(own[i] - mean)
        else:
            assert math.isnan(found[i])


def test_other_captions_are_of_other_groups_and_texts() -> None:
    groups, owner = np.array(["a", "a", "b"]), np.array([0, 1, 1, 2])
    captions = np.array(["cat", "tom", "pet", "pet"])
    expected = [
        [False, False, False, True],
        [False, False, False, False],
        [True, True, False, False],
    ]
    assert other_captions(groups, captions, owner).tolist() == expected
