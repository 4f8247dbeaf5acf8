"""What the scripts of `launch/` print with --dry_run is what they run, and others understand it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from launch_scripts import (
    AWKWARD,
    GOLDEN,
    LAUNCH,
    REST,
    ROOT,
    TRAINING,
    Recorded,
    launch,
    printed,
    words_of,
)

DATA = Path(__file__).parent / "data" / "launch"
FLAGS: dict[str, list[str]] = json.loads((DATA / "flags.json").read_text())["flags"]
SCRIPTS = ("local.sh", "tpu_vm.sh", "slurm.sh", "gke_jobset.sh")
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


# The manifest ----------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """Kubernetes' schema as kubectl applies it: fields that it does not name are mistakes."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if "properties" in found and "x-kubernetes-preserve-unknown-fields" not in found:
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


def manifest(case: str) -> dict[str, Any]:
    lines = dry(case).splitlines()
    return yaml.safe_load("\n".join(lines[1:-1]))


@pytest.mark.parametrize("case", ["gke_jobset_tpu", "gke_jobset_gpu"])
def test_the_manifest_is_a_jobset(case: str) -> None:
    schema = closed(json.loads((DATA / "jobset.json").read_text()))
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {name: {} for name in ("name", "labels", "annotations")},
        "additionalProperties": False,
    }
    check = jsonschema.Draft202012Validator(schema)
    found = manifest(case)
    check.validate(found)
    # The check would find what is wrong.
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    for wrong in ({"restartPolicies": "Never"}, {"hostNetwork": "yes"}, {"containers": [{}]}):
        kept = dict(pod)
        pod |= wrong
        with pytest.raises(jsonschema.ValidationError):
            check.validate(found)
        pod.clear()
        pod |= kept


@pytest.mark.parametrize("case", ["gke_jobset_tpu", "gke_jobset_gpu"])
def test_what_kubernetes_asks_beyond_the_schema(case: str) -> None:
    found = manifest(case)
    [replicated] = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    # A pod failure policy wants pods that are never restarted, and names a container that is there.
    assert pod["restartPolicy"] == "Never"
    exits, taken = job["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75, 143],
    }
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in (exits, taken)} == {"FailJob"}
    [rule] = found["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["parallelism"] == job["completions"] == {"tpu": 4, "gpu": 2}[case[-3:]]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    # The longest name that is made of it is a label.
    longest = f"{'a' * 40}-{replicated['name']}-99-999-abcde"
    assert len(longest) <= 63
    assert launch("gke_jobset.sh", "delete", f"--name={'a' * 41}", "--dry_run").returncode == 2


def expanded(text: str, variables: dict[str, str]) -> str:
    """Kubernetes' rule: ``$(NAME)`` is replaced where it is known, ``$$`` is ``$``."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


@pytest.mark.parametrize("case", ["gke_jobset_tpu", "gke_jobset_gpu"])
def test_arguments_survive_kubernetes(case: str) -> None:
    pod = manifest(case)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    variables = {"HOME": "/wrong", "b": "wrong", "JOB_COMPLETION_INDEX": "1"}
    given = [expanded(text, variables) for text in container["args"]]
    if case.endswith("tpu"):
        assert given == ["--config.mesh.replica=2", *ARGUMENTS]
        values = {entry["name"]: expanded(entry["value"], variables) for entry in container["env"]}
        assert values == {"PYTHONUNBUFFERED": "1", "NOTE": "a: $(b) 'c'"}
    else:
        joined = ["--distributed", "--coordinator-address", "run-1-worker-0-0.run-1:8476"]
        joined += ["--num-processes", "2", "--process-id", "1"]
        assert given == [*ARGUMENTS, *joined]


# Lint ------------------------------------------------------------------------------------------


def program(name: str) -> str:
    """One of the environment that the tests run in, or of the machine."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is missing: it comes with requirements-test.lock"
    return found


def test_shellcheck() -> None:
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(scripts) == len(SCRIPTS) + 2  # common.sh, worker.sh
    done = subprocess.run(
        [program("shellcheck"), "--external-sources", *scripts, str(ROOT / ".ci" / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_hadolint() -> None:
    done = subprocess.run(
        [program("hadolint"), str(LAUNCH / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def instructions() -> list[tuple[str, str]]:
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    found = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(name, rest) for name, rest in found]


def test_what_the_image_is_made_from() -> None:
    stages: list[str] = []
    for name, rest in instructions():
        words = rest.split()
        if name == "FROM":
            assert words[0] in stages or re.fullmatch(r"python:\$\{PYTHON\}", words[0])
            stages += words[2:]
        if name == "COPY" and words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        elif name == "COPY":
            for source in [word for word in words[:-1] if not word.startswith("--")]:
                for devices in ("cpu", "cuda", "tpu"):
                    path = source.replace("${DEVICES}", devices)
                    assert (ROOT / path).exists(), path
                    assert not_ignored(path), path
    arguments = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", arguments["PYTHON"])
    assert arguments["DEVICES"] == "cpu"
    names = [name for name, _ in instructions()]
    assert dict(instructions())["USER"] == "1000"  # not root
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert dict(instructions())["ENTRYPOINT"].startswith("[")  # signals reach the program


def not_ignored(path: str) -> bool:
    """Whether .dockerignore leaves it to the build; the last pattern that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and (pattern == "*" or Path(path).match(pattern)):
            kept = line.startswith("!")
    return kept


def test_locks_of_images_are_exact_and_without_tensorflow() -> None:
    pins = {}
    for devices in ("cpu", "cuda", "tpu"):
        lines = (LAUNCH / f"{devices}.lock").read_text().splitlines()
        names = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert not {"tensorflow", "tensorflow-cpu", "tf-nightly", "torch", "clu"} & set(names)
        assert {"jax", "flax", "gcsfs", "s3fs"} <= set(names)
        pins[devices] = names
    assert set(pins["tpu"]) - set(pins["cpu"]) == {"libtpu"}
    assert "jax-cuda13-plugin" in pins["cuda"]
    # Packages that more than one names have the same version everywhere, tested or deployed.
    tested = (ROOT / "requirements.lock").read_text()
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        versions = {found[name] for found in pins.values()}
        assert len(versions) == 1
        assert re.search(rf"^{name}=={re.escape(versions.pop())}( ;|$)", tested, re.MULTILINE)
