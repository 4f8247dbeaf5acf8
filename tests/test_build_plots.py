"""The pairs behind the plots of docs/mathematics.md have the information that the plots say."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from clip_lite_jax.objectives import build_objective
from tools.build_plots import DIMENSIONS, correlation, log_ratios, others, scores_of


@pytest.mark.parametrize(("information", "rho"), [(2, 0.4258), (4, 0.5742), (10, 0.7951)])
def test_correlations_are_those_of_the_literature(information: float, rho: float) -> None:
    """McAllester and Stratos, Poole et al.: 20 dimensions, I = -10 log(1 - rho²)."""
    assert correlation(information) == pytest.approx(rho, abs=5e-5)
    partners = np.roll(np.eye(2 * DIMENSIONS), DIMENSIONS, axis=1)
    covariance = np.eye(2 * DIMENSIONS) + correlation(information) * partners
    assert -np.linalg.slogdet(covariance)[1] / 2 == pytest.approx(information)


def test_log_ratios_are_those_of_the_densities() -> None:
    matrix = log_ratios(np.random.default_rng(3), 6, 4.0)
    rng, rho = np.random.default_rng(3), correlation(4.0)
    x = rng.standard_normal((6, DIMENSIONS))
    y = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal((6, DIMENSIONS))
    joint = multivariate_normal(np.zeros(2), [[1, rho], [rho, 1]])
    alone = multivariate_normal(0, 1)
    for i in range(6):
        for j in range(6):
            pair = np.stack([x[i], y[j]], axis=1)
            ratio = joint.logpdf(pair) - alone.logpdf(x[i]) - alone.logpdf(y[j])
            assert matrix[i, j] == pytest.approx(ratio.sum())


def test_others_are_no_pairs() -> None:
    matrix = np.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal(others(matrix, 2), [[1, 2], [6, 7], [11, 8], [12, 13]])


def test_losses_of_the_plots_are_those_of_training() -> None:
    own, negative = np.array([1.0, -0.5]), np.array([[0.2, -1.0, 0.0], [0.7, 0.1, -2.0]])
    loss, _ = build_objective("jsd")(scores_of(own, negative))
    expected = np.logaddexp(0, -own).mean() + np.logaddexp(0, negative).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-6)
