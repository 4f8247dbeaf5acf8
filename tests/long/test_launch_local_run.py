"""`launch/local.sh` with real trainings, one of which is killed.

Kept out of the ordinary run because its four starts of the command take most of a minute of
processor time; `tests/test_launch_local.py` watches the script over stubs, and
`tests/test_distributed.py` kills the same training without the script.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import write_pairs
from launch_scripts import LAUNCH
from test_distributed import STEPS, sgd, write_config
from test_launch_local import wait_for

from clip_lite_jax.metrics import read_metrics


def test_a_real_run_is_killed_and_goes_on(tmp_path: Path) -> None:
    """Two processes of two devices each; that it equals an undisturbed run: test_distributed."""
    config = write_config(tmp_path / "config", sgd(write_pairs(tmp_path / "pairs")))
    workdir = tmp_path / "run"
    command = [
        *("bash", LAUNCH / "local.sh", "2", "--devices=2", f"--python={sys.executable}"),
        *("--config", config, "--workdir", workdir),
    ]
    variables = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=variables)

    def begun() -> bool:
        assert run.poll() is None, (tmp_path / "log").read_text()
        if not (workdir / "metrics.jsonl").exists():
            return False
        return any(line["step"] >= STEPS // 3 for line in read_metrics(workdir))

    try:
        wait_for(begun, 240)
        os.kill(process_of(run.pid, "--process-id 1"), signal.SIGKILL)
        since = time.monotonic()
        assert run.wait(30) == 128 + signal.SIGKILL
        assert time.monotonic() - since < 30
    finally:
        run.terminate()
        run.wait()
    text = (tmp_path / "log").read_text()
    assert "[process 0] error: process 1 on " in text
    assert "goes on from the newest checkpoint" in text

    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"[process 0] report: {workdir}/report.html" in done.stdout
    steps = [line["step"] for line in read_metrics(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


def process_of(parent: int, words: str) -> int:
    """The child of a process whose command line has these words."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            of = int(path.read_text().rpartition(")")[2].split()[1])
            line = (path.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if of == parent and words in line:
            return int(path.parent.name)
    raise AssertionError(json.dumps(words))
