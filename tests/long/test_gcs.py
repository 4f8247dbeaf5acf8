"""The protocol of Google Cloud Storage, spoken to an emulator on this machine.

``pip install gcsfs gcp-storage-emulator``
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from buckets import check_run, moved
from fifty import FORMATS, everything, written

from clip_lite_jax.apps.data_convert import conversion_of, convert
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources, fingerprint
from clip_lite_jax.errors import DataError

# The emulator speaks no gRPC, by which gcsfs asks what kind of bucket it has.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
gcsfs = pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")
PORT = 9023


@pytest.fixture(scope="module")
def filesystem() -> Iterator[object]:
    server = emulator.create_server("127.0.0.1", PORT, in_memory=True)
    server.start()
    options = {"token": "anon", "project": "p", "endpoint_url": f"http://127.0.0.1:{PORT}"}
    fsspec.config.conf["gs"] = options
    yield gcsfs.GCSFileSystem(**options)
    del fsspec.config.conf["gs"]
    server.stop()


@pytest.fixture
def bucket(filesystem, request: pytest.FixtureRequest) -> str:  # type: ignore[no-untyped-def]
    name = f"bucket-{abs(hash(request.node.name))}"
    filesystem.mkdir(name)
    return f"gs://{name}"


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"tfds_folder"}))
def test_every_format(name: str, tmp_path: Path, bucket: str, filesystem: object) -> None:
    local = written(name, tmp_path / "local")
    config = moved(local, tmp_path / "local", bucket, filesystem)
    assert everything(config) == everything(local)
    found, expected = (build_sources(c, BadExamples()) for c in (config, local))
    assert fingerprint(found) == fingerprint(expected)


def test_conversion(tmp_path: Path, bucket: str) -> None:
    local = written("csv_rows", tmp_path / "local")
    for _ in range(2):
        convert(conversion_of(local, f"{bucket}/out", per_shard=7), 1)
        records = replace(local, source=f"{bucket}/out", split_column=None)
        assert everything(records) == everything(local)


def test_what_is_not_there(bucket: str) -> None:
    with pytest.raises(DataError, match=f"'{bucket}/gone.csv': No such file"):
        everything(DataConfig(source=f"{bucket}/gone.csv"))


@pytest.mark.usefixtures("two_devices")
def test_a_run(
    pairs: Path,
    tmp_path: Path,
    bucket: str,
    filesystem: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_run(f"{bucket}/runs/one", pairs, tmp_path, filesystem, monkeypatch, caplog)
