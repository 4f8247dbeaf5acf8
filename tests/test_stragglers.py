"""The process that holds up the others: `test_distributed` has real ones."""

import socket
from collections.abc import Sequence

import numpy as np
import pytest

from clip_lite_jax import stragglers
from clip_lite_jax.metrics import Progress

HOSTS = ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("shares", "slow"),
    [
        ([0.01, 0.02, 0.45, 0.03], 2),
        ([0.01, 0.02, 0.09, 0.03], None),  # too little to matter
        ([0.30, 0.28, 0.45, 0.31], None),  # all wait
        ([0.04, 0.41], 1),
        ([0.30, 0.16], None),
        ([0.33, 0.16], 0),
        ([0.0, 0.0, 0.0, 0.11], 3),
    ],
)
def test_who_stands_out(shares: list[float], slow: int | None) -> None:
    message = stragglers.straggler("waits for data", shares, HOSTS)
    if slow is None:
        assert message == ""
    else:
        assert message.startswith(f"process {slow} on {HOSTS[slow]} waits for data for ")


def progress_of(steps: int, monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Steps of 2 s: a quarter waits for data, half of it for the devices."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    progress = Progress(0, 100, batch_size=8, active=False)
    for _ in range(steps):
        progress.waited(0.5)
        progress.blocked(0.75)
        progress.blocked(0.25)
        now += 2.0
        progress.advance()
    return progress


def test_shares_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_of(1, monkeypatch).shares is None  # the first compiles
    assert progress_of(5, monkeypatch).shares == pytest.approx((0.25, 0.25))
    progress = progress_of(3, monkeypatch)
    progress.restart_clock()
    progress.blocked(100.0)  # in an evaluation
    progress.advance()
    assert progress.shares == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(("others", "warned"), [((0.01, 0.2), "waits for data"), ((0.2, 0.2), "")])
def test_all_are_told_and_the_first_warns(
    others: Sequence[float],
    warned: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gathered = []

    def process_allgather(own: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        gathered.append(own)
        shares, name = own
        here = np.array(others, np.float32)
        return np.stack([here, here, shares]), np.stack([name] * 3)

    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr(stragglers.multihost_utils, "process_allgather", process_allgather)
    found = stragglers.slowest(progress_of(5, monkeypatch))
    assert found == pytest.approx({"data_wait_slowest": 0.25, "host_overhead_slowest": 0.25})
    assert len(gathered) == 1
    if warned:
        (record,) = caplog.records
        assert record.message.startswith(
            f"process 2 on {socket.gethostname()[:64]} waits for data for 25% of a step"
        )
    else:
        assert not caplog.records
    assert stragglers.slowest(progress_of(0, monkeypatch)) == {}  # with all there is no rate yet
    monkeypatch.setattr("jax.process_index", lambda: 1)
    caplog.clear()
    stragglers.slowest(progress_of(5, monkeypatch))
    assert not caplog.records


def test_one_process_has_no_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stragglers.slowest(progress_of(5, monkeypatch)) == {}
