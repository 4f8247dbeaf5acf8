"""Intervals where all values are equal, against SciPy's Wilson interval."""

import numpy as np
import pytest
from scipy.stats import binomtest

from clip_lite_jax.apps.compare_tables import difference_interval
from clip_lite_jax.evaluators.bootstrap import (
    mean_interval,
    wilson,
    with_intervals,
    with_shared_intervals,
)


@pytest.mark.parametrize(("hits", "count"), [(0, 8), (8, 8), (3, 8), (1, 570), (570, 570)])
def test_wilson_is_scipys(hits: int, count: int) -> None:
    interval = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits / count, count) == pytest.approx((interval.low, interval.high))


def test_equal_answers_are_no_certainty() -> None:
    """None of 570 right; all right, of three things drawn twice each; and what is between."""
    values = {"none": np.zeros(570), "some": np.arange(570) % 2}
    found = with_intervals(values)
    assert (found["none_low"], found["none_high"]) == wilson(0, 570)
    assert found["none_high"] == pytest.approx(0.0067, abs=1e-4)
    assert 0.4 < found["some_low"] < 0.5 < found["some_high"] < 0.6
    both = {"all": np.ones(6)}, np.repeat(np.arange(3), 2)
    shared = with_shared_intervals([both, ({"other": np.arange(3)}, np.arange(3))])
    assert (shared["all_low"], shared["all_high"]) == wilson(1, 3)
    assert mean_interval(both[0]["all"], both[1]) == wilson(1, 3)
    assert np.isnan(wilson(0, 0)).all()


def test_a_difference_of_nothing_is_no_certainty() -> None:
    clusters = np.repeat(np.arange(20), 2)
    most = wilson(0, 20)[1]
    assert difference_interval(np.zeros(40), clusters) == (-most, most)
    assert difference_interval(np.ones(40), clusters) == wilson(1, 20)
    assert difference_interval(-np.ones(40), clusters) == (-1, -wilson(1, 20)[0])
    values = np.tile([0.0, -1.0], 20)
    assert difference_interval(values, clusters) == mean_interval(values, clusters)
