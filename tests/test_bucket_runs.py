"""Runs whose folder is a bucket: what is there counts, whole or not at all, on any machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest
from conftest import Clock, tiny_config
from fsspec.implementations.memory import MemoryFileSystem
from test_checkpoints import META, make_state
from test_saving import at
from test_train import assert_same_state, final_state

from clip_lite_jax import bucket_checkpoints, checkpoints
from clip_lite_jax import train as training
from clip_lite_jax.apps import status_bucket
from clip_lite_jax.apps.report import write_report
from clip_lite_jax.apps.status_bucket import status_in_bucket
from clip_lite_jax.beginnings import resumed, tokenizer_of
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.cli import main
from clip_lite_jax.config import CheckpointConfig, Config, LogConfig
from clip_lite_jax.errors import CheckpointError, ConfigError, DataError, Interrupted
from clip_lite_jax.evaluate import evaluate, read_results
from clip_lite_jax.files import read_json_lines
from clip_lite_jax.inference import load
from clip_lite_jax.main import run
from clip_lite_jax.metrics import FROM_THE_MACHINE, read_metrics
from clip_lite_jax.mirror import Mirror, local_copy
from clip_lite_jax.places import each
from clip_lite_jax.remote import RemotePath
from clip_lite_jax.run import build_run
from clip_lite_jax.train_state import TrainState

URL = "memory://bucket/runs/one"
HERE = RemotePath(URL)


@pytest.fixture(autouse=True)
def bucket(buckets: MemoryFileSystem) -> MemoryFileSystem:
    return buckets


def another_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """All that lay on the disk of this one is gone."""
    monkeypatch.setenv("CLIP_LITE_CACHE", str(folder))


def names(url: str = URL) -> set[str]:
    return {path.relative_to(RemotePath(url)).as_posix() for path in RemotePath(url).files()}


def steps() -> list[int]:
    found = bucket_checkpoints.finished(HERE / "checkpoints", tell=False)
    return [int(path.name) for path in found]


def curve(lines: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in FROM_THE_MACHINE} for line in lines]


@pytest.fixture(scope="module")
def state() -> TrainState:
    return make_state(1)


def saved(state: TrainState, *steps: int, config: CheckpointConfig | None = None) -> None:
    with (
        Mirror(HERE) as mirror,
        Checkpoints(mirror.folder, config or CheckpointConfig(keep=9), mirror) as checkpoints,
    ):
        for step in steps:
            checkpoints.save(at(state, step), META, {"loss": float(step)})


# --- A whole run ----------------------------------------------------------------------------------


def interrupted_at(
    step: int, config: Config, place: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that gets SIGTERM while it takes a batch."""
    real, taken = training.put_batch, 0

    def put_batch(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "put_batch", put_batch)
        with pytest.raises(Interrupted, match="with a checkpoint"):
            run(config, place)


@pytest.mark.usefixtures("two_devices")
def test_a_run_goes_on_on_another_machine(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(pairs, steps=6, log=LogConfig(tensorboard=True))
    evaluate(training.train(config, tmp_path / "local"))

    interrupted_at(3, config, HERE, monkeypatch)
    small = {"config.json", "tokenizer.model", "metrics.jsonl", "status.json"}
    assert {name for name in names() if "/" not in name} == small
    assert [name for name in names() if name.startswith("tensorboard/")]
    assert steps() == [2, 3]
    found = status_in_bucket(HERE, verify=True)
    assert (found["state"], found["step"], found["workdir"]) == ("interrupted", 3, URL)
    assert [(c["step"], c["sealed"], c["problem"]) for c in found["checkpoints"]] == [
        (3, True, ""),
        (2, True, ""),
    ]
    assert found["next"] == "The same command goes on from step 3."

    other = replace(config, resume_from=URL)  # another run may begin with it
    assert tokenizer_of(other).model == (tmp_path / "local" / "tokenizer.model").read_bytes()  # type: ignore[union-attr]
    begun, _ = build_run(config, tmp_path / "begun").init_state({})
    assert resumed(other, begun).step == 3

    another_machine(monkeypatch, tmp_path / "another")
    capsys.readouterr()
    run(config, HERE)
    assert f"report: {URL}/report.html" in capsys.readouterr().out
    assert steps() == [4, 6]
    assert names() >= small | {"results.json", "report.html"}
    assert URL in (HERE / "report.html").read_bytes().decode()

    another_machine(monkeypatch, tmp_path / "third")
    copy = local_copy(URL)
    assert_same_state(final_state(config, copy), final_state(config, tmp_path / "local"))
    assert curve(read_metrics(copy)) == curve(read_metrics(tmp_path / "local"))
    assert read_results(copy)["test"] == read_results(tmp_path / "local")["test"]  # type: ignore[index]
    weights = (load(place).params for place in (URL, tmp_path / "local"))
    for one, same in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_array_equal(one, same)
    assert main(["status", URL]) == 0
    assert f"{URL}: finished" in capsys.readouterr().out
    assert write_report(copy, URL).name == "report.html"


# --- Checkpoints ----------------------------------------------------------------------------------


def flip(name: str, system: MemoryFileSystem) -> None:
    data = bytearray(system.cat_file(f"{URL}/{name}"))
    data[len(data) // 2] ^= 1
    system.pipe_file(f"{URL}/{name}", bytes(data))


def largest(step: int) -> str:
    paths = (HERE / "checkpoints" / str(step)).files()
    return max(paths, key=lambda path: path.known.size or 0).relative_to(HERE).as_posix()


def newest(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int | None:
    """Where another machine would go on."""
    another_machine(monkeypatch, folder)
    with Mirror(HERE) as mirror, Checkpoints(mirror.folder, None, mirror) as checkpoints:
        return checkpoints.latest_step()


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_told_of_and_not_used(
    damage: str,
    state: TrainState,
    bucket: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(state, 1, 2, 3)
    name = largest(3)
    if damage == "flipped":
        flip(name, bucket)
    elif damage == "cut":
        bucket.pipe_file(f"{URL}/{name}", bucket.cat_file(f"{URL}/{name}")[:-1])
    else:
        bucket.rm_file(f"{URL}/{name}")
    inside = name.removeprefix("checkpoints/3/")
    problem = f"{inside} is missing" if damage == "gone" else f"the content of {inside} has changed"
    assert next(c["problem"] for c in status_in_bucket(HERE, verify=True)["checkpoints"]) == problem
    assert newest(monkeypatch, tmp_path / "b") == 2
    assert f"checkpoint {URL}/checkpoints/3 is not used: {problem}" in caplog.text
    assert steps() == [1, 2]
    assert status_in_bucket(HERE)["no_checkpoints"] == ["3"]
    caplog.clear()
    assert newest(monkeypatch, tmp_path / "c") == 2
    assert "is not used: " not in caplog.text  # it does not count any more
    saved(state, 3)
    assert status_in_bucket(HERE)["no_checkpoints"] == []
    assert newest(monkeypatch, tmp_path / "d") == 3
    saved(state, 4, config=CheckpointConfig(keep=1))
    assert {name.split("/")[1] for name in names()} == {"4"}


def test_all_of_them_damaged(
    state: TrainState, bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(state, 1, 2)
    flip(largest(1), bucket)
    flip(largest(2), bucket)
    with pytest.raises(CheckpointError, match=f"all checkpoints in {URL}/checkpoints are damaged"):
        newest(monkeypatch, tmp_path / "b")


def test_what_is_cut_short_before_the_manifest_is_no_checkpoint(
    state: TrainState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
) -> None:
    monkeypatch.setattr(checkpoints, "ATTEMPTS", 2)
    saved(state, 1)
    real, failing = RemotePath.write_bytes, ["manifest.json"]

    def write_bytes(path: RemotePath, data: bytes) -> None:
        if path.name in failing:
            raise DataError(f"{path}: the line is cut")
        real(path, data)

    monkeypatch.setattr(RemotePath, "write_bytes", write_bytes)
    with (
        Mirror(HERE) as mirror,
        Checkpoints(mirror.folder, CheckpointConfig(keep=9), mirror) as own,
    ):
        assert own.latest_step() == 1
        with pytest.raises(CheckpointError, match="the line is cut"):
            own.save_or_retry(at(state, 2), META, {}, wait=True)
        assert [path.name for path in (mirror.folder / "checkpoints").iterdir()] == ["2"]
        assert f"{URL}/checkpoints/2/manifest.json: the line is cut; training goes" in caplog.text
        assert own.latest_step() == 1
        assert steps() == [1]
        caplog.clear()
        assert newest(monkeypatch, tmp_path / "b") == 1
        assert f"checkpoint {URL}/checkpoints/2 was not finished, and is not used" in caplog.text
        failing.clear()
        own.save_or_retry(at(state, 3), META, {}, wait=True)
    assert steps() == [1, 3]
    assert not any(name.startswith("checkpoints/2/") for name in names())  # it is tidied


def test_which_stay(state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CheckpointConfig(keep=1, keep_every=4, best="loss", best_is="lowest")
    saved(state, 2, 3, 4, 5, config=config)
    assert steps() == [2, 4, 5]
    another_machine(monkeypatch, tmp_path / "b")
    for folder in ("5.parts", "9.parts"):  # of saves of several processes: one is under way
        (HERE / "checkpoints" / folder / "0.json").write_bytes(b"{}")
    saved(state, 6, config=config)
    assert steps() == [2, 4, 6]
    assert {name.split("/")[1] for name in names()} == {"2", "4", "6", "9.parts"}
    with Mirror(HERE) as mirror:
        assert [path.name for path in (mirror.folder / "checkpoints").iterdir()] == ["6"]


def test_a_disk_from_before_does_not_count(state: TrainState, bucket: MemoryFileSystem) -> None:
    saved(state, 1, 2)
    with Mirror(HERE) as mirror:
        (mirror.folder / "metrics.jsonl").write_text('{"step": 2}\n')
        (mirror.folder / "features").mkdir()
    bucket.store.clear()  # the run is deleted, and a new one begins in its place
    with Mirror(HERE) as mirror:
        assert {path.name for path in mirror.folder.iterdir()} <= {"features", "checkpoints"}
        assert Checkpoints(mirror.folder, None, mirror).latest_step() is None


def add_to_manifest(name: str, system: MemoryFileSystem) -> None:
    """The manifest of step 2 lists a file that is not there."""
    path = f"{URL}/checkpoints/2/manifest.json"
    content = json.loads(system.cat_file(path))
    content["files"][name] = [4, "0" * 64]
    system.pipe_file(path, json.dumps(content).encode())


@pytest.mark.parametrize(
    "name",
    [
        *("../../../evil", "/evil", "a/../../evil", "..\\evil", "a//b", "manifest.json", "a\0b"),
        *("manifest.json/a", "a" * 250, "a/" * 600 + "b", "\ud800"),
    ],
)
def test_names_that_lead_elsewhere(
    name: str,
    state: TrainState,
    bucket: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(state, 1, 2)
    add_to_manifest(name, bucket)
    assert newest(monkeypatch, tmp_path / "b") == 1
    assert "manifest.json" in caplog.text
    assert not list(tmp_path.rglob("*evil*"))


def test_a_name_that_is_a_file_and_a_folder(
    state: TrainState,
    bucket: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(state, 1, 2)
    add_to_manifest(f"{largest(2).removeprefix('checkpoints/2/')}/a", bucket)
    assert newest(monkeypatch, tmp_path / "b") == 1
    assert "checkpoints/2 is not used: " in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": 3}', b"[" * 100_000, b"\xff"])
def test_manifests_that_are_none(
    content: bytes,
    state: TrainState,
    bucket: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved(state, 1, 2)
    bucket.pipe_file(f"{URL}/checkpoints/2/manifest.json", content)
    assert newest(monkeypatch, tmp_path / "b") == 1


def test_parts_of_several_processes_are_one(tmp_path: Path) -> None:
    there, together = HERE / "checkpoints" / "7", threading.Barrier(3)
    parts = [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(parts):
        (folder / "array").mkdir(parents=True)
        (folder / "described").write_text(f"by {number}")
        (folder / "array" / f"{number}.0").write_bytes(bytes([number]) * 9)
        (folder / "array" / "of_some").write_text(str(number)) if number else None

    def send(number: int) -> None:
        def wait(moment: str) -> None:
            together.wait(60)
            if moment != "sealed":  # as it is when all have come so far
                found.append(bucket_checkpoints.is_sealed(HERE / "checkpoints" / "7"))
                together.wait(60)

        bucket_checkpoints.send(parts[number], there, {"loss": 1.0}, number, 3, wait)

    found: list[bool] = []
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(send, range(3)))  # which raises what they raise
    assert found == [False] * 6
    assert bucket_checkpoints.bring(there, tmp_path / "whole") == ""
    whole = {
        path.relative_to(tmp_path / "whole").as_posix(): path.read_bytes()
        for path in (tmp_path / "whole").rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    blocks = {f"array/{number}.0": bytes([number]) * 9 for number in range(3)}
    assert whole == blocks | {"described": b"by 0", "array/of_some": b"1"}
    assert bucket_checkpoints.bring(there, parts[1]) == ""  # who has a part gets the rest
    assert (parts[1] / "described").read_text() == "by 0"
    (parts[2] / "described").unlink()
    (parts[2] / "described" / "x").mkdir(parents=True)
    assert bucket_checkpoints.bring(there, parts[2]) == ""  # whatever lies there
    assert [path.name for path in (HERE / "checkpoints").iterdir()] == ["7"]


# --- Small files, and what cannot be --------------------------------------------------------------


def test_small_files_that_cannot_be_sent_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = RemotePath.write_bytes
    with Mirror(HERE) as mirror:
        (mirror.folder / "metrics.jsonl").write_text('{"step": 1}\n')
        monkeypatch.setattr(RemotePath, "write_bytes", refused)
        for _ in range(2):
            mirror.send_soon(at_once=True)
            mirror._thread.join()  # type: ignore[union-attr]
        assert caplog.text.count(f"{URL}/metrics.jsonl: no room; it is tried again") == 1
        monkeypatch.setattr(RemotePath, "write_bytes", real)
        mirror.send_soon()  # it is not time
        assert "metrics.jsonl" not in names()
        mirror.send_soon(at_once=True)
        mirror._thread.join()  # type: ignore[union-attr]
        assert f"{URL} is written again" in caplog.text
        assert list(read_json_lines(local_copy_of("metrics.jsonl", mirror.folder)))
    with pytest.raises(DataError, match="no room"), Mirror(HERE) as mirror:  # noqa: PT012
        (mirror.folder / "metrics.jsonl").write_text('{"step": 1}\n')
        monkeypatch.setattr(RemotePath, "write_bytes", refused)


def test_what_changes_while_small_files_are_sent_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    real, begun, may_end = RemotePath.write_bytes, threading.Event(), threading.Event()

    def write_bytes(path: RemotePath, data: bytes) -> None:
        begun.set()
        may_end.wait(60)
        real(path, data)

    with Mirror(HERE) as mirror:
        monkeypatch.setattr(RemotePath, "write_bytes", write_bytes)
        (mirror.folder / "status.json").write_text("{}")
        mirror.send_soon(at_once=True)
        assert begun.wait(60)
        (mirror.folder / "status.json").write_text('{"state": "saving"}')
        mirror.send_soon(at_once=True)
        may_end.set()
        mirror._thread.join()  # type: ignore[union-attr]
        assert (HERE / "status.json").read_bytes() == b'{"state": "saving"}'


def test_what_is_missing_here_stays_there() -> None:
    with pytest.raises(DataError, match="is gone: start again"), Mirror(HERE) as mirror:  # noqa: PT012
        for name in ("metrics.jsonl", "tokenizer.model", "skipped.jsonl"):
            (mirror.folder / name).write_text("{}\n")
        mirror.send()
        for name in ("metrics.jsonl", "skipped.jsonl"):  # a run that begins anew has the second
            (mirror.folder / name).unlink()
        mirror.send()
        assert names() == {"metrics.jsonl", "tokenizer.model"}
        shutil.rmtree(mirror.folder)
    assert names() == {"metrics.jsonl", "tokenizer.model"}


def test_a_run_that_goes_on_while_others_look(
    state: TrainState,
    bucket: MemoryFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(state, 1, 2)
    real, sealed = RemotePath.download, bucket_checkpoints.is_sealed

    def goes_on() -> None:
        """Saves step 3, and deletes the others."""
        for name in [name for name in names() if name.startswith("checkpoints/2/")]:
            content = bucket.cat_file(f"{URL}/{name}")
            bucket.pipe_file(f"{URL}/{name.replace('/2/', '/3/')}", content)
        for step in "12":
            bucket_checkpoints.delete(HERE / "checkpoints" / step)

    def download(path: RemotePath, file: Path) -> None:
        if steps() == [1, 2]:
            goes_on()
        real(path, file)

    def is_sealed(path: RemotePath) -> bool:
        found = sealed(path)
        if path.name == "3":
            bucket_checkpoints.delete(path)
        return found

    monkeypatch.setattr(RemotePath, "download", download)
    copy = local_copy(URL)
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["3"]
    assert "is not used" not in caplog.text
    monkeypatch.setattr(status_bucket, "is_sealed", is_sealed)
    assert status_in_bucket(HERE)["checkpoints"] == []
    assert steps() == []


def test_a_copy_keeps_nothing_that_is_gone(state: TrainState) -> None:
    saved(state, 1)
    (HERE / "results.json").write_bytes(b"{}")
    assert (local_copy(URL) / "results.json").exists()
    (HERE / "results.json").remove()
    assert not (local_copy(URL) / "results.json").exists()


@pytest.mark.parametrize("ends", ["early", "with an error"])
def test_nothing_goes_on_in_the_background(ends: str) -> None:
    begun, may_end, ended = threading.Barrier(3), threading.Event(), []

    def one(path: RemotePath) -> None:
        if path.name in "ab":
            begun.wait(60)
            may_end.wait(60)
            ended.append(path.name)
        elif path.name == "first":
            begun.wait(60)
            threading.Timer(0.1, may_end.set).start()
            if ends != "early":
                raise DataError("the line is cut")

    paths = [HERE / name for name in ("first", "a", "b")]
    with contextlib.suppress(DataError):
        for _ in each(one, paths):
            break
    assert sorted(ended) == ["a", "b"]


def test_a_run_is_not_started_twice_on_a_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Mirror(HERE):
        with pytest.raises(ConfigError, match=f"{URL}: another process of this machine runs it"):
            Mirror(HERE).__enter__()
        another_machine(monkeypatch, tmp_path / "b")
        with monkeypatch.context() as patch:
            patch.setattr(RemotePath, "write_bytes", refused)
            with pytest.raises(ConfigError, match="no room"):
                Mirror(HERE).__enter__()
        with Mirror(HERE):  # what failed let go of it
            pass


def refused(path: RemotePath, data: bytes) -> None:
    raise DataError(f"{path}: no room")


def local_copy_of(name: str, folder: Path) -> Path:
    copy = folder.parent / "copy"
    copy.write_bytes((HERE / name).read_bytes())
    return copy


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://bucket/run", "nothing://bucket/run: no protocol 'nothing'"),
        ("gs:/bucket/run", "gs:/bucket/run is no URL, which has two slashes: gs://bucket/run; if"),
        ("file:///tmp/run", "a file of this machine goes by its path: /tmp/run"),
        (
            "gs://bucket/run",
            r"the package for gs:// is missing: pip install 'clip_lite_jax\[gcs\]'",
        ),
        ("s3://bucket/run", r"the package for s3:// is missing: pip install 'clip_lite_jax\[s3\]'"),
    ],
)
def test_urls_that_are_refused(
    url: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if url[:5] in ("gs://", "s3://"):
        try:
            fsspec.get_filesystem_class(url.partition(":")[0])
            pytest.skip("it is installed")
        except ImportError:
            pass
    assert main(["train", "--config", "nowhere.py", "--workdir", url]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Access Denied"), "access refused .Access Denied.: credentials that may"),
        (FileNotFoundError("no such bucket"), f"--workdir={URL}: there is no such bucket"),
        (NotImplementedError("read-only"), "read-only"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_refused_before_anything_is_read(
    error: Exception, message: str, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe_file(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    config = tiny_config(Path("nowhere.csv"))
    with pytest.raises(ConfigError, match=message) as told:
        run(config, HERE)
    assert URL in str(told.value)


def test_features_that_several_processes_would_keep_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config(Path("pairs.csv"))
    frozen = replace(config.model, image=replace(config.model.image, cache=True))
    config = replace(config, model=frozen)
    Mirror(HERE).check(config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    Mirror(tmp_path).check(config)
    Mirror(HERE).check(replace(config, data=replace(config.data, feature_cache="shared")))
    with pytest.raises(ConfigError, match="config.data.feature_cache=DIR"):
        Mirror(HERE).check(config)


def test_the_status_of_a_bucket_does_not_wait_for_jax() -> None:
    program = "import sys, clip_lite_jax.apps.status_bucket; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_run_there() -> None:
    with pytest.raises(CheckpointError, match=f"{URL} holds no run"):
        status_in_bucket(HERE)
    with pytest.raises(CheckpointError, match=f"{URL} holds no checkpoints"):
        load(URL)


def test_a_bucket_that_is_deleted_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: RemotePath, data: bytes) -> None:
        raise FileNotFoundError(str(path))

    with pytest.raises(DataError, match=f"cannot be sent to {URL}"), Mirror(HERE) as mirror:  # noqa: PT012
        (mirror.folder / "metrics.jsonl").write_text('{"step": 1}\n')
        monkeypatch.setattr(RemotePath, "write_bytes", gone)


def test_each_process_must_be_able_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemotePath, "write_bytes", refused)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ConfigError, match=f"{URL}/.writable-1: no room"):
        Mirror(HERE).__enter__()


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    another_machine(monkeypatch, tmp_path / "file")
    with pytest.raises(ConfigError, match=f"{URL} cannot be copied to .*CLIP_LITE_CACHE names"):
        Mirror(HERE).__enter__()
    with pytest.raises(CheckpointError, match=f"{URL} cannot be copied to .*CLIP_LITE_CACHE names"):
        local_copy(URL)


def test_messages_name_the_bucket_and_not_the_copy(state: TrainState) -> None:
    with pytest.raises(CheckpointError) as told, Mirror(HERE) as mirror:
        raise CheckpointError(f"nothing in {mirror.folder}/checkpoints")
    assert str(told.value) == f"nothing in {URL}/checkpoints"
