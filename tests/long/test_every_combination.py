"""Every objective with every critic and every kind of negatives, on one device and on eight.

Kept out of the ordinary run because it compiles for most of an hour; `tests/test_combinations.py`
runs a part of it in which every name occurs.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from combinations import (
    Combination,
    assert_devices_make_no_difference,
    every_combination,
)


@pytest.mark.parametrize("combination", every_combination(), ids=" × ".join)
def test_one_device_equals_eight(combination: Combination) -> None:
    assert_devices_make_no_difference(combination)
