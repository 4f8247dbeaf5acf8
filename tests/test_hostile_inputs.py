"""Hostile inputs: none crashes, hangs or takes memory; each is listed with its reason."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

from clip_lite_jax.data.image_ops import Opened, decode
from clip_lite_jax.errors import BadImage

MEMORY_MIB = 1024
"""Over what reading harmless pictures takes."""


def test_there_are_many() -> None:
    assert len(hostile.refused()) + len(hostile.usable()) + 12 >= 60


@pytest.mark.parametrize("name", hostile.usable())
def test_odd_pictures_are_pictures(name: str) -> None:
    opened = Opened(hostile.usable()[name])
    picture = opened.decoded()
    assert picture.mode == "RGB"
    assert picture.size == opened.size


@pytest.mark.parametrize("name", hostile.refused())
def test_others_are_refused(name: str) -> None:
    data, reason = hostile.refused()[name]
    with pytest.raises(BadImage, match=reason):
        decode(data)


READ = """
import json, resource, sys, threading
import numpy as np
from clip_lite_jax.config import AugmentConfig, DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.pipeline import TrainTransform, train_batches
from clip_lite_jax.data.sources import build_sources, captions_of
from clip_lite_jax.data.tokenizer import Tokenizer, train_tokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def read(table):
    bad = BadExamples()
    config = DataConfig(source=table, held_out=0, image_size=32, threads=2)
    source = build_sources(config, bad)["train"]
    tokenizer = Tokenizer(train_tokenizer(captions_of(source), 300), 8)
    transform = TrainTransform(source, TowerInputs(Pixels(config), tokenizer), config, bad)
    batches = train_batches(transform, len(source), 0, 0)
    for _ in range(2):
        batch = next(batches)
    valid = [source.metadata(int(i)).id for i in batch.index[batch.valid]]
    return valid, bad.reasons

read(sys.argv[1])
before = peak()
valid, reasons = read(sys.argv[2])
print(json.dumps({"valid": valid, "reasons": reasons, "mib": peak() - before}))
"""


def write_table(folder: Path, names: list[str]) -> Path:
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([name, f"a picture of {i}"] for i, name in enumerate(names))
    return folder / "pairs.csv"


def test_a_folder_of_them(tmp_path: Path) -> None:
    harmless, folder = tmp_path / "harmless", tmp_path / "hostile"
    harmless.mkdir()
    folder.mkdir()
    (tmp_path / "outside.jpg").write_bytes(hostile.encoded(hostile.noise(), "JPEG"))
    for name in "abcdef":
        (harmless / f"{name}.jpg").write_bytes(hostile.encoded(hostile.noise(), "JPEG"))
    usable, refused = hostile.usable(), hostile.refused()
    for name, data in usable.items():
        (folder / f"ok {name}").write_bytes(data)
    for name, (data, _) in refused.items():
        (folder / name).write_bytes(data)
    with (folder / "enormous.jpg").open("wb") as file:
        file.truncate(50_000_000_000)  # sparse: it takes no room on the disk
    special = hostile.special_files(folder) | {"enormous.jpg": "50,000,000,000 bytes, over"}
    names = [*(f"ok {name}" for name in usable), *refused, *special]
    tables = [
        write_table(harmless, [f"{name}.jpg" for name in "abcdef"]),
        write_table(folder, names),
    ]
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, tables)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found["valid"]) == sorted(f"ok {name}" for name in usable)
    # "pairs.csv:7: gone.jpg" before an image is read, "broken.jpg" after
    reasons = {id.rpartition(": ")[2]: why for id, why in found["reasons"].items()}
    expected = {name: reason for name, (_, reason) in refused.items()} | special
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], name
    assert found["mib"] < MEMORY_MIB
