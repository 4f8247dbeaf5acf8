"""Which checkpoints stay."""

import math
from pathlib import Path

import pytest
from test_checkpoints import META, make_state

from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import CheckpointConfig
from clip_lite_jax.retention import kept, sealed

SCORES = {2: 0.3, 4: 0.9, 6: None, 8: 0.1, 10: 0.9, 12: 0.2}
STEPS = {step: {} if x is None else {"r10": x} for step, x in SCORES.items()}


@pytest.mark.parametrize(
    ("config", "stay"),
    [
        (CheckpointConfig(keep=1), {12}),
        (CheckpointConfig(keep=9), set(STEPS)),
        (CheckpointConfig(keep=2, keep_every=4), {4, 8, 10, 12}),
        (CheckpointConfig(keep=1, best="r10"), {10, 12}),
        (CheckpointConfig(keep=1, best="r10", best_is="lowest"), {8, 12}),
        (CheckpointConfig(keep=1, best="another"), {12}),
    ],
)
def test_the_newest_the_best_and_every_so_many_stay(
    config: CheckpointConfig, stay: set[int]
) -> None:
    assert kept(STEPS, config) == stay


def test_what_is_not_a_number_is_never_the_best() -> None:
    steps = {1: {"x": 0.5}, 2: {"x": math.nan}, 3: {"x": math.inf}, 4: {}}
    assert kept(steps, CheckpointConfig(keep=1, best="x")) == {1, 4}


def test_they_stay_on_disk_with_their_numbers_over_a_restart(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, keep_every=3, best="r10")
    state = make_state(1)
    for steps in ((1, 2), (3, 4, 5)):
        with Checkpoints(tmp_path, config) as checkpoints:
            for step in steps:
                numbers = {} if step == 4 else {"r10": 1 / step}
                at_step = state.replace(step=state.step + step)
                checkpoints.save_or_retry(at_step, META, numbers, wait=False)
    found = {1: {"r10": 1.0}, 3: {"r10": 1 / 3}, 5: {"r10": 0.2}}
    assert sealed(tmp_path / "checkpoints") == found
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3", "5"}


def test_a_best_that_no_evaluation_has_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(best="retrieval/r10")) as checkpoints:
        for _ in range(2):
            checkpoints.look_for_best({"retrieval/held_out/r10": 0.5, "information/loss": 1.0})
    (record,) = caplog.records
    assert record.getMessage() == (
        "checkpoint.best='retrieval/r10': the evaluation has no such number, so no checkpoint is "
        "the best; there are information/loss, retrieval/held_out/r10"
    )
    with Checkpoints(tmp_path, CheckpointConfig(best="a")) as checkpoints:
        checkpoints.look_for_best({"a": 0.5})
    assert len(caplog.records) == 1
