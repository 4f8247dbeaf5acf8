"""Where numbers go: JSONL, TensorBoard, W&B, and the progress bar."""

import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config

from clip_lite_jax.config import Config, LogConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.metrics import MetricWriter, Progress, read_metrics


@pytest.fixture
def config() -> Config:
    return tiny_config(Path("pairs.csv"))


def test_lines_are_read_back_without_a_cut_one(tmp_path: Path, config: Config) -> None:
    writer = MetricWriter(tmp_path, config, 0, active=True)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": 0.25})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert list(read_metrics(tmp_path)) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    writer.close()


def test_a_resumed_run_writes_later_steps_again(tmp_path: Path, config: Config) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricWriter(tmp_path, config, start, active=True)
        for step in steps:
            writer.write(step, {"loss": start})
        writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 0),
        (2, 0),
        (3, 2),
        (4, 2),
    ]


def test_tensorboard_files_hold_the_scalars(tmp_path: Path, config: Config) -> None:
    config = replace(config, log=LogConfig(tensorboard=True))
    writer = MetricWriter(tmp_path, config, 0, active=True)
    writer.write(7, {"loss": 0.5})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b"loss" in data
    assert struct.pack("<f", 0.5) in data


def test_a_skipped_step_stays_and_an_evaluation_yet_to_come_goes(
    tmp_path: Path, config: Config
) -> None:
    writer = MetricWriter(tmp_path, config, 0, active=True)
    for step in (1, 2):
        writer.write(step, {"skipped": 1.0, "learning_rate": 0.1})
        writer.write(step, {"information/jsd_loss": 0.3})
    writer.close()
    for evaluated, steps in ((True, [1, 1, 2, 2]), (False, [1, 1, 2])):
        MetricWriter(tmp_path, config, 2, active=True, evaluated=evaluated).close()
        assert [line["step"] for line in read_metrics(tmp_path)] == steps
    assert "learning_rate" in list(read_metrics(tmp_path))[-1]


def test_a_full_disk_is_told_of_once_and_ends_nothing(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Linux has a device that is always full."""
    (tmp_path / "tensorboard").mkdir()
    config = replace(config, log=LogConfig(tensorboard=True))
    writer = MetricWriter(tmp_path, config, 0, active=True)
    full = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    kept, writer._file._file = writer._file._file, full
    for step in range(1, 4):
        writer.write(step, {"loss": 0.5})
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "No space left on device; what belongs there waits in memory" in caplog.text
    writer._file._file = kept
    writer.write(4, {"loss": 0.5})
    full.close()
    assert "is written again, and nothing is missing" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    writer._tensorboard._events._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    for step in range(5, 400):  # its thread died, and the eleventh would have waited for ever
        writer.write(step, {"loss": 0.5})
    assert "No space left on device; no more is written there until the run" in caplog.text
    assert len(list(read_metrics(tmp_path))) == 399
    writer.close()


def test_other_processes_write_nothing(tmp_path: Path, config: Config) -> None:
    writer = MetricWriter(tmp_path, config, 0, active=False)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_asked_for_by_its_extra(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = replace(config, log=LogConfig(wandb_project="mine"))
    with pytest.raises(ConfigError, match=r"pip install 'clip-lite-jax\[wandb\]'"):
        MetricWriter(tmp_path, config, 0, active=True)


def test_rates_leave_out_compilation_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    progress = Progress(0, 10, batch_size=8, active=False)
    progress.advance()
    assert progress.rates(1.0) == {}  # the first step compiles
    for seconds, paused in ((2.0, False), (100.0, True), (2.0, False)):
        if paused:
            progress.restart_clock()
        now += seconds
        progress.waited(0.5)
        progress.advance()
    rates = {"images_per_second": 4.0, "step_seconds": 2.0, "data_wait": 0.25}
    assert progress.rates(1.0) == rates
    progress.close()
