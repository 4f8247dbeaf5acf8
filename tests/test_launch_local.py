"""`launch/local.sh` starts processes, watches them and ends them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_scripts import LAUNCH, environment, write_program

# In place of the training command: it writes down its process id, says something, and does as the
# first word of --config tells the process of its number.
STUB = """#!{python}
import os, pathlib, signal, sys, time
if sys.argv[1] == "-c":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
given = dict(zip(sys.argv, sys.argv[1:]))
folder, number = pathlib.Path(given["--workdir"]), given["--process-id"]
does = given["--config"].split(",")[int(number)]

def heard(signal, frame):
    (folder / f"heard.{{number}}").open("a").write(f"{{signal}} ")
    if does != "deaf":
        sys.exit(75)

for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(sign, heard)
print("a line of", os.environ["XLA_FLAGS"], flush=True)
print(f"[process {{number}}] one that has its number", "and a bar\\rand no end", flush=True)
if does == "forks" and not os.fork():
    number = "child"
(folder / f"pid.{{number}}").write_text(str(os.getpid()))
if does.isdigit():
    sys.exit(int(does))
while True:
    time.sleep(0.05)
"""


class Local:
    """A run of the script over stubs."""

    def __init__(self, folder: Path, does: str, *words: str) -> None:
        self.folder = folder
        python = write_program(folder / "python", STUB.format(python=sys.executable))
        self.running = subprocess.Popen(
            [
                *("bash", LAUNCH / "local.sh", str(does.count(",") + 1), f"--python={python}"),
                *(*words, "--config", does, "--workdir", folder),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def pid(self, process: str) -> int:
        path = self.folder / f"pid.{process}"
        wait_for(lambda: path.exists() and path.read_text() != "")
        return int(path.read_text())

    def end(self) -> tuple[int, str, str]:
        out, told = self.running.communicate(timeout=30)
        wait_for(lambda: not any(alive(int(p.read_text())) for p in self.folder.glob("pid.*")))
        return self.running.returncode, out, told


def wait_for(reached: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has asked about since its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_line_has_its_number_and_none_is_lost(tmp_path: Path) -> None:
    status, out, told = Local(tmp_path, "0,0,0", "--devices=4").end()
    assert (status, told) == (0, "")
    for number in range(3):
        assert re.findall(rf"^\[process {number}\] (.+)$", out, re.MULTILINE) == [
            "a line of --xla_force_host_platform_device_count=4",
            "one that has its number and a bar",
            "and no end",
        ]
    assert len(out.splitlines()) == 9


def test_the_first_that_fails_ends_all_and_gives_the_status(tmp_path: Path) -> None:
    run = Local(tmp_path, "waits,7,deaf", "--grace=1")
    since = time.monotonic()
    status, _, told = run.end()
    assert status == 7
    assert "process 1 ended with status 7" in told
    assert "stopping process 0 2" in told or "stopping process 2 0" in told
    assert "killing process 2" in told
    # They had five seconds to end by themselves.
    assert time.monotonic() - since >= 5
    assert (tmp_path / "heard.0").read_text() == f"{signal.SIGTERM} "


def test_those_that_lose_another_do_not_give_the_status(tmp_path: Path) -> None:
    assert Local(tmp_path, "1,2,1").end()[0] == 2


def test_one_that_is_killed_is_told_of(tmp_path: Path) -> None:
    run = Local(tmp_path, "forks,waits")
    run.pid("child"), run.pid("1")
    os.kill(run.pid("0"), signal.SIGKILL)
    os.kill(run.pid("1"), signal.SIGKILL)
    status, _, told = run.end()  # with the child that nobody told
    assert status == 128 + signal.SIGKILL
    assert "process 0 ended with status 137" in told


@pytest.mark.parametrize(
    ("sent", "heard"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_signals_reach_all_once(
    tmp_path: Path, sent: signal.Signals, heard: signal.Signals
) -> None:
    run = Local(tmp_path, "waits,waits")
    run.pid("0"), run.pid("1")
    run.running.send_signal(sent)
    status, _, told = run.end()
    assert status == 75
    assert "stopping" not in told
    for number in range(2):
        assert (tmp_path / f"heard.{number}").read_text() == f"{heard} "


def test_those_that_have_saved_leave_the_others_the_time(tmp_path: Path) -> None:
    run = Local(tmp_path, "75,deaf", "--grace=1")
    status, _, told = run.end()
    assert status == 75
    assert "killing process 1" in told
    assert not (tmp_path / "heard.1").exists()
