"""A learning step of objective, critic and negatives is the same on one device and on eight.

Each of them occurs here; all that go together are in ``tests/long``.
"""

import pytest
from combinations import Combination, assert_devices_make_no_difference, covering_set


@pytest.mark.parametrize("combination", covering_set(), ids=" × ".join)
def test_one_device_equals_eight(combination: Combination) -> None:
    assert_devices_make_no_difference(combination)
