"""What the tests of buckets have in common."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from test_bucket_runs import another_machine, curve, interrupted_at
from test_train import assert_same_state, final_state

from clip_lite_jax.apps.status_bucket import status_in_bucket
from clip_lite_jax.config import DataConfig
from clip_lite_jax.evaluate import evaluate, read_results
from clip_lite_jax.main import run
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.mirror import Mirror, local_copy
from clip_lite_jax.places import place
from clip_lite_jax.remote import RemotePath
from clip_lite_jax.train import train


def moved(config: DataConfig, folder: Path, bucket: str, filesystem: Any) -> DataConfig:
    """The same data in the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{bucket}/{path.relative_to(folder)}", path.read_bytes())
    images = config.image_folder and config.image_folder.replace(str(folder), bucket)
    return replace(config, source=config.source.replace(str(folder), bucket), image_folder=images)


def check_run(
    url: str,
    pairs: Path,
    folder: Path,
    filesystem: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run in the bucket that is stopped, loses its disk, and has its newest checkpoint damaged
    in between, equals one on a disk."""
    config = tiny_config(pairs, steps=6)
    evaluate(train(config, folder / "local"))
    there = place(url)
    assert isinstance(there, RemotePath)
    interrupted_at(3, config, there, monkeypatch)
    assert [c["step"] for c in status_in_bucket(there, verify=True)["checkpoints"]] == [3, 2]

    flipped = max((there / "checkpoints/3").files(), key=lambda path: path.known.size or 0)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    filesystem.pipe_file(flipped.url, bytes(data))
    another_machine(monkeypatch, folder / "another")
    caplog.clear()
    run(config, there)
    assert f"checkpoint {url}/checkpoints/3 is not used: the content of" in caplog.text

    another_machine(monkeypatch, folder / "third")
    copy = local_copy(url)
    assert_same_state(final_state(config, copy), final_state(config, folder / "local"))
    assert curve(read_metrics(copy)) == curve(read_metrics(folder / "local"))
    assert read_results(copy)["test"] == read_results(folder / "local")["test"]  # type: ignore[index]
    found = status_in_bucket(there)
    assert found["verdict"] == "finished"
    assert [c["step"] for c in found["checkpoints"]] == [6, 4]
    assert found["results"]["time"] is not None
    with Mirror(there):  # nothing is left to be done
        pass
