"""How the tests run the scripts of `launch/`."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "tpu_vm.sh", "slurm.sh", "gke_jobset.sh")
GOLDEN = Path(__file__).parent / "golden"

AWKWARD = [
    '--config.name=it\'s "one"',
    "--config.data.source=$HOME/`id`/a  b\t*?[c]{d,e}~!#&;|<>",
    "--config.data.strict=$(id) $$ $(HOME) $5 \\n %s",
    "--config.log.wandb_project=two\nlines",
    "--config.data.prompt=",
]
"""Arguments of the training command that a shell or a manifest would like to read otherwise."""

TRAINING = ["--config", "configs/my pairs.py:small", "--workdir", "gs://bucket/it's a run"]
REST = ["--", "--join-timeout", "60", ""]


def environment(**more: str) -> dict[str, str]:
    """Nothing of the person who runs the tests but where programs are."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", **more}


def launch(script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """One call of a script, from the checkout."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**more),
        timeout=60,
        check=False,
    )


def printed(script: str, *words: str) -> str:
    """What a script prints with ``--dry_run``, wherever this checkout is."""
    done = launch(script, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "CHECKOUT")


def words_of(line: str) -> list[str]:
    """The words that a shell reads in a line."""
    told = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return told.stdout.split("\0")[:-1]


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


RECORDER = """#!{python}
import json, os, sys
with open({calls!r}, "a") as file:
    told = sys.stdin.read() if {reads} else ""
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], told]) + "\\n")
print({answer!r})
sys.exit({status})
"""


class Recorded:
    """Programs that take a note of how they are called, in place of real ones."""

    def __init__(
        self, folder: Path, answers: Mapping[str, tuple[str, int]], reads: bool = False
    ) -> None:
        """`answers`: what each prints, and how it ends; with `reads` standard input is noted."""
        folder.mkdir()
        self.calls = folder / "calls.jsonl"
        for name, (answer, status) in answers.items():
            text = RECORDER.format(
                python=sys.executable,
                calls=str(self.calls),
                reads=reads,
                answer=answer,
                status=status,
            )
            write_program(folder / name, text)
        self.path = f"{folder}:{os.environ['PATH']}"

    def read(self) -> list[tuple[list[str], str]]:
        """The words of every call, and what it was given on its standard input."""
        lines = map(json.loads, self.calls.read_text().splitlines())
        return [([name, *words], told) for name, words, told in lines]


ASKED_FOR = [*TRAINING, *AWKWARD, *REST]
ARGUMENTS = [*TRAINING, *AWKWARD, *REST[1:]]  # as the training command gets them

TPU = ["--name=my-tpu", "--zone=us-central1-a"]
SLICES = [*TPU, "--project=mine", "--accelerator=v4-16", "--slices=2", "--spot"]
JOB = ["--name=run-1", "--image=europe-docker.pkg.dev/mine/images/clip_lite_jax:tpu"]
TPU_JOB = [*JOB, "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--slices=2", "--spot"]
SETTINGS = ["--service_account=trainer", "--secret=wandb", "--queue=team", "--env=NOTE=a: $(b) 'c'"]
GPUS = ["--nodes=2", "--gpus_per_node=4", "--cpus_per_task=8", "--time=1-00:00:00"]

CASES: dict[str, list[str]] = {
    "local": ["local.sh", "2", "--devices=3", "--port=12345", "--python=python", *ASKED_FOR],
    "local_one": ["local.sh", "1", "--python=my python", "--port=1", *TRAINING],
    "tpu_vm_create": ["tpu_vm.sh", "create", *TPU, "--create_flag=--network=a b", "--queued"],
    "tpu_vm_setup": ["tpu_vm.sh", "setup", *TPU],
    "tpu_vm_run": ["tpu_vm.sh", "run", *TPU, *ASKED_FOR],
    "tpu_vm_run_slices": ["tpu_vm.sh", "run", *SLICES, "--delete_when_done", *ASKED_FOR],
    "tpu_vm_status": ["tpu_vm.sh", "status", *TPU],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *TPU, "--lines=5"],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *TPU],
    "tpu_vm_delete": ["tpu_vm.sh", "delete", *SLICES],
    "slurm_gpus": [
        *("slurm.sh", *GPUS, "--partition=gpu", "--account=us", "--sbatch=--qos=long"),
        *("--warning=300", "--python=/opt/my env/bin/python", *ASKED_FOR),
    ],
    "slurm_cpus": ["slurm.sh", "--python=python3", *TRAINING],
    "gke_jobset_tpu": ["gke_jobset.sh", "submit", *TPU_JOB, *SETTINGS, *ASKED_FOR],
    "gke_jobset_gpu": [
        *("gke_jobset.sh", "submit", *JOB, "--gpu=nvidia-l4", "--hosts=2", "--gpus_per_host=1"),
        *("--namespace=team", *ASKED_FOR),
    ],
    "gke_jobset_status": ["gke_jobset.sh", "status", "--name=run-1", "--namespace=team"],
    "gke_jobset_logs": ["gke_jobset.sh", "logs", "--name=run-1", "--lines=7"],
    "gke_jobset_delete": ["gke_jobset.sh", "delete", "--name=run-1"],
}


def dry(case: str) -> str:
    script, *words = CASES[case]
    return printed(script, "--dry_run", *words)
