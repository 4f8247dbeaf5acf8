"""When a checkpoint is written, and a disk that does not take it."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import Clock, tiny_config
from test_checkpoints import META, broken_at, make_state
from test_train import final_state

from clip_lite_jax import checkpoints as module
from clip_lite_jax import train as training
from clip_lite_jax.checkpoints import ATTEMPTS, RETRY_SECONDS, Checkpoints
from clip_lite_jax.config import CheckpointConfig, Config, LogConfig
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.metrics import FROM_THE_MACHINE, read_metrics
from clip_lite_jax.train import train
from clip_lite_jax.train_state import TrainState


@pytest.fixture(scope="module")
def state() -> TrainState:
    return make_state(1)


def at(state: TrainState, step: int) -> TrainState:
    return replace(state, step=state.step + step)


def test_every_so_many_steps_or_minutes(clock: Clock, state: TrainState, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(every=10)) as checkpoints:
        clock.now += 1e6
        assert [checkpoints.due(step) for step in (9, 10, 11, 20)] == [False, True, False, True]
    with Checkpoints(tmp_path, CheckpointConfig(every=10, minutes=2)) as checkpoints:
        clock.now += 119
        assert not checkpoints.due(3)
        clock.now += 1
        assert checkpoints.due(3)
        checkpoints.save(at(state, 3), META)
        assert not checkpoints.due(4)  # the clock begins again
        clock.now += 119
        assert not checkpoints.due(5)
        assert checkpoints.due(10)


def test_after_a_failure_it_is_due_again_in_a_minute_and_not_before(
    clock: Clock, state: TrainState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save_or_retry(at(state, 1), META, {}, wait=True)
        broken_at(tmp_path / "checkpoints")
        checkpoints.save_or_retry(at(state, 2), META, {}, wait=False)
        assert "attempt 2 of 10 follows in 60 s" in caplog.text
        assert not checkpoints.due(3)
        clock.now += RETRY_SECONDS - 1
        assert not checkpoints.due(4)
        clock.now += 1
        assert checkpoints.due(5)
        (tmp_path / "checkpoints").unlink()
        checkpoints.save_or_retry(at(state, 5), META, {}, wait=False)
        checkpoints.wait()
        assert checkpoints.latest_step() == 5
        assert checkpoints.due(6)
    assert not clock.slept


def test_what_fails_in_the_background_is_told_of_and_tried_again_at_once(
    clock: Clock,
    state: TrainState,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, CheckpointConfig(every=2)) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(module, "seal", full)
            checkpoints.save_or_retry(at(state, 2), META, {}, wait=False)
            checkpoints._writing.join()  # type: ignore[union-attr]
        assert not caplog.text
        assert not checkpoints.due(4)
        clock.now += RETRY_SECONDS
        assert checkpoints.due(7)
        checkpoints.save_or_retry(at(state, 7), META, {}, wait=False)
        assert (
            "No space left on device; training goes on in memory, attempt 2 of 10 follows now"
            in (caplog.text)
        )
        checkpoints.wait()
        assert checkpoints.latest_step() == 7


def test_at_the_end_it_waits_for_the_disk(
    clock: Clock, state: TrainState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_or_retry(at(state, 1), META, {}, wait=True)
        broken_at(tmp_path / "checkpoints")

        def mend() -> None:
            if len(clock.slept) == 3:
                (tmp_path / "checkpoints").unlink()

        clock.meanwhile = mend
        checkpoints.save_or_retry(at(state, 2), META, {}, wait=True)
        assert checkpoints.latest_step() == 2
    assert clock.slept == [RETRY_SECONDS] * 3
    assert "attempt 4 of 10" in caplog.text
    assert "attempt 5 of 10" not in caplog.text


def test_it_does_not_wait_for_ever(clock: Clock, state: TrainState, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_or_retry(at(state, 1), META, {}, wait=True)
        broken_at(tmp_path / "checkpoints")
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* \([\d,]+ MiB free\)"):
            checkpoints.save_or_retry(at(state, 2), META, {}, wait=True)
    assert len(clock.slept) == ATTEMPTS - 1


# --- Whole runs on real disks ---------------------------------------------------------------------


def mount(*arguments: str) -> None:
    command = ["mount", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}: a disk of its own needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture(scope="module")
def config(pairs: Path) -> Config:
    config = tiny_config(pairs, steps=8, log=LogConfig(tensorboard=True))
    return replace(config, checkpoint=CheckpointConfig(every=2))


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(config, workdir)
    return workdir


def train_through(
    trouble: Callable[[], None],
    end: Callable[[], None],
    config: Config,
    workdir: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trains; at step 3 there is trouble, at step 7 it ends.  A step takes half a minute."""
    real, taken = training.put_batch, 0

    def put_batch(*given: Any) -> Any:
        nonlocal taken
        clock.now += RETRY_SECONDS / 2
        if taken == 3:
            deadline = time.monotonic() + 120  # not in the middle of one: see `test_chaos`
            while not (workdir / "checkpoints" / "2" / "manifest.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            trouble()
        if taken == 7:
            end()
        taken += 1
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "put_batch", put_batch)
        train(config, workdir)


def assert_as_undisturbed(config: Config, workdir: Path, undisturbed: Path) -> None:
    one, other = (final_state(config, folder) for folder in (workdir, undisturbed))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    one, other = (
        [
            {k: v for k, v in line.items() if k not in FROM_THE_MACHINE}
            for line in read_metrics(folder)
        ]
        for folder in (workdir, undisturbed)
    )
    assert one == other


def test_a_full_disk(
    config: Config,
    undisturbed: Path,
    small_disk: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filler, workdir = small_disk / "filler", small_disk / "run"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    train_through(fill, filler.unlink, config, workdir, clock, monkeypatch)
    assert "no checkpoint in" in caplog.text
    assert "(0 MiB free)" in caplog.text
    assert "training goes on in memory" in caplog.text
    assert (
        "metrics.jsonl: [Errno 28] No space left on device; what belongs there waits" in caplog.text
    )
    assert "metrics.jsonl is written again, and nothing is missing" in caplog.text
    assert "tensorboard: [Errno 28] No space left on device; no more is written" in caplog.text
    assert_as_undisturbed(config, workdir, undisturbed)


def test_a_folder_that_becomes_read_only(
    config: Config,
    undisturbed: Path,
    tmp_path: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"

    def read_only() -> None:
        if os.geteuid() != 0:
            folder.chmod(0o500)
            return
        mount("--bind", str(folder), str(folder))
        mount("-o", "remount,ro,bind", str(folder))

    def writable() -> None:
        if os.geteuid() != 0:
            folder.chmod(0o700)
        else:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    try:
        train_through(read_only, writable, config, workdir, clock, monkeypatch)
    finally:
        subprocess.run(["umount", "-lq", str(folder)], capture_output=True, check=False)
    assert "no checkpoint in" in caplog.text
    assert "Read-only file system" in caplog.text or "Permission denied" in caplog.text
    assert_as_undisturbed(config, workdir, undisturbed)


def test_a_folder_that_is_lost_and_comes_back(
    config: Config,
    undisturbed: Path,
    tmp_path: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    lose, find = (lambda: workdir.rename(elsewhere)), (lambda: elsewhere.rename(workdir))
    train_through(lose, find, config, workdir, clock, monkeypatch)  # type: ignore[arg-type]
    assert "the folder of the run is not there" in caplog.text
    assert_as_undisturbed(config, workdir, undisturbed)
