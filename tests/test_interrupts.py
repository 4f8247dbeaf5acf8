"""Runs that are asked to end: they save, say so by their status, and go on as if nothing was."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_config

from clip_lite_jax import cli, interrupts
from clip_lite_jax import train as training
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import CheckpointConfig, Config
from clip_lite_jax.errors import Interrupted
from clip_lite_jax.interrupts import Interrupts
from clip_lite_jax.metrics import FROM_THE_MACHINE, read_metrics
from clip_lite_jax.run import build_run, restore_or_init
from clip_lite_jax.train import train

pytestmark = pytest.mark.usefixtures("two_devices")


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, *signals: signal.Signals) -> None:
    """This process gets the signals when it hands the batch of step `number` to the devices."""
    taken, real = 0, training.put_batch

    def put_batch(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == number:
            for one in signals:
                os.kill(os.getpid(), one)
        return real(*given)

    monkeypatch.setattr(training, "put_batch", put_batch)


def logged(workdir: Path) -> list[dict[str, Any]]:
    lines = list(read_metrics(workdir))
    return [{k: v for k, v in line.items() if k not in FROM_THE_MACHINE} for line in lines]


def final_state(config: Config, workdir: Path) -> list[np.ndarray]:
    run = build_run(config, workdir)
    with Checkpoints.open(workdir) as checkpoints:
        assert checkpoints.latest_step() == config.steps
        return [np.asarray(x) for x in jax.tree.leaves(restore_or_init(run, checkpoints)[0])]


@pytest.fixture(scope="module")
def config(pairs: Path) -> Config:
    return tiny_config(pairs, steps=5)


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        two = training.build_run.__globals__["build_mesh"]
        patch.setattr("clip_lite_jax.run.build_mesh", lambda config: two(jax.devices()[:2], config))
        workdir = tmp_path_factory.mktemp("undisturbed")
        train(config, workdir)
        yield workdir


@pytest.mark.parametrize(("number", "asked"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_run_that_was_asked_to_end_goes_on_as_if_it_was_not(
    number: int,
    asked: signal.Signals,
    config: Config,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, number, asked)
        message = rf"ended at step {number} of 5 \({asked.name}\), with a checkpoint"
        with pytest.raises(Interrupted, match=message):
            train(config, tmp_path)
    with Checkpoints.open(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == number
        # Step 2 is evaluated: this is left for the run that goes on.
        assert checkpoints.meta(number).evaluated == bool(number % 2)
    train(config, tmp_path)
    assert logged(tmp_path) == logged(undisturbed)
    for a, b in zip(final_state(config, tmp_path), final_state(config, undisturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_before_the_first_step_there_is_nothing_to_save(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interrupts, "requested", lambda self, step: "SIGTERM")
    with pytest.raises(
        Interrupted, match=r"step 0 of 5 \(SIGTERM\), with nothing to save yet; the"
    ):
        train(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_second_signal_ends_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_command_has_a_status_for_it(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = replace(config, steps=3)
    monkeypatch.setattr("clip_lite_jax.config.load_config", lambda *_: given)
    arguments = ["train", "--config", "given above", "--workdir", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_at(patch, 1, signal.SIGTERM)
        assert cli.main(arguments) == 75
    assert "ended at step 1 of 3 (SIGTERM)" in capsys.readouterr().err
    assert cli.main(arguments) == 0


def test_the_clock_ends_it(config: Config, tmp_path: Path) -> None:
    limited = replace(config, checkpoint=CheckpointConfig(stop_after_minutes=1e-6))
    with pytest.raises(Interrupted, match="stop_after_minutes=1e-06 are over"):
        train(replace(limited, steps=10_000), tmp_path)


@pytest.mark.parametrize("event", ["preempted", "maintenance-event"])
def test_google_cloud_ends_it(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata server of our own, that says what Google's does."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            name = self.path.partition("?")[0].rpartition("/")[2]
            asked.append(name)
            quiet = interrupts.EVENTS[name]
            self.send_response(200)
            self.end_headers()
            self.wfile.write((quiet if name != event else "TERMINATE_ON_HOST_MAINTENANCE").encode())

        def log_message(self, *given: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    with Interrupts() as interrupted:
        for _ in range(1000):
            if interrupted.requested(0):
                break
            threading.Event().wait(0.01)
        assert interrupted.requested(0) == (
            f"{event} of this machine is TERMINATE_ON_HOST_MAINTENANCE"
        )
    server.shutdown()
    assert event in asked
