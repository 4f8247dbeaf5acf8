"""``clip-lite status``: what it says of runs that live, are done, were killed, or are none."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import FLAGS, tiny_config

from clip_lite_jax import cli
from clip_lite_jax import train as training
from clip_lite_jax.apps import status_files
from clip_lite_jax.apps.status import command_of, status
from clip_lite_jax.apps.status_text import describe, duration
from clip_lite_jax.config import CheckpointConfig, Config, EvalConfig, to_dict
from clip_lite_jax.errors import CheckpointError, Interrupted, NonFiniteError
from clip_lite_jax.manifest import problem_of
from clip_lite_jax.status import Status, machine, process_began
from clip_lite_jax.train import train

RUN = """
import json, sys
from pathlib import Path
from clip_lite_jax.config import Config, from_dict
from clip_lite_jax.train import train
train(from_dict(Config, json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def written(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "status.json").read_text())


def rewrite(workdir: Path, **changes: object) -> None:
    (workdir / "status.json").write_text(json.dumps(written(workdir) | changes))


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def told(workdir: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    """Exit status and text of the command."""
    exit_status = cli.main(["status", str(workdir), *flags])
    return exit_status, capsys.readouterr().out


@pytest.fixture
def done(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of one's own, whose process has ended."""
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    rewrite(workdir, pid=ended_process())
    return workdir


@pytest.fixture
def alive(done: Path) -> Path:
    """A run that seems to be in the midst of training by this process."""
    rewrite(
        done, state="training", pid=os.getpid(), step=3, steps=8, time=ago(2), message="", error=""
    )
    (done / "results.json").unlink()
    return done


def ended_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


# --- Real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run in a process of its own: what is told while it lives, and after SIGKILL."""
    workdir = tmp_path_factory.mktemp("killed")
    config = tiny_config(
        pairs,
        steps=100_000,
        eval=EvalConfig(every=50_000, batch_size=16),
        checkpoint=CheckpointConfig(every=20),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(to_dict(config)), str(workdir)],
        env=os.environ | {"XLA_FLAGS": " ".join(f for f in FLAGS if "device_count" not in f)},
        stderr=subprocess.DEVNULL,
    )
    try:
        lived = status_when(workdir, process)
        # Without a parent that asks how it ended, a process stays in the table.
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        unburied = status(workdir)
        yield {"workdir": workdir, "lived": lived, "unburied": unburied, "pid": process.pid}
    finally:
        process.kill()
        process.wait()


def status_when(workdir: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The first that tells of a few steps and a checkpoint."""
    states: list[str] = []
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None
        if (workdir / "status.json").exists():
            found = status(workdir)
            states += [] if found["state"] in states else [found["state"]]
            sealed = any(one["sealed"] for one in found["checkpoints"])
            if sealed and found["state"] == "training":
                return found | {"states": states}
        time.sleep(0.1)
    raise AssertionError(states)


def test_a_run_that_lives(killed: dict[str, Any]) -> None:
    lived = killed["lived"]
    assert (lived["verdict"], lived["exit_status"], lived["next"]) == ("running", 0, "")
    assert lived["process"]["pid"] == killed["pid"]
    assert lived["process"]["alive"]
    assert lived["states"][0] == "starting"
    assert lived["attempt"]["number"] == 1
    assert lived["attempt"]["step"] == 0
    assert (lived["steps"], lived["devices"]["count"]) == (100_000, 1)
    assert lived["training"]["loss"] > 0
    assert lived["training"]["images_per_second"] == pytest.approx(16 / lived["seconds_per_step"])
    assert lived["seconds_left"] > 0
    assert lived["evaluation"]["step"] == 0
    assert lived["evaluation"]["seconds"] > 0
    assert lived["evaluation"]["time"]
    assert "running, step " in describe(lived)


def test_a_run_that_was_killed(killed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert killed["unburied"]["verdict"] == "died"
    exit_status, text = told(killed["workdir"], capsys)
    assert exit_status == 3
    assert ": DIED, step " in text.splitlines()[0]
    assert f"{killed['pid']} on {os.uname().nodename} is gone, without a word" in text
    assert " The same command goes on from step " in " ".join(text.split())
    assert "train(from_dict(Config" in text  # the command


def test_a_run_that_is_finished(
    finished_run: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_status, text = told(done, capsys)
    assert exit_status == 0
    assert f"{done}: finished, step 4 of 4 (100 %)\n" in text
    assert "on test data, of step 4" in text
    assert "text → image" in text
    assert "checkpoints   step 4, " in text
    assert "next" not in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert len(text.splitlines()) <= 25
    found = status(finished_run)
    assert found["process"]["alive"]  # it was trained by this process
    assert found["evaluation"]["step"] == 4
    assert [one["step"] for one in found["checkpoints"]] == [4, 2]
    assert all(one["sealed"] and one["bytes"] > 1000 for one in found["checkpoints"])
    (done / "results.json").unlink()
    text = " ".join(told(done, capsys)[1].split())
    assert "There is no results.json of this step; the same command evaluates on test data" in text


def test_a_run_that_was_asked_to_end_and_one_that_fails(
    pairs: Path,
    tmp_path: Path,
    two_devices: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, what = training.put_batch, [signal.SIGTERM]

    def put_batch(*given: Any) -> Any:
        if not what:
            raise RuntimeError("no luck\nand more")
        os.kill(os.getpid(), what.pop())
        return real(*given)

    monkeypatch.setattr(training, "put_batch", put_batch)
    config: Config = tiny_config(pairs)
    monkeypatch.setattr("clip_lite_jax.config.load_config", lambda *_: config)
    arguments = ["train", "--config", "given above", "--workdir", str(tmp_path)]
    assert cli.main(arguments) == 75
    capsys.readouterr()
    exit_status, text = told(tmp_path, capsys)
    assert exit_status == 3
    assert ": INTERRUPTED, step 1 of 4 (25 %)" in text
    assert "ended at step 1 of 4 (SIGTERM), with a checkpoint" in text
    assert "The same command goes on from step 1." in text
    with pytest.raises(RuntimeError, match="no luck"):
        train(config, tmp_path)
    exit_status, text = told(tmp_path, capsys)
    assert exit_status == 3
    assert ": FAILED, step 1 of 4 (25 %)" in text
    assert "message       RuntimeError: no luck\n" in text
    assert "attempt       2 from step 1, begun " in text
    assert written(tmp_path)["evaluation"]["step"] == 0  # of the attempt before


# --- The writer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (NonFiniteError("step 3: loss=nan"), "failed", "step 3: loss=nan"),
        (CheckpointError("no checkpoint\n(full)"), "failed", "no checkpoint"),
        (Interrupted("ended at step 1"), "interrupted", "ended at step 1"),
        (KeyboardInterrupt(), "interrupted", "ended at once by Ctrl-C, without a checkpoint"),
        (ValueError(), "failed", ""),
        (ValueError("x" * 5000), "failed", "x" * 1000),
        (MemoryError("\ud800"), "failed", "\ud800"),  # no valid UTF-8
    ],
)
def test_how_it_ended(error: BaseException, state: str, message: str, tmp_path: Path) -> None:
    def fail() -> None:
        with Status(tmp_path / "new", 5, active=True) as status:
            status.beat(1)
            raise error

    with pytest.raises(type(error)):
        fail()
    content = written(tmp_path / "new")
    assert (content["state"], content["message"]) == (state, message)
    assert content["error"] == type(error).__name__


def test_signs_of_life_come_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, times, took = 100.0, [], 0.001

    def write_atomic(path: Path, content: str) -> None:
        nonlocal clock
        times.append(clock)
        clock += took

    monkeypatch.setattr("clip_lite_jax.status.monotonic", lambda: clock)
    monkeypatch.setattr("clip_lite_jax.status.write_atomic", write_atomic)
    with Status(tmp_path, 1000, active=True) as status:
        for took, apart in ((0.001, 5), (0.02, 20), (3.0, 60)):  # noqa: B007
            status.beat(0)
            times.clear()
            for step in range(1000):
                clock += 0.5
                status.beat(step)
            between = [b - a for a, b in itertools.pairwise(times[2:])]
            assert all(apart <= seconds <= apart + 0.6 for seconds in between), between
        times.clear()
        status.enter("saving")
        status.beat(1000)
        assert len(times) == 2  # changes are told at once


def test_a_folder_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with Status(tmp_path / "file" / "run", 2, active=True) as status:
        for step in range(3):
            status.enter("saving")
            status.beat(step)
    assert len(caplog.records) == 1
    assert "cannot be written, training goes on" in caplog.text


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Status(tmp_path / "run", 2, active=False) as status:
        status.enter("saving")
        status.beat(1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("before", [b"", b"[]", b'{"attempt": [], "began": 3}', b"[" * 100_000])
def test_an_attempt_is_not_stopped_by_what_lies_there(before: bytes, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(before)
    with Status(tmp_path, 2, active=True):
        pass
    content = written(tmp_path)
    assert (content["state"], content["attempt"]["number"]) == ("finished", 1)


# --- Whether it lives -----------------------------------------------------------------------------


def test_a_process_that_has_the_number_of_another(alive: Path) -> None:
    assert status(alive)["verdict"] == "running"
    rewrite(alive, process_began="12345")
    assert status(alive)["verdict"] == "died"
    rewrite(alive, pid=ended_process())
    assert status(alive)["verdict"] == "died"
    assert process_began(os.getpid())
    assert machine()


def test_a_loop_that_hangs(alive: Path) -> None:
    rewrite(alive, time=ago(100_000))
    found = status(alive)
    assert (found["verdict"], found["exit_status"]) == ("stalled", 3)
    assert f"kill -9 {os.getpid()}" in found["next"]
    assert "was training; the last sign of it 27 h 47 min ago" in describe(found)


@pytest.mark.parametrize(
    "elsewhere", [{"host": "node7"}, {"machine": "the same after it was started again"}]
)
def test_another_machine(elsewhere: dict[str, str], alive: Path) -> None:
    """No process there has this number as far as we can see: its signs of life decide."""
    rewrite(alive, **elsewhere, pid=ended_process(), time=ago(60))
    found = status(alive)
    assert (found["verdict"], found["exit_status"]) == ("running", 0)
    assert "another machine, told by its last sign" in describe(found)
    rewrite(alive, time=ago(600))
    found = status(alive)
    assert (found["verdict"], found["exit_status"]) == ("silent", 3)
    assert "is there. If it does not run: the same command goes on from step 4." in found["next"]
    # An evaluation may take so long, and so may a compilation.
    rewrite(alive, state="evaluating", evaluation={"step": 4, "time": ago(900), "seconds": 300.0})
    assert status(alive)["verdict"] == "running"
    rewrite(alive, state="compiling")
    assert status(alive)["verdict"] == "running"
    rewrite(alive, state="saving", time=ago(4000))
    assert status(alive)["verdict"] == "silent"


def test_a_run_of_a_version_without_the_file(done: Path) -> None:
    (done / "status.json").unlink()
    found = status(done)
    assert (found["verdict"], found["step"], found["steps"]) == ("finished", 4, 4)
    assert found["loss"]
    config = json.loads((done / "config.json").read_text())
    (done / "config.json").write_text(json.dumps(config | {"steps": 9}))
    os.utime(done / "metrics.jsonl")
    assert status(done)["verdict"] == "running"  # its last line is of this moment
    os.utime(done / "metrics.jsonl", (time.time() - 9999,) * 2)
    found = status(done)
    assert (found["verdict"], found["exit_status"]) == ("silent", 3)
    assert "not known: no status.json; its files last changed 2 h 47 min ago" in describe(found)
    assert found["next"] == "See its log. If it does not run: the same command goes on from step 4."


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["status", str(folder)]) == 2
        assert f"{folder} holds no run" in capsys.readouterr().err


# --- What lies there ------------------------------------------------------------------------------


def test_checkpoints_that_are_damaged_or_not_finished(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = done / "checkpoints"
    shutil.copytree(folder / "4", folder / "1.damaged")
    shutil.copytree(folder / "4", folder / "6.orbax-checkpoint-tmp")
    shutil.copytree(folder / "4", folder / "5")
    (folder / "5" / "manifest.json").unlink()
    (folder / "²").mkdir()
    victim = max(
        (p for p in (folder / "4").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    exit_status, text = told(done, capsys)
    assert exit_status == 0
    assert "MiB, sealed" in text
    assert "DAMAGED" not in text
    text = told(done, capsys, "--verify")[1]
    assert problem_of(folder / "4") in " ".join(text.split())
    assert "not finished, not used: 6.orbax-checkpoint-tmp" in text
    assert "damaged, not used: 1.damaged" in text
    found = status(done, verify=True)
    assert [one["step"] for one in found["checkpoints"]] == [5, 4, 2]
    assert [one["sealed"] for one in found["checkpoints"]] == [False, True, True]
    assert [bool(one["problem"]) for one in found["checkpoints"]] == [False, True, False]
    rewrite(done, state="failed", error="CheckpointError", message="no checkpoint")
    assert "goes on from step 2." in status(done, verify=True)["next"]
    assert "goes on from step 4." in status(done)["next"]
    (folder / "4" / "manifest.json").write_text('{"files": [1]}')
    assert "manifest.json" in status(done, verify=True)["checkpoints"][1]["problem"]


def test_what_was_skipped_and_what_is_new_in_the_metrics(alive: Path) -> None:
    rewrite(alive, skipped_steps=2)
    (alive / "skipped.jsonl").write_text('{"id": "a", "reason": "b"}\n' * 3)
    line = {"step": 3, "loss": 0.5, "mfu": 0.412, "device_memory_gib": 55.3}
    with (alive / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + '{"step": 4, "lo')
    text = describe(status(alive))
    assert "skipped       3 examples (skipped.jsonl), 2 steps that were not finite" in text
    assert "MFU 41.2%, 55.30 GiB of a device" in " ".join(text.split())
    assert "loss          0.5" in text


def test_alarms_that_hold(alive: Path) -> None:
    with (alive / "metrics.jsonl").open("a") as file:
        for step in range(10, 40):
            spread = {
                "image_spread": 0.5 if step < 20 else 0.001,
                "text_spread": 0.5 * (step % 2),
            }
            file.write(json.dumps({"step": step, "loss": 0.7, "data_wait_slowest": 0.4} | spread))
            file.write("\n")
    text = " ".join(describe(status(alive)).split())
    assert "alarm all images have nearly the same embedding" in text
    assert "all texts" not in text  # not at every step
    assert "slowest process: waits for data 40% of a step" in text


@pytest.mark.parametrize(
    ("losses", "direction"),
    [
        ([1.0 - 0.01 * n + 0.02 * (n % 3) for n in range(60)], "falling"),
        ([1.0 + 0.01 * n + 0.02 * (n % 3) for n in range(60)], "rising"),
        ([1.0 + 0.5 * (n % 3) for n in range(60)], "flat"),
        ([1.0, 0.9, 0.8, 0.7], "falling"),
    ],
)
def test_the_trend(losses: list[float], direction: str) -> None:
    found = status_files.trend([{"step": n, "loss": x} for n, x in enumerate(losses)])
    assert found is not None
    assert found["direction"] == direction
    assert found["lines"] == len(losses) // 2


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = '{"step": %d, "loss": 1, "retrieval/a/b": 2, "more": "' + "x" * 500 + '"}\n'
    path.write_text("".join(line % n for n in range(20_000)))
    lines = status_files.last_lines(path)
    assert 1000 < len(lines) < 10_000
    assert [one["step"] for one in lines] == list(range(20_000 - len(lines), 20_000))
    assert status_files.evaluation(lines) == (19_999, {"retrieval/a/b": 2.0})


HOSTILE = "\x1b]0;title\x07\x1b[2J\r\n\u202e\x9b31m\ud800"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"state": "training", "time": ' + b"9" * 10_000 + b"}",
        b'{"state": "training"}' + b" " * 2**21,
        *(
            json.dumps(dict.fromkeys(names.split(), value)).encode()
            for value in (HOSTILE, 1e308, -1, 10**300, float("nan"), True, None, [], [HOSTILE], {})
            for names in (
                "state message error began host machine version command folder since time",
                "step steps skipped_steps pid process_began processes devices attempt evaluation",
            )
        ),
    ],
)
def test_a_file_of_strangers(
    content: bytes, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (done / "status.json").write_bytes(content)
    exit_status, text = told(done, capsys)
    assert exit_status in (0, 3)
    assert all(line.isprintable() for line in text.split("\n"))
    exit_status, text = told(done, capsys, "--json")
    assert json.loads(text, parse_constant=pytest.fail)["exit_status"] == exit_status


def test_every_field_in_turn_is_of_strangers(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run that is otherwise as it should be, so that the field is used."""
    good = written(done) | {"state": "failed", "error": "E", "message": "m", "time": ago(5)}
    for name in good:
        for value in (
            HOSTILE,
            1e308,
            -1,
            10**300,
            float("nan"),
            {"step": HOSTILE, "kind": HOSTILE},
        ):
            (done / "status.json").write_text(json.dumps(good | {name: value}))
            for flags in ((), ("--json",)):
                exit_status, text = told(done, capsys, *flags)
                assert exit_status in (0, 3)
                assert all(line.isprintable() for line in text.split("\n")), (name, value)


def test_other_files_of_strangers(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["[]", "3", '{"step": "x"}', '{"loss": 1}', '{"step": NaN, "loss": 2}', "[" * 100_000]
    lines += [
        '{"step": 1e300, "loss": Infinity, "images_per_second": -1}',
        '{"step": 3, "loss": "x"}',
    ]
    lines += [json.dumps({"step": 2, f"retrieval/{HOSTILE}": 1.0, HOSTILE: 1.0})]
    (done / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (done / "checkpoints" / "3.damaged\x1b[2J").mkdir()
    for name in ("config.json", "results.json"):
        for content in ("[]", '{"steps": "x", "batch_size": [], "test": {"a": 1}, "eval": 3}', "{"):
            (done / name).write_text(content)
            exit_status, text = told(done, capsys)
            assert exit_status in (0, 3)
            assert all(line.isprintable() for line in text.split("\n"))
            json.loads(told(done, capsys, "--json")[1], parse_constant=pytest.fail)


# --- The command ----------------------------------------------------------------------------------


def test_it_does_not_wait_for_jax(done: Path) -> None:
    program = (
        "import sys; from clip_lite_jax import cli; cli.main(sys.argv[1:]); "
        "slow = {'jax', 'numpy', 'pydantic', 'tensorboardX'} & sys.modules.keys(); "
        "sys.exit(f'imported: {slow}' if slow else 0)"
    )
    subprocess.run([sys.executable, "-c", program, "status", done, "--verify"], check=True)


def test_the_command_can_be_pasted(alive: Path) -> None:
    rewrite(alive, command=["clip-lite", "a b", "$(x)"], folder="/my runs", state="failed")
    found = status(alive)
    program = "cd() { echo $1; }; clip-lite() { printf '%s|' \"$@\"; }; "
    pasted = subprocess.run(
        ["bash", "-c", program + " ".join(command_of(found))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert pasted.stdout == "/my runs\na b|$(x)|"


def test_durations() -> None:
    seconds = (0, 0.25, 5, 99.4, 150, 5999, 9000, 200_000)
    shown = ["0 s", "0.2 s", "5 s", "99 s", "2 min", "1 h 40 min", "2 h 30 min", "2 d 7 h"]
    assert [duration(x) for x in seconds] == shown


def test_a_config_that_is_refused_is_told(
    pairs: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(tiny_config(pairs), seed=5), done)
    exit_status, text = told(done, capsys)
    assert exit_status == 3
    assert f"ConfigError: {done} holds a run with another configuration" in " ".join(text.split())
