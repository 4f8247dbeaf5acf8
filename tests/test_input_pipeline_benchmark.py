"""The bench of the input pipeline: its pictures, our readers and its table; no PyTorch needed."""

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_pipeline
from benchmarks.input_pipeline import READERS, build, memory, tables, write_pictures

PROVENANCE = {"commit": "abc", "machine": "a machine", "date": "today"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    photograph = Image.fromarray(noise).resize((640, 427), Image.Resampling.BICUBIC)
    write_pictures(path, 100, [photograph, photograph.rotate(180)])
    return path


def test_files_and_shards_hold_the_same_pictures(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".tar")
    with tarfile.open(folder / "00000.tar") as tar:
        assert sorted(tar.getnames()) == names
        member = tar.extractfile("000099.jpg")
        assert member is not None
        assert member.read() == (folder / "000099.jpg").read_bytes()
    assert Image.open(folder / "000000.jpg").size == (500, 375)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """A step pins its process to a core, which here is that of the tests."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("kind", [kind for kind in READERS if kind.startswith("ours")])
def test_our_readers_see_the_pictures(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_pipeline, "BATCHES", 1)
    core = next(iter(os.sched_getaffinity(0)))
    assert 80 < build(str(folder), kind, core)() < 175


def test_memory_is_looked_at_ten_times(folder: Path) -> None:
    seen = memory(str(folder), 20 * input_pipeline.BATCH)
    assert [count for count, _ in seen] == [2 * input_pipeline.BATCH * n for n in range(1, 11)]
    assert all(mib > 50 for _, mib in seen)


def test_the_table_compares_turn_by_turn() -> None:
    speeds = itertools.count(1)
    found = {kind: [100.0 * next(speeds)] * 3 for kind in READERS}
    results = {
        "command": "python",
        "provenance": PROVENANCE,
        "torch": "2",
        "bytes": 55_000,
        "rates": found,
        "commands": {"check": [10.0, 30.0, 20.0]},
        "memory": [(640, 350.2), (1280, 351.0)],
    }
    text = tables(results)["input pipeline"]
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert "| 100 |  |  |" in lines["| libjpeg-turbo: decode, no more"]
    assert (
        "| 200 | 2.00 (2.00 to 2.00) | 0.50 (0.50 to 0.50) |" in lines["| ours: crop, flip, resize"]
    )
    assert "| 900 |" in lines["| DataLoader: full"]
    assert "1.00 (1.00 to 1.00) |" in lines["| DataLoader: full"]
    assert "| 20 |" in lines["| `clip-lite data check`"]
    assert "files of 55 kB" in text
    assert "1,280 pictures, at every tenth of them: 350, 351." in text
