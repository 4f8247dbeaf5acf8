"""Each objective against its closed form in NumPy, float64: value and gradient."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.objectives import (
    OBJECTIVES,
    OPTIMAL_CRITIC,
    STREAMED,
    Scores,
    Totals,
    build_objective,
)
from clip_lite_jax.objectives.bounds import reduce_rows


def make_scores(sides: int, k: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    pair_valid = np.array([1, 1, 0, 1, 1, 1], bool)
    return Scores(
        positive=rng.normal(size=6) * 3,
        negative=rng.normal(size=(sides, 6, k)) * 3,
        valid=(rng.random((sides, 6, k)) < 0.7) & pair_valid[:, None],
        log_weight=rng.normal(size=(sides, 6, k)) * 0.1,
        positive_valid=pair_valid,
    )


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def jsd_closed_form(s: Scores) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and its gradients with respect to the positive and the negative scores."""
    weight = np.exp(s.log_weight) * s.valid
    n_p, n_q = s.positive_valid.sum(), s.valid.sum()
    loss = (softplus(-s.positive) * s.positive_valid).sum() / n_p
    loss += (weight * softplus(s.negative)).sum() / n_q
    return (
        loss,
        -sigmoid(-s.positive) * s.positive_valid / n_p,
        weight * sigmoid(s.negative) / n_q,
    )


def infonce_closed_form(s: Scores) -> tuple[float, np.ndarray, np.ndarray]:
    sides = s.negative.shape[0]
    n = sides * s.positive_valid.sum()
    loss, d_positive, d_negative = 0.0, np.zeros(6), np.zeros(s.negative.shape)
    for side in range(sides):
        for i in np.flatnonzero(s.positive_valid):
            keep = s.valid[side, i]
            logits = (s.negative[side, i] + s.log_weight[side, i])[keep]
            total = np.exp(s.positive[i]) + np.exp(logits).sum()
            loss += (np.log(total) - s.positive[i]) / n
            d_positive[i] += (np.exp(s.positive[i]) / total - 1) / n
            d_negative[side, i, keep] += np.exp(logits) / total / n
    return loss, d_positive, d_negative


def nwj_closed_form(s: Scores) -> tuple[float, np.ndarray, np.ndarray]:
    weight = np.exp(s.log_weight) * s.valid / s.valid.sum()
    pairs = s.positive_valid / s.positive_valid.sum()
    d_negative = weight * np.exp(s.negative - 1)
    return d_negative.sum() - (pairs * s.positive).sum(), -pairs, d_negative


def sigmoid_closed_form(s: Scores) -> tuple[float, np.ndarray, np.ndarray]:
    sides = s.negative.shape[0]
    n_p = s.positive_valid.sum()
    # The negatives of a pair that is not valid are not valid either: `negatives` sees to it.
    weight = np.exp(s.log_weight) * s.valid * s.positive_valid[:, None] / (sides * n_p)
    loss = (softplus(-s.positive) * s.positive_valid).sum() / n_p
    loss += (weight * softplus(s.negative)).sum()
    return (
        loss,
        -sigmoid(-s.positive) * s.positive_valid / n_p,
        weight * sigmoid(s.negative),
    )


def smile_closed_form(s: Scores) -> tuple[float, np.ndarray, np.ndarray]:
    """The value of the clipped estimate, the gradient of the Jensen–Shannon bound."""
    _, d_positive, d_negative = jsd_closed_form(s)
    clipped = np.exp(np.clip(s.negative, -5, 5) + s.log_weight)
    estimate = s.positive[s.positive_valid].mean() - np.log(clipped[s.valid].mean())
    return -estimate, d_positive, d_negative


def dv_closed_form(s: Scores) -> tuple[float, np.ndarray, np.ndarray]:
    pairs = s.positive_valid / s.positive_valid.sum()
    weighted = np.exp(s.negative + s.log_weight) * s.valid
    loss = np.log(weighted.sum() / s.valid.sum()) - (pairs * s.positive).sum()
    return loss, -pairs, weighted / weighted.sum()


CLOSED_FORMS = {
    "dv": dv_closed_form,
    "infonce": infonce_closed_form,
    "jsd": jsd_closed_form,
    "nwj": nwj_closed_form,
    "sigmoid": sigmoid_closed_form,
    "smile": smile_closed_form,
}


def test_every_objective_has_a_closed_form() -> None:
    assert CLOSED_FORMS.keys() == OBJECTIVES.keys() == OPTIMAL_CRITIC.keys()


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(("sides", "k"), [(1, 1), (2, 1), (2, 5)])
def test_value_and_gradient_equal_closed_form(name: str, sides: int, k: int) -> None:
    scores = make_scores(sides, k)
    objective = build_objective(name)

    def loss(positive: jax.Array, negative: jax.Array) -> jax.Array:
        return objective(scores.replace(positive=positive, negative=negative))[0]

    with jax.enable_x64(True):
        value, grads = jax.value_and_grad(loss, (0, 1))(scores.positive, scores.negative)
    expected, *expected_grads = CLOSED_FORMS[name](scores)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_and_masked_scores_stay_finite(name: str) -> None:
    scores = make_scores(2, 3)
    # A slot that is masked may hold anything, also what a broken example produced.
    scores = scores.replace(
        positive=np.where(scores.positive_valid, [1e4, -1e4, 0, 1, 2, 3], np.nan),
        # Only where the loss itself is an exponential may a huge score overflow.
        negative=np.where(scores.valid, 50.0 if name in ("nwj", "dv") else 1e4, np.nan),
    )
    objective = build_objective(name)
    value, grad = jax.value_and_grad(lambda p: objective(scores.replace(positive=p))[0])(
        jnp.asarray(scores.positive)
    )
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_valid_negative_at_all(name: str) -> None:
    scores = make_scores(1, 1)
    scores = scores.replace(valid=np.zeros_like(scores.valid))
    value, metrics = build_objective(name)(scores)
    assert np.isfinite(value)
    assert metrics["valid_negatives"] == 0


def test_dv_divides_its_gradient_by_the_moving_average() -> None:
    """MINE's correction: the batch's own normaliser is replaced by one over the steps."""
    scores, decay, before = make_scores(2, 3), 0.9, 0.4
    value, _, weights = dv_closed_form(scores)
    mean_exp = (np.exp(scores.negative + scores.log_weight) * scores.valid).sum()
    mean_exp /= scores.valid.sum()
    after = decay * np.exp(before) + (1 - decay) * mean_exp

    def loss(negative: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        given = scores.replace(negative=negative, log_normalizer=jnp.asarray(before))
        return build_objective("dv", decay=decay)(given)

    with jax.enable_x64(True):
        (got, metrics), grad = jax.value_and_grad(loss, has_aux=True)(scores.negative)
        fresh = scores.replace(log_normalizer=jnp.asarray(-np.inf))
        _, first = build_objective("dv")(fresh)
    np.testing.assert_allclose(got, value, rtol=1e-12)
    np.testing.assert_allclose(metrics["dv_log_normalizer"], np.log(after), rtol=1e-12)
    np.testing.assert_allclose(grad, weights * mean_exp / after, rtol=1e-12)
    np.testing.assert_allclose(first["dv_log_normalizer"], np.log(mean_exp), rtol=1e-12)


@pytest.mark.parametrize("before", [-math.inf, 0.4])
def test_a_batch_without_negatives_leaves_the_moving_average_of_dv(before: float) -> None:
    scores = make_scores(2, 3)
    empty = scores.replace(
        valid=np.zeros_like(scores.valid), log_normalizer=jnp.asarray(before, jnp.float32)
    )
    loss, metrics = build_objective("dv")(empty)
    assert np.isfinite(loss)
    assert metrics["dv_log_normalizer"] == jnp.float32(before)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_negative_that_stands_for_many_counts_as_many(name: str) -> None:
    """One negative that stands for three is the same as that negative three times."""
    once = make_scores(2, 1)
    repeat = {f: np.repeat(getattr(once, f), 3, -1) for f in ("negative", "valid", "log_weight")}
    thrice = once.replace(**repeat)
    objective = build_objective(name)
    with jax.enable_x64(True):
        got, metrics = objective(once.replace(stands_for=np.full((2, 6), 3.0)))
        expected, expected_metrics = objective(thrice)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    for key, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[key], rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", STREAMED)
def test_losses_of_the_parts_add_up(name: str) -> None:
    """With the counts of the whole batch, as gradient accumulation uses them."""
    whole = make_scores(2, 4)
    totals = Totals(whole.positive_valid.sum(), whole.valid.sum(), parts=2)
    objective = build_objective(name)

    def part(rows: slice) -> Scores:
        fields = {f: getattr(whole, f)[:, rows] for f in ("negative", "valid", "log_weight")}
        pairs = {f: getattr(whole, f)[rows] for f in ("positive", "positive_valid")}
        return whole.replace(**fields, **pairs, totals=totals)

    with jax.enable_x64(True):
        expected, expected_metrics = objective(whole)
        parts = [objective(part(rows)) for rows in (slice(0, 3), slice(3, 6))]
        (value, metrics), (other, other_metrics) = parts
        total = jax.tree.map(jnp.add, metrics, other_metrics)
        np.testing.assert_allclose(value + other, expected, rtol=1e-12)
    for key, sum_of_parts in total.items():
        np.testing.assert_allclose(sum_of_parts, expected_metrics[key], rtol=1e-12, err_msg=key)


def test_rows_belong_to_one_bound() -> None:
    rows = reduce_rows(STREAMED["jsd"], make_scores(1, 2).masked())
    with pytest.raises(ValueError, match="summed up for jsd, not for nwj"):
        build_objective("nwj")(rows)


def test_ignorant_critic_scores_chance() -> None:
    zero = Scores(np.zeros(4), np.zeros((1, 4, 1)), np.ones((1, 4, 1), bool), np.zeros((1, 4, 1)))
    np.testing.assert_allclose(build_objective("jsd")(zero)[0], 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(build_objective("infonce")(zero)[0], np.log(2), rtol=1e-6)


def test_metrics() -> None:
    scores = Scores(
        positive=np.array([1.0, -1.0]),
        negative=np.array([[[-2.0], [-3.0]]]),
        valid=np.array([[[True], [True]]]),
        log_weight=np.zeros((1, 2, 1)),
    )
    _, metrics = build_objective("jsd")(scores)
    assert metrics["score_positive"] == 0
    assert metrics["score_negative"] == -2.5
    assert metrics["critic_accuracy"] == 0.75
    assert metrics["ranking_accuracy"] == 1


@pytest.mark.parametrize(
    ("name", "options"), [("dv", {"decay": 1.0}), ("dv", {"decay": "x"}), ("smile", {"tau": 0})]
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.options\.(decay|tau)=.*: a number"):
        build_objective(name, **options)


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="infonce, jsd"):
        build_objective("jds")
    with pytest.raises(ConfigError, match="jsd takes none"):
        build_objective("jsd", tau=1)


@pytest.mark.parametrize(
    ("name", "optimum"),
    [("jsd", 0.0), ("smile", 0.0), ("nwj", 1.0), ("sigmoid", -np.log(3))],
)
def test_the_best_critic_is_as_stated(name: str, optimum: float) -> None:
    """On a finite joint distribution the expected gradient of every score vanishes there."""
    joint = np.random.default_rng(0).random((4, 4)) + 3 * np.eye(4)
    joint /= joint.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    objective, k = build_objective(name), 3

    def one_pair(positive: jax.Array, negative: jax.Array) -> jax.Array:
        shape = (1, 1, k)
        scores = (positive[None], jnp.full(shape, negative), jnp.ones(shape, bool))
        return objective(Scores(*scores, log_weight=jnp.zeros(shape)))[0]

    def expected_gradient(t: np.ndarray) -> np.ndarray:
        pull, push = jax.vmap(jax.grad(one_pair, (0, 1)))(t.ravel(), t.ravel())
        return joint.ravel() * pull + independent.ravel() * push

    with jax.enable_x64(True):
        best = np.log(joint / independent) + optimum
        np.testing.assert_allclose(expected_gradient(best), 0, atol=1e-12)
        assert np.all(expected_gradient(best + 0.1) > 1e-6)
