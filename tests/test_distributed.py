"""Several processes through the command line: they equal one, and end together with a reason."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import FLAGS, tiny_config, tiny_model, write_pairs

from clip_lite_jax.apps.status import status as status_of
from clip_lite_jax.apps.status_text import describe
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import Config, OptimConfig, to_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.pipeline import _order
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.files import read_json_lines
from clip_lite_jax.inference import load
from clip_lite_jax.metrics import FROM_THE_MACHINE, read_metrics

STEPS, SAVED_EVERY = 20, 5
HOST = socket.gethostname()

CONFIG = """
import json
from pathlib import Path
from clip_lite_jax.config import Config, from_dict

def get_config():
    return from_dict(Config, json.loads(Path(__file__).with_suffix(".json").read_text()))
"""

# The command, which also writes the examples and negatives of every step that it begins.
WATCHED = """
import json, sys
from dataclasses import replace
from pathlib import Path
from clip_lite_jax import cli, main
import jax
from clip_lite_jax import train as training
from clip_lite_jax.learner import make_gradient

make_train_step, compiled = training.make_train_step, training.compiled
drawn = Path(sys.argv[sys.argv.index("--workdir") + 1], "drawn.jsonl")
learners = []

def made(learner, *rest, **named):
    learners.append(learner)
    return make_train_step(learner, *rest, **named)

def watched(step, state, batch, mesh):
    found = compiled(step, state, batch, mesh)
    whole = jax.NamedSharding(mesh, jax.P())

    def draw(state, batch):
        return state.step, batch.index, make_gradient(learners[-1])(state, batch)[0][1].index

    draw = jax.jit(draw, out_shardings=whole)

    def both(state, batch):
        line = [x.tolist() for x in jax.device_get(draw(state, batch))]
        if jax.process_index() == 0:
            with drawn.open("a") as file:
                file.write(json.dumps(line) + "\\n")
        return found.step(state, batch)

    return replace(found, step=both)

training.make_train_step, training.compiled = made, watched
if "--no-report" in sys.argv:
    sys.argv.remove("--no-report")
    main.run = training.train
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""

# The command with something else in the place of training; `I` is the number of the process.
INSTEAD = """
import atexit, os, sys, time, types
from clip_lite_jax import cli, distributed
distributed.SEEN_WITHIN = 3
I = int(sys.argv[sys.argv.index("--process-id") + 1])

def run(config, workdir):
    {body}

sys.modules["clip_lite_jax.main"] = types.SimpleNamespace(run=run)  # its import takes seconds
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


class Processes:
    """Processes of one command, each with its log in a file."""

    def __init__(self, folder: Path, commands: list[list[str]], devices: int = 2) -> None:
        self.logs = [folder / f"log.{number}" for number in range(len(commands))]
        flags = [f for f in FLAGS if "device_count" not in f]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        self.running = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as file:
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"XLA_FLAGS": " ".join(flags)},
                    )
                )

    def wait(self, seconds: float = 600) -> tuple[int, ...]:
        """Their exit statuses."""
        deadline = time.monotonic() + seconds
        return tuple(p.wait(max(0.1, deadline - time.monotonic())) for p in self.running)

    def wait_for(self, reached: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert all(p.poll() is None for p in self.running), self.texts()
            assert time.monotonic() < deadline, self.texts()
            time.sleep(0.05)

    def texts(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.running:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def flags_of(processes: int) -> list[list[str]]:
    port = free_port()
    shared = ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", str(processes)]
    return [[*shared, "--process-id", str(number)] for number in range(processes)]


def write_config(folder: Path, config: Config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    path = folder / "config.py"
    path.write_text(CONFIG)
    return path


def command(program: list[str], config: Path, workdir: Path, processes: int) -> list[list[str]]:
    run = ["--config", str(config), "--workdir", str(workdir)]
    return [[*program, *run, *flags] for flags in (flags_of(processes) if processes > 1 else [[]])]


def small_config(pairs: Path) -> Config:
    config = tiny_config(pairs)
    return replace(
        config,
        steps=STEPS,
        negatives=replace(config.negatives, block=16, lanes=4),
        eval=replace(config.eval, every=10),
        checkpoint=replace(config.checkpoint, every=SAVED_EVERY),
    )


# A mild temperature keeps gradients of order one, so that 1e-6 means something in float32.
def sgd(pairs: Path) -> Config:
    return replace(
        small_config(pairs),
        model=tiny_model(temperature=0.5),
        optim=OptimConfig(name="sgd", learning_rate=1e-2, warmup_steps=0),
    )


def adamw(pairs: Path) -> Config:
    return replace(
        small_config(pairs),
        model=tiny_model("float64", temperature=0.5),
        optim=OptimConfig(name="adamw", learning_rate=1e-3, warmup_steps=0),
    )


def train(folder: Path, config: Path, processes: int) -> Path:
    """The workdir of a run of so many processes, with four devices together."""
    workdir = folder / f"processes_{processes}"
    given = command(["-c", WATCHED], config, workdir, processes)
    given = [[*line, "--no-report"] for line in given]
    with Processes(folder, given, devices=4 // processes) as running:
        assert running.wait() == (0,) * processes, running.texts()
    return workdir


def drawn(workdir: Path) -> dict[int, Any]:
    """Examples and negatives by step; a step that was begun twice had the same ones."""
    steps: dict[int, Any] = {}
    for step, *integers in read_json_lines(workdir / "drawn.jsonl"):
        assert steps.setdefault(step, integers) == integers
    return steps


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = list(read_metrics(workdir))
    return [{k: v for k, v in line.items() if k not in FROM_THE_MACHINE} for line in lines]


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    for workdir in (one, other):
        with Checkpoints.open(workdir) as checkpoints:
            assert checkpoints.latest_step() == STEPS
    assert drawn(one) == drawn(other)
    assert sorted(drawn(one)) == list(range(STEPS))
    a, b = (jax.device_get(load(workdir).params) for workdir in (one, other))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)
    assert [line.keys() for line in logged(one)] == [line.keys() for line in logged(other)]


def test_float64_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    config = write_config(tmp_path, adamw(write_pairs(tmp_path / "pairs")))
    one, two = (train(tmp_path, config, processes) for processes in (1, 2))
    with jax.enable_x64(True):
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(load(one).params))
        assert_same(one, two, 1e-9)


def assert_the_slowest_is_told(workdir: Path) -> None:
    lines = list(read_metrics(workdir))
    told = [line for line in lines if "data_wait_slowest" in line]
    assert [line["step"] for line in told] == [10, 20]  # at step 0 there is no rate yet
    own = {line["step"]: line["data_wait"] for line in lines if "data_wait" in line}
    for line in told:  # process 0 has logged what it has gathered
        assert line["data_wait_slowest"] >= own[line["step"]] - 1e-6
        assert 0 <= line["host_overhead_slowest"] <= 1
    found = status_of(workdir)
    assert (found["processes"], found["devices"]["count"], found["verdict"]) == (2, 4, "finished")
    assert "4 × cpu in 2 processes" in describe(found)


def kill_in_training(config: Path, workdir: Path, killed: int, step: int) -> None:
    """Two processes train; one of them is killed after `step`, and the other says so and ends."""
    with Processes(workdir.parent, command(["-c", WATCHED], config, workdir, 2)) as running:
        running.wait_for(lambda: step in drawn(workdir))
        running.running[killed].kill()
        since = time.monotonic()
        status = [1, 1]
        status[killed] = -signal.SIGKILL
        assert running.wait(30) == tuple(status), running.texts()
        assert time.monotonic() - since < 30
    reason = running.texts()[1 - killed].splitlines()[-1]
    assert reason.startswith(
        f"[process {1 - killed}] error: process {killed} on {HOST} ended without a word"
    )
    assert status_of(workdir)["verdict"] in ("died", "failed")


def test_float32_sgd_killed_or_not(tmp_path: Path) -> None:
    """Of a third run process 1 is killed; ``long/test_coordinator_killed`` kills process 0."""
    config = write_config(tmp_path, sgd(write_pairs(tmp_path / "pairs")))
    one, two = (train(tmp_path, config, processes) for processes in (1, 2))
    assert_same(one, two, 1e-6)
    assert_the_slowest_is_told(two)

    workdir = tmp_path / "killed"
    kill_in_training(config, workdir, killed=1, step=7)
    with Processes(tmp_path, command(["-c", WATCHED], config, workdir, 2)) as running:
        assert running.wait() == (0, 0), running.texts()
    first, second = running.texts()
    assert f"report: {workdir}/report.html" in first
    assert "report" not in second  # one process says how it goes
    assert_same(two, workdir, 0)
    assert logged(two) == logged(workdir)


def test_a_picture_that_one_process_cannot_read_ends_both(tmp_path: Path) -> None:
    config = sgd(write_pairs(tmp_path / "pairs"))
    config = replace(config, data=replace(config.data, strict=True))
    source = build_sources(config.data, BadExamples())["train"]
    order = _order(source, config.batch_size, config.seed)
    ids = np.array([order[row] for row in range(3 * config.batch_size)]).reshape(3, 2, -1)
    met = next(example for example in ids[2, 1] if example not in ids[:, 0])
    broken = tmp_path / "pairs" / source.metadata(int(met)).id
    broken.write_bytes(b"no picture")
    given = command(
        ["-m", "clip_lite_jax.main"], write_config(tmp_path, config), tmp_path / "run", 2
    )
    with Processes(tmp_path, given) as running:
        assert running.wait() == (1, 2), running.texts()
    first, second = (text.splitlines()[-1] for text in running.texts())
    assert second.startswith("[process 1] error: 1 of 96 examples cannot be used")
    reason = second.removeprefix("[process 1] error: ")
    assert first == f"[process 0] error: process 1 on {HOST} failed: {reason}"


# --- Ends, without training -----------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config", tiny_config(tmp_path / "pairs.csv"))


def instead(body: str) -> list[str]:
    return ["-c", INSTEAD.format(body=body)]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_of_one_process_ends_the_other(
    failing: int, config: Path, tmp_path: Path
) -> None:
    body = f"time.sleep(300 * (I != {failing})); raise RuntimeError('no luck')"
    with Processes(tmp_path, command(instead(body), config, tmp_path / "run", 2)) as running:
        assert running.wait() == (1, 1), running.texts()
    own, other = (running.texts()[number].splitlines() for number in (failing, 1 - failing))
    assert f"[process {failing}] Traceback (most recent call last):" in own
    assert own[-1] == f"[process {failing}] RuntimeError: no luck"
    assert other[-1] == (
        f"[process {1 - failing}] error: process {failing} on {HOST} failed: RuntimeError: no luck"
    )
    assert not any("Traceback" in line for line in other)


def test_an_error_that_comes_of_a_lost_process_is_not_what_is_told(
    config: Path, tmp_path: Path
) -> None:
    """As between CPUs, whose collectives raise at once where a peer is gone."""
    body = "I and os.kill(os.getpid(), 9); time.sleep(0.5); 1 / 0"
    with Processes(tmp_path, command(instead(body), config, tmp_path / "run", 2)) as running:
        assert running.wait() == (1, -signal.SIGKILL), running.texts()
    assert "process 1 on" in running.texts()[0].splitlines()[-1]
    assert "ZeroDivisionError" not in running.texts()[0]


def test_all_wait_for_the_last(config: Path, tmp_path: Path) -> None:
    """What jax leaves to a barrier that gives up after some minutes."""
    body = "time.sleep(2 * I); print(time.time()); atexit.register(lambda: print(time.time()))"
    with Processes(tmp_path, command(instead(body), config, tmp_path / "run", 2)) as running:
        assert running.wait() == (0, 0), running.texts()
    times = [[float(line) for line in text.split()[-2:]] for text in running.texts()]
    assert times[0][1] > times[1][0] > times[0][0]


def test_a_folder_that_is_not_shared(config: Path, tmp_path: Path) -> None:
    one, other = (command(instead("pass"), config, tmp_path / name, 2) for name in "ab")
    one[1] = other[1][: other[1].index("--coordinator-address")] + one[1][-6:]
    with Processes(tmp_path, one) as running:
        assert running.wait() == (1, 2), running.texts()
    for text in running.texts():
        assert f"--workdir={tmp_path}/b on {HOST} is not the folder that process 0" in text


@pytest.mark.parametrize(
    ("check", "differs"),
    [
        ("everywhere(config, 'ab'[I])", "data fingerprint: 'a' in process 0, 'b' in this one; "),
        (
            "start(config, RemotePath('memory://' + 'ab'[I]))",
            "--workdir: 'memory://a' in process 0, 'memory://b' in this one; ",
        ),
        ("start(config, workdir / str(I))", ""),
    ],
)
def test_processes_that_were_given_something_else(
    check: str, differs: str, config: Path, tmp_path: Path
) -> None:
    body = "from clip_lite_jax import agreement; from clip_lite_jax.remote import RemotePath"
    body += f"; agreement.check_same_{check}; time.sleep(300)"
    given = command(instead(body), config, tmp_path / "run", 2)
    given[1] += ["--config.seed=7", "--config.model.critic.name=bilinear"]
    given[1] += ["--config.data.threads=3"]  # as each may have its own of
    with Processes(tmp_path, given) as running:
        assert running.wait() == (1, 2), running.texts()
    for text in running.texts():
        told = f"process 1 was started with something else than process 0 ({differs}"
        assert f"{told}model.critic.name: " in text
        assert "; seed: 0 in process 0, 7 in this one): give all processes the same" in text
        assert "threads" not in text


def test_ctrl_c(config: Path, tmp_path: Path) -> None:
    body = "print('begun', flush=True); time.sleep(300)"
    with Processes(tmp_path, command(instead(body), config, tmp_path / "run", 2)) as running:
        running.wait_for(lambda: all("begun" in text for text in running.texts()))
        running.running[1].send_signal(signal.SIGINT)
        assert running.wait(30) == (1, 130), running.texts()
    assert f"error: process 1 on {HOST} was stopped by Ctrl-C" in running.texts()[0]


def test_a_missing_host_and_wrong_flags(config: Path, tmp_path: Path) -> None:
    program = ["-m", "clip_lite_jax.main"]
    one, other = command(program, config, tmp_path / "run", 2)
    hasty = ["--join-timeout", "1"]
    with Processes(tmp_path, [[*one, *hasty], [*other[:-1], "2"]]) as running:
        assert running.wait() == (1, 2), running.texts()
    first, second = (text.splitlines()[-1] for text in running.texts())
    assert first.startswith("[process 0] error: process 1 of 2 did not come to 127.0.0.1:")
    assert second == "error: --process-id=2: of 2 processes they are 0 to 1"
