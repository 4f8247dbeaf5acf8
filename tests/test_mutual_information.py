"""Known mutual information: the tasks, the estimators and the report of the benchmark."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import mi_report
from benchmarks import mutual_information as benchmark
from benchmarks.mi_classical import cca, ksg
from benchmarks.mi_tasks import (
    LEVELS,
    TASKS,
    Task,
    correlation,
    cubic_pairs,
    gaussian_log_ratio,
    gaussian_pairs,
    multinormal,
    normal_scores,
    two_pair_covariance,
)
from benchmarks.mi_training import (
    CRITICS,
    TRAININGS,
    Trainer,
    certified_excess,
    held_out_read_offs,
    jsd_loss_error,
    make_held_out,
    make_trainer,
)

PUBLISHED = {  # nats, from the benchmark's own code
    "1v1-normal-0.75": 0.413,
    "1v1-additive-0.1": 1.709,
    "student-identity-1-1-1": 0.224,
    "student-identity-5-5-2": 0.448,
    "multinormal-dense-5-5-0.5": 0.593,
    "multinormal-sparse-5-5-2-2.0": 1.022,
}


def test_true_values_are_the_published_ones() -> None:
    assert {task.name: round(task.information, 3) for task in TASKS} == PUBLISHED


def test_correlations_of_the_staircase() -> None:
    expected = [0.4258, 0.5742, 0.6717, 0.7421, 0.7951]
    assert [round(float(correlation(level)), 4) for level in LEVELS] == expected


@pytest.mark.parametrize("name", ["1v1-normal-0.75", "multinormal-sparse-5-5-2-2.0"])
def test_moments_of_gaussian_tasks(name: str) -> None:
    task = next(task for task in TASKS if task.name == name)
    x, y = task.sample(np.random.default_rng(0), 100_000)
    covariance = np.cov(np.hstack([x, y]).T)
    expected = np.eye(len(covariance))
    half = len(expected) // 2
    shared, rho = (1, 0.75) if half == 1 else (2, 0.8)
    for i in range(shared):
        expected[i, half + i] = expected[half + i, i] = rho
    np.testing.assert_allclose(covariance, expected, atol=0.02)


def test_moments_of_the_other_tasks() -> None:
    rng = np.random.default_rng(0)
    additive, dense, student = (
        next(task for task in TASKS if task.name.startswith(start))
        for start in ("1v1-additive", "multinormal-dense", "student-identity-5")
    )
    x, y = additive.sample(rng, 100_000)
    assert x.var() == pytest.approx(1 / 12, rel=0.02)
    assert np.abs(y - x).max() <= 0.1
    assert (y - x).var() == pytest.approx(0.01 / 3, rel=0.02)
    covariance = np.cov(np.hstack(dense.sample(rng, 100_000)).T)
    np.testing.assert_allclose(covariance, 0.5 + 0.5 * np.eye(10), atol=0.02)
    x, y = student.sample(rng, 100_000)  # t with 2 degrees of freedom: P(|t| > 1) = 1 - 1/√3
    for part in (x, y):
        assert np.mean(np.abs(part) > 1) == pytest.approx(1 - 1 / math.sqrt(3), abs=0.005)


def test_the_mean_log_ratio_is_the_information() -> None:
    level = jnp.array(4.0)
    x, y = gaussian_pairs(jax.random.key(0), 50_000, level)
    assert float(gaussian_log_ratio(x, y, level).mean()) == pytest.approx(4, abs=0.05)
    _, cubed = cubic_pairs(jax.random.key(0), 50_000, level)
    np.testing.assert_allclose(cubed, y**3 / math.sqrt(15), rtol=1e-5)
    assert float(cubed.var()) == pytest.approx(1, rel=0.05)


def test_normal_scores_undo_a_monotone_map() -> None:
    x = np.random.default_rng(0).normal(size=(20_000, 2))
    found = normal_scores(np.exp(x))(jnp.asarray(np.exp(x[:1000])))
    inside = np.abs(x[:1000]) < 2
    np.testing.assert_allclose(np.asarray(found)[inside], x[:1000][inside], atol=0.05)


def test_classical_estimators_on_gaussians() -> None:
    task = multinormal("", two_pair_covariance(2))
    x, y = task.sample(np.random.default_rng(0), 5000)
    assert cca(x, y) == pytest.approx(task.information, rel=0.05)
    assert ksg(x, y) == pytest.approx(task.information, rel=0.05)


ORACLE_LOSSES = {2.0: 0.685, 4.0: 0.332, 6.0: 0.152, 8.0: 0.066, 10.0: 0.028}
"""Of T = log r on the staircase, by an independent Monte Carlo run; three digits."""


@pytest.mark.parametrize(("level", "loss"), list(ORACLE_LOSSES.items()))
def test_oracle(level: float, loss: float) -> None:
    values = benchmark.oracle(level, samples=200_000)
    assert abs(values["jsd_loss"] - loss) < 4 * values["jsd_loss_error"] + 0.0005
    assert values["jsd_lower_bound"] < level
    if level == LEVELS[0]:
        assert values["nwj_shifted"] == pytest.approx(level, rel=0.05)


def oracle_scores(level: float, blocks: int, seed: int = 0) -> np.ndarray:
    """log r of blocks of 256 pairs, ``[blocks, 256, 256]``."""
    information = jnp.array(level)

    def block(key: jax.Array) -> jax.Array:
        x, y = gaussian_pairs(key, 256, information)
        return gaussian_log_ratio(x[:, None], y[None], information)

    return np.asarray(jax.lax.map(block, jax.random.split(jax.random.key(seed), blocks)))


def test_read_offs_of_the_best_critic() -> None:
    values = held_out_read_offs(oracle_scores(2.0, blocks=16))
    for name in ("score_positive", "calibrated", "nwj_shifted", "dv"):
        assert values[name] == pytest.approx(2, abs=0.1)
    assert values["jsd_lower_bound"] == pytest.approx(1.24, abs=0.05)
    assert values["nwj"] < values["nwj_shifted"]
    high = held_out_read_offs(oracle_scores(10.0, blocks=4))
    assert math.log(64) - 0.1 < high["infonce"] < math.log(64)
    # Calibration undoes a wrong scale and shift, which mislead E_P[T].
    bent = held_out_read_offs(0.5 * oracle_scores(2.0, blocks=16) - 1)
    assert bent["score_positive"] < 0.1
    assert bent["calibrated"] == pytest.approx(values["calibrated"], abs=1e-3)


def test_broken_critics_read_nan() -> None:
    values = held_out_read_offs(np.full((2, 64, 64), np.inf))
    assert all(math.isnan(value) for value in values.values())


def test_standard_error_of_the_loss() -> None:
    runs = oracle_scores(2.0, blocks=80)[:, None]
    losses = [held_out_loss(scores) for scores in runs]
    expected = np.mean([jsd_loss_error(scores) for scores in runs])
    assert expected == pytest.approx(np.std(losses, ddof=1), rel=0.3)


def held_out_loss(scores: np.ndarray) -> float:
    own = np.diagonal(scores, axis1=1, axis2=2)
    others = scores[:, ~np.eye(scores.shape[1], dtype=bool)]
    return float(np.logaddexp(0, -own).mean() + np.logaddexp(0, others).mean())


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer(
        CRITICS["concat"], TRAININGS["jsd_one"], benchmark.draw_rows, steps=300, period=600
    )


@pytest.fixture(scope="module")
def read() -> Callable[..., np.ndarray]:
    return make_held_out(CRITICS["concat"])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_certified_bound_stays_below_the_truth(
    task: Task, trainer: Trainer, read: Callable[..., np.ndarray]
) -> None:
    """Untrained, half trained and trained; the trained critic has learned something."""
    x, y = (
        benchmark.prepared(part, "normal scores")
        for part in task.sample(np.random.default_rng(7), benchmark.SAMPLES)
    )
    test, training = ((x[rows], y[rows]) for rows in (slice(2048), slice(5888, None)))
    state = trainer.init(jax.random.key(0), x.shape[1], y.shape[1])
    bounds = []
    for part in range(3):
        if part:
            state, _ = trainer.run(state, jax.random.key(part), training)
        values = held_out_read_offs(read(state.params, *test))
        assert certified_excess(values, task.information) <= 0
        bounds.append(values["jsd_lower_bound"])
    if task.name != "student-identity-5-5-2":  # which takes longer
        assert bounds[-1] > bounds[0]


def test_quick_run(tmp_path: Path) -> None:
    results = benchmark.run(benchmark.QUICK, tmp_path / "runs", "command")
    again = benchmark.run(benchmark.QUICK, tmp_path / "runs", "command")
    assert all(again[part] == results[part] for part in ("oracle", "tasks", "staircase"))
    docs = tmp_path / "docs.md"
    mi_report.write(results, docs)
    assert docs.with_suffix(".png").stat().st_size > 10_000
    first = docs.read_text()
    for name, table in mi_report.tables(results).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in first
    mi_report.write(results, docs)  # replaces what it wrote
    assert docs.read_text() == first


def test_spread_over_seeds_and_batches() -> None:
    over_seeds = mi_report.spread([1.0, 3.0], truth=1.0)
    assert (over_seeds.mean, over_seeds.bias) == (2.0, 1.0)
    assert over_seeds.deviation == pytest.approx(math.sqrt(2))
    assert over_seeds.rmse == pytest.approx(math.sqrt(2))
    over_batches = mi_report.spread([1.0, 3.0], truth=1.0, variances=[2.0, 4.0])
    assert over_batches.deviation == pytest.approx(2)
    assert over_batches.rmse == pytest.approx(math.sqrt(1 + 4))
    diverged = mi_report.spread([1.0, 1e9, None], truth=1.0)
    assert (diverged.mean, diverged.lost, diverged.seeds) == (1.0, 2, 3)


def test_the_docs_show_the_published_tables() -> None:
    results = json.loads(benchmark.RESULTS.read_text())
    docs = mi_report.DOCS.read_text()
    for table in mi_report.tables(results).values():
        assert table in docs
