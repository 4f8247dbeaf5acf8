"""`launch/tpu_vm.sh run` on a cloud of folders: its gcloud copies and runs on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launch_scripts import AWKWARD, LAUNCH, ROOT, environment, write_program

NAME = f"tpu-{os.getpid()}"  # the archive of the checkout is called so
WHERE = [f"--name={NAME}", "--zone=z"]

TRAINING = ["--config", "my config.py", "--workdir", "gs://bucket/run", *AWKWARD]

# gcloud: a TPU is there while the file `state` is, which lists what `describe` says in turn; each
# of its workers is a folder, the home of whoever comes by ssh.
GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
kind, action, *words = sys.argv[3:]
state, homes = cloud / "state", [cloud / f"worker_{{number}}" for number in range(2)]
with (cloud / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([kind, action, *words]) + "\\n")
if action == "create":
    refusals = cloud / "refusals"
    if refusals.exists() and (left := int(refusals.read_text())):
        refusals.write_text(str(left - 1))
        sys.exit("ERROR: there is no more capacity in the zone")
    for home in homes:
        home.mkdir()
    state.write_text("CREATING READY" if kind == "tpu-vm" else "WAITING_FOR_RESOURCES ACTIVE")
elif not state.exists():
    sys.exit(f"ERROR: (gcloud.compute.tpus.{{kind}}.{{action}}) NOT_FOUND: no such resource")
elif action == "describe":
    now, *later = state.read_text().split()
    state.write_text(" ".join(later or [now]))
    print(now)
elif action == "delete":
    state.unlink()
    for home in homes:
        shutil.rmtree(home)
elif action == "scp":
    for home in homes:
        shutil.copy(words[0], home / words[1].partition(":")[2])
elif action == "ssh":
    command = next(w for w in words if w.startswith("--command=")).partition("=")[2]
    assert "--worker=all" in words
    for home in homes:
        variables = os.environ | {{"HOME": str(home)}}
        done = subprocess.run(["bash", "-c", command], cwd=home, env=variables, check=False)
        if done.returncode:
            sys.exit(done.returncode)
"""

# python3 of a worker, as far as its setup needs it: it makes the other python, that of training.
PYTHON3 = """#!/usr/bin/env bash
case "$*" in
    "-m uv venv "*) mkdir -p .venv/bin && cp "$CLOUD/training" .venv/bin/python ;;
    "-m uv pip install "*launch/tpu.lock) touch "$HOME/installed" ;;
    "-m uv pip install "* | "-m pip install "*uv) ;;
    *) exec {python} "$@" ;;
esac
"""

# Training: it takes a note of its arguments and ends as the files of the cloud say.
PROGRAM = """#!/usr/bin/env bash
[[ $1 != -c ]] || exit 0
trap 'exit 75' TERM
printf '%s\\0' "$@" >"$HOME/arguments"
echo x >>"$CLOUD/starts"
echo "some line"
while true; do
    for file in "$CLOUD/end" "$HOME/end"; do
        [[ ! -s $file ]] || exit "$(<"$file")"
    done
    sleep 0.1 &
    wait $!
done
"""


class Cloud:
    """The folders, and a call of the script over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.programs = folder / "programs"
        self.programs.mkdir()
        write_program(self.programs / "gcloud", GCLOUD.format(python=sys.executable))
        write_program(self.programs / "python3", PYTHON3.format(python=sys.executable))
        write_program(folder / "training", PROGRAM)

    def run(self, *words: str) -> subprocess.Popen[str]:
        log = (self.folder / "log").open("a")
        return subprocess.Popen(
            [
                *("bash", LAUNCH / "tpu_vm.sh", "run", *WHERE, "--poll=1"),
                *(*words, *TRAINING),
            ],
            stdout=log,
            stderr=log,
            text=True,
            env=environment(PATH=f"{self.programs}:{os.environ['PATH']}", CLOUD=str(self.folder)),
        )

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def starts(self) -> int:
        """Of training, counted over all workers."""
        path = self.folder / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def actions(self) -> list[str]:
        """What gcloud was told to do, looks left out."""
        calls = map(json.loads, (self.folder / "calls.jsonl").read_text().splitlines())
        named = []
        for _, action, *words in calls:
            text = " ".join(words)
            if action == "ssh":
                kinds = ("setup", "start", "log", "stop")
                found = [kind for kind in kinds if f"worker.sh {kind}" in text]
                named += found
            elif action != "describe":
                named.append(action)
        return named

    def wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def end(self, status: int) -> None:
        """How training ends on all workers from now on; 0 clears."""
        (self.folder / "end").write_text(str(status))

    def preempt(self) -> None:
        self.state.write_text("PREEMPTED")
        self.kill()

    def kill(self) -> None:
        """All processes of the workers at once, as a machine that is switched off does."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                mine = f"HOME={self.folder}/worker_".encode() in path.read_bytes()
                if mine and int(path.parent.name) != os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                continue


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path)
    yield made
    made.kill()
    (ROOT / ".work" / "launch" / f"{NAME}.tar.gz").unlink(missing_ok=True)


def arguments(cloud: Cloud) -> list[list[str]]:
    files = sorted(cloud.folder.glob("worker_*/arguments"))
    return [file.read_text().split("\0")[:-1] for file in files]


@pytest.mark.parametrize("words", [["--spot"], ["--queued", "--spot"]], ids=["vm", "queued"])
def test_a_tpu_that_is_preempted_is_made_again(cloud: Cloud, words: list[str]) -> None:
    run = cloud.run(*words, "--delete_when_done")
    cloud.wait(lambda: cloud.starts() == 2)
    cloud.wait(lambda: ": running: some line" in cloud.log())
    cloud.preempt()
    cloud.wait(lambda: cloud.starts() == 4)
    assert arguments(cloud) == [["-m", "clip_lite_jax.main", *TRAINING]] * 2
    assert len(list(cloud.folder.glob("worker_*/installed"))) == 2
    cloud.end(0)
    assert run.wait(60) == 0, cloud.log()
    once = ["create", "scp", "setup", "start"]
    assert cloud.actions() == [*once, "delete", *once, "delete"]
    assert "the TPU is PREEMPTED: it is deleted and created again" in cloud.log()
    assert not cloud.state.exists()


def test_training_that_has_saved_goes_on_and_one_that_fails_only_so_often(cloud: Cloud) -> None:
    run = cloud.run("--max_restarts=1")
    cloud.wait(lambda: cloud.starts() == 2)
    ends = [path / "end" for path in cloud.folder.glob("worker_*")]
    for end in ends:
        end.write_text("75")
    cloud.wait(lambda: statuses(cloud) == ["75\n"] * 2)
    for end in ends:
        end.unlink()
    cloud.wait(lambda: cloud.starts() == 4)
    assert "started again, " not in cloud.log()
    # A worker that lost the other one ends with 1, too; here the TPU is there.
    cloud.end(1)
    assert run.wait(60) == 1, cloud.log()
    assert cloud.starts() == 6
    assert "training ended with status 1: started again, 1 of at most 1 times" in cloud.log()
    assert "the TPU is still there and costs money" in cloud.log()
    assert cloud.actions() == ["create", "scp", "setup", "start", "start", "start", "log"]


def statuses(cloud: Cloud) -> list[str]:
    return [path.read_text() for path in cloud.folder.glob("worker_*/.clip_lite_jax/status")]


def test_what_the_user_can_mend_is_not_tried_again(cloud: Cloud) -> None:
    cloud.end(2)
    run = cloud.run()
    assert run.wait(60) == 2, cloud.log()
    assert cloud.actions() == ["create", "scp", "setup", "start", "log"]


def test_it_watches_what_runs_already_and_ends_when_that_is_stopped(cloud: Cloud) -> None:
    run = cloud.run()
    cloud.wait(lambda: ": running: some line" in cloud.log())
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert "training goes on" in cloud.log()
    again = cloud.run()
    cloud.wait(lambda: cloud.log().count(": running: some line") > 4)
    stop = ["bash", LAUNCH / "tpu_vm.sh", "stop", *WHERE]
    path = f"{cloud.programs}:{os.environ['PATH']}"
    subprocess.run(stop, env=environment(PATH=path, CLOUD=str(cloud.folder)), check=True)
    assert again.wait(60) == 75, cloud.log()
    assert "was told to stop and has saved; run goes on with it" in cloud.log()
    assert cloud.actions() == ["create", "scp", "setup", "start", "stop"]
    # The next one goes on, with the code as it is then.
    third = cloud.run()
    cloud.wait(lambda: cloud.starts() == 4)
    cloud.end(0)
    assert third.wait(60) == 0, cloud.log()
    assert cloud.actions()[5:] == ["scp", "setup", "start"]


def test_capacity_is_waited_for_where_the_tpu_was_there_before(cloud: Cloud) -> None:
    (cloud.folder / "refusals").write_text("1")
    run = cloud.run()
    assert run.wait(60) == 2
    assert "the TPU was not created; --queued waits for capacity" in cloud.log()
    run = cloud.run()
    cloud.wait(lambda: cloud.starts() == 2)
    (cloud.folder / "refusals").write_text("2")
    cloud.preempt()
    cloud.wait(lambda: cloud.starts() == 4)
    assert cloud.actions().count("create") == 5
    cloud.end(0)
    assert run.wait(60) == 0


def test_a_machine_that_was_started_anew_counts_as_a_failure(cloud: Cloud) -> None:
    run = cloud.run("--max_restarts=0")
    cloud.wait(lambda: cloud.log().count(": running: some line") >= 4)
    cloud.kill()
    assert run.wait(60) == 137, cloud.log()
    assert ": lost: some line" in cloud.log()


def test_an_account_that_may_not_look_ends_it(cloud: Cloud) -> None:
    write_program(cloud.programs / "gcloud", "#!/bin/sh\necho 'ERROR: no account' >&2; exit 1\n")
    assert cloud.run().wait(60) == 1
    assert "ERROR: no account" in cloud.log()
