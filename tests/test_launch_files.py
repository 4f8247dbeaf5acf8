"""What others read of `launch/`: manifests, the image, and the scripts' text."""

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
from launch_scripts import ARGUMENTS, LAUNCH, ROOT, SCRIPTS, dry, launch

SCHEMA = Path(__file__).parent / "data" / "launch" / "jobset.json"


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
    schema = closed(json.loads(SCHEMA.read_text()))
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
