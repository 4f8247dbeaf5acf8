"""Eight devices equal one in float64: the cases that take the longest to compile.

Kept out of the ordinary run because they take a hundred seconds of processor time;
`tests/test_parity.py` has the other cases, and `tests/test_combinations.py` and
`tests/test_learner.py` compare parts of these.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_parity import LONG, assert_devices_make_no_difference


@pytest.mark.parametrize("name", LONG)
def test_float64_adamw(name: str) -> None:
    assert_devices_make_no_difference(name)
