"""A training whose state has all that can go from step to step is killed at a random moment.

Kept out of the ordinary run because its three starts take most of a minute of processor time;
`tests/test_exactness.py` stops and goes on with such runs, bit for bit, and
`tests/test_chaos.py` kills one three times and damages its files.
"""

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import write_pairs
from test_train import (
    assert_same_state,
    config_that_carries_everything,
    final_state,
    start_training,
    steps_seen,
)

from clip_lite_jax.metrics import FROM_THE_MACHINE, read_metrics

pytestmark = pytest.mark.usefixtures("two_devices")


def test_kill_and_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """kill -9 at a random moment, run again: same parameters, same examples, same log."""
    table = write_pairs(tmp_path / "data")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start_training(table, whole)
    assert undisturbed.wait(300) == 0, undisturbed.stderr and undisturbed.stderr.read().decode()
    victim = start_training(table, broken)
    kill_after = np.random.default_rng().integers(3, 20)
    deadline = time.monotonic() + 300
    while len(steps_seen(broken)) < kill_after and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    killed_at = len(steps_seen(broken))
    assert 0 < killed_at < 24, "the run was over before it was killed"
    assert start_training(table, broken).wait(300) == 0

    config = config_that_carries_everything(table)
    assert_same_state(final_state(config, whole), final_state(config, broken))
    ids, resumed_ids = steps_seen(whole), steps_seen(broken)
    resumed_from = killed_at + 24 - len(resumed_ids)
    assert resumed_ids[:killed_at] == ids[:killed_at]
    assert resumed_ids[killed_at:] == ids[resumed_from:]
    logs = [
        [{k: v for k, v in line.items() if k not in FROM_THE_MACHINE} for line in lines]
        for lines in map(read_metrics, (whole, broken))
    ]
    assert logs[0] == logs[1]
