"""The protocol of S3, spoken to moto's server on this machine (pip install s3fs 'moto[server]')."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from buckets import moved
from fifty import FORMATS, everything, fifty_pairs, written

from clip_lite_jax.apps.data_convert import conversion_of, convert
from clip_lite_jax.cli import main
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.pairs import Pairs
from clip_lite_jax.data.sources import build_sources, fingerprint
from clip_lite_jax.errors import BadImage, DataError
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
