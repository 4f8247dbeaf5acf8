"""The protocol of S3, spoken to moto's server on this machine (pip install s3fs 'moto[server]')."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from buckets import check_run, moved
from conftest import tiny_config
from fifty import FORMATS, everything, fifty_pairs, written
from test_bucket_runs import another_machine, curve
from test_distributed import Processes, command, small_config, write_config

from clip_lite_jax.apps.data_convert import conversion_of, convert
from clip_lite_jax.cli import main
from clip_lite_jax.config import DataConfig, MeshConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.pairs import Pairs
from clip_lite_jax.data.sources import build_sources, fingerprint
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.inference import load
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.mirror import local_copy
from clip_lite_jax.remote import RemotePath

s3fs = pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(address: str, monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{abs(hash(request.node.name))}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"tfds_folder"}))
def test_every_format(name: str, tmp_path: Path, bucket: str) -> None:
    local = written(name, tmp_path / "local")
    config = moved(local, tmp_path / "local", bucket, s3fs.S3FileSystem())
    assert everything(config) == everything(local)
    found, expected = (build_sources(c, BadExamples()) for c in (config, local))
    assert fingerprint(found) == fingerprint(expected)


@pytest.mark.parametrize("pattern", ["/train-*.tar", "/train-{00000..00004}.tar"])
def test_patterns(pattern: str, tmp_path: Path, bucket: str) -> None:
    local = written("web_dataset", tmp_path / "local")
    config = moved(local, tmp_path / "local", bucket, s3fs.S3FileSystem())
    found = everything(replace(config, source=bucket + pattern))
    assert found["train"] == everything(local)["train"]


def test_what_is_not_there_or_empty_or_changes(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(DataError, match=f"'{bucket}/gone.csv': No such file"):
        everything(DataConfig(source=f"{bucket}/gone.csv"))
    with pytest.raises(DataError, match="'s3://no-such-bucket/gone.csv': No such file"):
        everything(DataConfig(source="s3://no-such-bucket/gone.csv"))
    local = written("csv_rows", tmp_path / "local")
    config = moved(local, tmp_path / "local", bucket, s3fs.S3FileSystem())
    first = everything(config)
    train = build_sources(config, BadExamples())["train"]
    assert isinstance(train, Pairs)
    name = f"{bucket}/images/{fifty_pairs()[0].name}"
    s3fs.S3FileSystem().pipe_file(name, b"")
    assert train[0].image == b""
    s3fs.S3FileSystem().rm_file(name)
    with pytest.raises(BadImage, match="no such file"):
        train[0]
    table = Path(local.source).read_text().replace("no 1", "no X")  # as many bytes
    s3fs.S3FileSystem().pipe_file(config.source, table.encode())
    changed = build_sources(config, BadExamples())["train"].metadata(1)
    assert changed.captions != first["train"][1][2]
    assert changed.captions[0].endswith("no X")


@pytest.mark.parametrize("format", ["records", "tfds"])
def test_conversion(format: str, tmp_path: Path, bucket: str) -> None:
    local = written("csv_rows", tmp_path / "local")
    config = moved(local, tmp_path / "local", bucket, s3fs.S3FileSystem())
    expected = convert(conversion_of(local, tmp_path / "out", format=format, per_shard=7), 1)
    assert (
        convert(conversion_of(config, f"{bucket}/out", format=format, per_shard=7), 1) == expected
    )
    there = {path.name: path.read_bytes() for path in RemotePath(f"{bucket}/out").iterdir()}
    assert there.pop("skipped.jsonl") == b""
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_the_command_by_processes_goes_on(tmp_path: Path, bucket: str) -> None:
    local = written("csv_rows", tmp_path / "local")
    config = moved(local, tmp_path / "local", bucket, s3fs.S3FileSystem())
    command = [sys.executable, "-m", "clip_lite_jax.cli", "data", "convert", config.source]
    command += [f"{bucket}/out", "--per-shard=5", "--processes=2"]
    command += ["--config.data.split_column=split"]
    for _ in range(2):
        subprocess.run(command, check=True, timeout=240)
        assert everything(DataConfig(source=f"{bucket}/out")) == everything(local)
        s3fs.S3FileSystem().rm_file(f"{bucket}/out/train-00003-of-00006.arrayrecord")


def test_a_process_that_was_forked(tmp_path: Path, bucket: str) -> None:
    config = moved(
        written("csv_rows", tmp_path / "local"), tmp_path / "local", bucket, s3fs.S3FileSystem()
    )
    train = build_sources(config, BadExamples())["train"]
    expected = train[0]  # connections are open before the fork
    receiver, sender = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: sender.send(train[0]))
    child.start()
    assert receiver.poll(60)
    assert receiver.recv() == expected
    child.join()


def test_the_check(tmp_path: Path, bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = moved(
        written("csv_rows", tmp_path / "local"), tmp_path / "local", bucket, s3fs.S3FileSystem()
    )
    command = ["data", "check", config.source, f"--out={tmp_path / 'check'}", "--processes=2"]
    assert main([*command, "--config.data.split_column=split"]) == 0
    assert "50" in capfd.readouterr().out


@pytest.mark.usefixtures("two_devices")
def test_a_run(
    pairs: Path,
    tmp_path: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_run(f"{bucket}/runs/one", pairs, tmp_path, s3fs.S3FileSystem(), monkeypatch, caplog)


def test_refusals_of_a_run(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_config(tmp_path / "nowhere.csv"))
    command = ["train", "--config", str(config), "--workdir"]
    assert main([*command, "s3://no-such-bucket/run"]) == 2
    assert "--workdir=s3://no-such-bucket/run: there is no such bucket" in capsys.readouterr().err


def test_a_run_of_two_processes_without_a_shared_disk(
    pairs: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, killed while it sends, and gone on with on new machines each time; and it equals one
    in a shared folder."""
    config = replace(small_config(pairs), mesh=MeshConfig(fsdp="all"))
    file, url = write_config(tmp_path, config), f"{bucket}/runs/two"
    program = ["-m", "clip_lite_jax.main"]
    with Processes(tmp_path, command(program, file, tmp_path / "shared", 2)) as running:
        assert running.wait() == (0, 0), running.texts()

    def is_saved() -> bool:
        return RemotePath(f"{url}/checkpoints/5/manifest.json").is_file()

    another_machine(monkeypatch, tmp_path / "first")
    with Processes(tmp_path, command(program, file, url, 2)) as running:  # type: ignore[arg-type]
        running.wait_for(is_saved)
        running.running[1].terminate()
        assert running.wait() == (75, 75), running.texts()

    def steps() -> set[str]:
        folder = RemotePath(f"{url}/checkpoints")
        folder.forget_listings()
        return {path.name for path in folder.iterdir()}

    before = steps()
    another_machine(monkeypatch, tmp_path / "killed")
    with Processes(tmp_path, command(program, file, url, 2)) as running:  # type: ignore[arg-type]
        running.wait_for(lambda: bool(steps() - before))
        running.running[1].kill()
        assert running.wait() == (1, -9), running.texts()
    another_machine(monkeypatch, tmp_path / "second")
    with Processes(tmp_path, command(program, file, url, 2)) as running:  # type: ignore[arg-type]
        assert running.wait() == (0, 0), running.texts()
        assert "Orbax" not in "".join(running.texts())

    another_machine(monkeypatch, tmp_path / "third")
    copy = local_copy(url)
    one, other = (load(folder) for folder in (copy, tmp_path / "shared"))
    for ours, theirs in zip(*(jax.tree.leaves(m.params) for m in (one, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert curve(read_metrics(copy)) == curve(read_metrics(tmp_path / "shared"))
    names = [path.relative_to(RemotePath(url)).as_posix() for path in RemotePath(url).files()]
    assert not [name for name in names if ".parts" in name]
    folders = [folder.name for folder in (tmp_path / "second" / "runs").iterdir()]
    assert len(folders) == 2  # each has its own

    another_machine(
        monkeypatch, tmp_path / "fourth"
    )  # one process goes on with what two have saved
    longer = write_config(tmp_path / "longer", replace(config, steps=22, resume_from=url))
    with Processes(tmp_path, command(program, longer, tmp_path / "alone", 1), 4) as running:
        assert running.wait() == (0,), running.texts()
        assert "restored checkpoint 20" in running.texts()[0]
