"""Files of a web server on this machine (pip install aiohttp)."""

import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fifty import everything, written

from clip_lite_jax import remote
from clip_lite_jax.config import DataConfig
from clip_lite_jax.errors import DataError
from clip_lite_jax.remote import RemotePath

pytest.importorskip("aiohttp")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server of `tmp_path`, which gives no parts of files."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "name",
    ["csv_rows", "json_lines", "parquet_paths", "karpathy_coco", "folder", "array_record"],
)
def test_formats(name: str, tmp_path: Path, address: str) -> None:
    local = written(name, tmp_path / "local")
    config = replace(local, source=local.source.replace(str(tmp_path), address))
    assert everything(config) == everything(local)


def test_what_cannot_be_read(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(remote, "PART", 2**12)
    written("web_dataset", tmp_path / "local")
    for source, message in {
        f"{address}/gone.csv": "No such file",
        f"{address}/local": "nor a folder",
        f"{address}/local/train-{{00000..00004}}.tar": "no parts of files, only whole ones",
        "http://127.0.0.1:1/pairs.csv": "Cannot connect to host 127.0.0.1:1",
    }.items():
        with pytest.raises(DataError, match=message):
            everything(DataConfig(source=source))


def test_a_server_without_ranges_does_not_fill_the_memory(tmp_path: Path, address: str) -> None:
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert RemotePath(f"{address}/large.jpg").read(0, 1000) == bytes(1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
