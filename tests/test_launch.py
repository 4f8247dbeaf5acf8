"""What the scripts of `launch/` print with --dry_run is what they run, and others understand it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import (
    ARGUMENTS,
    CASES,
    GOLDEN,
    GPUS,
    JOB,
    ROOT,
    SCRIPTS,
    TPU,
    TPU_JOB,
    TRAINING,
    Recorded,
    dry,
    launch,
    printed,
    words_of,
)

DATA = Path(__file__).parent / "data" / "launch"
FLAGS: dict[str, list[str]] = json.loads((DATA / "flags.json").read_text())["flags"]


@pytest.mark.parametrize("case", CASES)
def test_dry_run(case: str) -> None:
    golden = GOLDEN / f"{case}.txt"
    found = dry(case)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text(), "UPDATE_GOLDEN=1 writes what is printed now"
    # What is printed is a program, comments included.
    subprocess.run(["bash", "-n"], input=found, text=True, check=True)


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_the_other_spelling(script: str) -> None:
    told = launch(script, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert "--dry_run" in told.stdout
    assert told.stdout.startswith(f"launch/{script}")
    words = next(words for words in CASES.values() if words[0] == script)[1:]
    assert printed(script, "--dry-run", *words) == printed(script, "--dry_run", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["local.sh"], "how many processes? "),
        (["local.sh", "two", *TRAINING], "how many processes? "),
        (["local.sh", "2", "--workdir=x"], "--config is missing: FILE.py or FILE.py:VARIANT"),
        (["local.sh", "2", "--config=x"], "--workdir is missing: "),
        (["local.sh", "2", "--config"], "--config needs a value"),
        (["local.sh", "2", "--device=4", *TRAINING], "unknown option --device; "),
        (["local.sh", "2", "--devices=0", *TRAINING], "--devices=0: give a whole number of at "),
        (["local.sh", "2", "--dry_run=no", *TRAINING], "--dry_run takes no value"),
        (["tpu_vm.sh", *TPU], "one action is needed: "),
        (["tpu_vm.sh", "launch", *TPU], "unknown action launch: "),
        (["tpu_vm.sh", "run", "--zone=z", *TRAINING], "--name is missing: "),
        (["tpu_vm.sh", "run", "--name=My_TPU", "--zone=z", *TRAINING], "--name=My_TPU: a small "),
        (["tpu_vm.sh", "run", *TPU], "--config is missing: "),
        (["tpu_vm.sh", "create", *TPU, "--accelerator=v9-8"], "--accelerator=v9-8: its software "),
        (["slurm.sh", "run", *TRAINING], "not understood: run; "),
        (["slurm.sh", *GPUS, "--tasks_per_node=3", *TRAINING], "--tasks_per_node=3: give 1, or 4"),
        (["slurm.sh", "--log=my log", *TRAINING], "my log: an #SBATCH line takes no spaces"),
        (["slurm.sh", "--sbatch=qos=long", *TRAINING], "--sbatch=qos=long: give it as on "),
        (["gke_jobset.sh", "submit", *JOB, *TRAINING], "--tpu or --gpu is missing: "),
        (["gke_jobset.sh", "submit", *JOB, "--tpu=t", "--topology=4", *TRAINING], "--topology=4: "),
        (["gke_jobset.sh", "submit", *JOB[:1], *TRAINING], "--image is missing: "),
        (["gke_jobset.sh", "submit", *TPU_JOB, "--env=x", *TRAINING], "--env=x: give --env=NAME="),
        (["gke_jobset.sh", "submit", *TPU_JOB, *TRAINING, "--config.a=\x07"], "has a control char"),
        (
            ["gke_jobset.sh", "submit", *JOB, "--tpu=t", "--topology=2x3", *TRAINING],
            "--topology=2x3 has 6 chips, which are no multiple of --chips_per_host=4",
        ),
        (
            ["gke_jobset.sh", "submit", *JOB, "--tpu=t", "--topology=2x2", "--slices=2", *TRAINING],
            "--slices: GKE joins only slices of more than one host",
        ),
    ],
)
def test_mistakes_are_told(words: list[str], said: str) -> None:
    told = launch(words[0], "--dry_run", *words[1:])
    assert told.returncode == 2
    assert said in told.stderr.splitlines()[-1]
    assert told.stderr.splitlines()[-1].startswith("error: ")
    assert told.stdout == ""


def test_a_folder_that_is_lost_with_its_machine_is_told_of() -> None:
    for script, *words in (["tpu_vm.sh", "run", *TPU], ["gke_jobset.sh", "submit", *TPU_JOB]):
        told = launch(script, "--dry_run", *words, "--config=x.py", "--workdir=runs/x")
        assert told.returncode == 0
        assert "warning: --workdir runs/x " in told.stderr
        assert "gs://BUCKET/RUN" in told.stderr


def test_arguments_survive_on_this_machine() -> None:
    for line, process in zip(dry("local").splitlines(), ("0", "1"), strict=True):
        words = words_of(line)
        assert words[:5] == [
            *("env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=3"),
            *("python", "-m"),
        ]
        joined = ["--distributed", "--coordinator-address", "127.0.0.1:12345"]
        joined += ["--num-processes", "2", "--process-id", process]
        assert words[5:] == ["clip_lite_jax.main", *ARGUMENTS, *joined]


def test_flags_of_xla_stay() -> None:
    flags = "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2"
    words = ["2", "--dry_run", "--devices=3", "--port=1", "--python=p", *TRAINING]
    line = launch("local.sh", *words, XLA_FLAGS=flags).stdout.splitlines()[0]
    expected = "XLA_FLAGS=--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=3"
    assert expected in words_of(line)


def test_arguments_survive_two_shells_on_the_way_to_a_tpu() -> None:
    for case, first in (("tpu_vm_run", []), ("tpu_vm_run_slices", ["--config.mesh.replica=2"])):
        commands = [words_of(line)[-1] for line in dry(case).splitlines() if " ssh " in line]
        [start] = [words_of(c.removeprefix("--command=")) for c in commands if " start " in c]
        assert start == ["bash", "clip_lite_jax/launch/worker.sh", "start", *first, *ARGUMENTS]


def test_what_runs_is_what_was_printed(tmp_path: Path) -> None:
    tools = Recorded(tmp_path / "bin", {"gcloud": ("READY", 0)})
    for case in ("create", "setup", "status", "logs", "stop", "delete"):
        script, *words = CASES[f"tpu_vm_{case}"]
        assert launch(script, *words, PATH=tools.path).returncode == 0
        found = [call for call, _ in tools.read()]
        tools.calls.unlink()
        lines = dry(f"tpu_vm_{case}").replace("CHECKOUT", str(ROOT)).splitlines()
        assert found == [words_of(line) for line in lines if line.startswith("gcloud ")]
        assert found


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("slurm", "gke"))])
def test_what_is_submitted_is_what_was_printed(case: str, tmp_path: Path) -> None:
    tools = Recorded(tmp_path / "bin", {"sbatch": ("", 0), "kubectl": ("", 0)}, reads=True)
    script, *words = CASES[case]
    assert launch(script, *words, PATH=tools.path).returncode == 0
    [(call, told)] = tools.read()
    first, *lines = dry(case).splitlines(keepends=True)
    assert call == words_of(first.partition(" <<")[0])
    assert told.replace(str(ROOT), "CHECKOUT") == "".join(lines[:-1])


# Of gcloud's, Slurm's and kubectl's commands ---------------------------------------------------


def commands_of(text: str) -> list[list[str]]:
    """The commands of what was printed, those of a batch script too."""
    batch = [line.replace("#SBATCH", "sbatch") for line in text.splitlines() if "#SBATCH" in line]
    lines = [line for line in text.splitlines() if re.match(r"(gcloud|srun|kubectl|sbatch) ", line)]
    return [words_of(line.partition(" <<")[0]) for line in lines + batch]


@pytest.mark.parametrize("case", CASES)
def test_flags_are_those_of_the_tools(case: str) -> None:
    for words in commands_of(dry(case)):
        given = words[: words.index("-m")] if words[0] == "srun" else words
        name = " ".join(word for word in given if not word.startswith("-"))
        known = max((key for key in FLAGS if name.startswith(key)), key=len, default=None)
        assert known is not None, f"{name} is not in flags.json"
        flags = [word.partition("=")[0] for word in given if word.startswith("--")]
        assert set(flags) <= set(FLAGS[known]), (words, known)


PARSE = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/third_party"]
from googlecloudsdk import gcloud_main
parser = gcloud_main.CreateCLI([])._CLI__parser
for words in json.load(sys.stdin):
    resources = parser.parse_args(words[1:]).CONCEPT_ARGS
    resources and resources.ParseConcepts()
print("all read")
"""


def test_gcloud_itself_reads_the_commands(tmp_path: Path) -> None:
    """Its parser alone: nothing is run, and nobody is asked."""
    gcloud = shutil.which("gcloud")
    library = Path(gcloud or "").resolve().parent.parent / "lib"
    if gcloud is None or not (library / "googlecloudsdk").is_dir():
        pytest.skip("gcloud is not installed")
    cases = [case for case in CASES if case.startswith("tpu_vm")]
    commands = [words for case in cases for words in commands_of(dry(case))]
    asked = [[*words, "--project=mine"] for words in commands]
    own = list(library.parent.glob("platform/bundledpythonunix/bin/python3"))
    done = subprocess.run(
        [str(own[0]) if own else sys.executable, "-S", "-c", PARSE, str(library)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)},
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["all read"], done.stderr[-3000:]


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [
        (75, "RUNNING", True),
        (143, "RUNNING", True),
        (75, "COMPLETING", False),  # by scancel
        (1, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_the_batch_script_goes_back_to_the_queue(
    tmp_path: Path, status: int, state: str, again: bool
) -> None:
    script = dry("slurm_gpus").replace("CHECKOUT", str(ROOT)).split("\n", 1)[1]
    answers = {"srun": ("", status), "scontrol": ("", 0), "squeue": (state, 0)}
    tools = Recorded(tmp_path / "bin", answers)
    done = subprocess.run(
        ["bash"],
        input=script.removesuffix("END_OF_INPUT\n"),
        text=True,
        env={"PATH": tools.path, "SLURM_JOB_ID": "17"},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == status
    srun, *others = [call for call, _ in tools.read()]
    assert srun[-len(ARGUMENTS) - 1 :] == ["clip_lite_jax.main", *ARGUMENTS]
    asked = [call for call in others if call[0] == "squeue"]
    assert asked == [["squeue", "--noheader", "--jobs=17", "--format=%T"]] * (status in (75, 143))
    assert {"--noheader", "--jobs", "--format"} <= set(FLAGS["squeue"])
    queued = [call for call in others if call[0] == "scontrol"]
    assert queued == [["scontrol", "requeue", "17"]] * again
