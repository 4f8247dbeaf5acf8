"""`clip-lite embed`: sources as files of embeddings, whole and resumable."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw

import clip_lite_jax
from clip_lite_jax import cli
from clip_lite_jax.apps.embed import Embedding, embed
from clip_lite_jax.apps.embed_files import FORMATS, Shard, read_shards
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.inference import DualEncoderModel


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return clip_lite_jax.load(finished_run, batch_size=16)


def whole(folder: Path, kind: str = "images") -> Shard:
    """All shards as one."""
    shards = list(read_shards(folder, kind))
    captions = [text for shard in shards for text in shard.captions or ()]
    ids = [id for shard in shards for id in shard.ids]
    return Shard(ids, np.concatenate([shard.embeddings for shard in shards]), captions)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_the_projections_of_pictures_and_captions(
    model: DualEncoderModel, pairs: Path, tmp_path: Path, format: str
) -> None:
    data = DataConfig(source=str(pairs))
    embedding = Embedding(data, tmp_path / "out", format=format, what="both", per_shard=20)
    manifest = embed(model, embedding, "runs/mine")
    images, texts = whole(tmp_path / "out"), whole(tmp_path / "out", "texts")
    names = {f"{colour}_{shape}.png" for colour in COLOURS for shape in SHAPES}
    assert Counter(images.ids) == Counter(names)
    assert Counter(texts.ids) == Counter([*names, *names])
    expected = model.project_image([pairs.parent / id for id in images.ids])
    np.testing.assert_allclose(images.embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(texts.embeddings, model.project_text(texts.captions), atol=1e-5)
    assert manifest["count"] == 48 + 96
    assert manifest["model"]["path"] == str(Path.cwd() / "runs/mine")  # from everywhere
    assert (manifest["model"]["step"], manifest["model"]["critic"]) == (4, "dot")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_splits_types_and_lengths_can_be_chosen(
    model: DualEncoderModel, pairs: Path, tmp_path: Path
) -> None:
    data = DataConfig(source=str(pairs))
    embed(model, Embedding(data, tmp_path / "out", splits=["test"], unit=True, dtype="float16"))
    found = whole(tmp_path / "out")
    tests = build_sources(data, BadExamples())["test"]
    assert found.ids == [tests.metadata(index).id for index in range(len(tests))]
    assert found.embeddings.dtype == np.float16
    expected = model.encode_image([pairs.parent / id for id in found.ids])
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-3)
    with pytest.raises(ConfigError, match="--split holiday: choose from train"):
        embed(model, Embedding(data, tmp_path / "other", splits=["holiday"]))
    for field, value in (("format", "csv"), ("what", "sound"), ("dtype", "int8")):
        with pytest.raises(ConfigError, match=f"--{field} {value}: choose from"):
            embed(model, Embedding(data, tmp_path / "other", **{field: value}))


def test_pictures_need_no_captions_unless_one_trains(
    model: DualEncoderModel, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    (folder / "2024").mkdir(parents=True)
    draw("ring", "red").save(folder / "a.png")
    draw("bar", "blue").save(folder / "2024" / "b.png")
    (folder / "a.txt").write_text("b.png has none, and is read all the same")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    embedding = Embedding(DataConfig(source=str(folder)), tmp_path / "out")
    assert embed(model, embedding)["skipped"] == 1
    assert whole(tmp_path / "out").ids == ["a.png", "2024/b.png"]
    (listed,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert "torn.jpg" in listed
    assert "cannot be decoded" in listed
    alone = DataConfig(source=str(folder), format="pictures")
    for data in (
        alone,
        DataConfig(source=str(folder), format="pictures", splits={"x": str(folder)}),
    ):
        with pytest.raises(DataError, match="pictures without captions"):
            build_sources(data, BadExamples())


KILLED = """
import os, signal, sys
from pathlib import Path
from clip_lite_jax import cli
from clip_lite_jax.data import records

files = []
write = records.write_raw_records

def killing(path, rows):
    files.append(path)
    def half():
        for number, row in enumerate(rows):
            yield row
            if len(files) == 3 and number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
    return write(path, half())

from clip_lite_jax.apps import embed_files
embed_files.write_raw_records = killing
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_loses_and_doubles_no_row(
    model: DualEncoderModel, finished_run: Path, pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    command = ["embed", str(pairs), "--model", str(finished_run), "--out", str(folder)]
    command += ["--per-shard", "7", "--batch-size", "16"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(folder.glob("*.tmp"))  # in the middle of a shard
    before = {path: path.stat().st_mtime_ns for path in folder.glob("images-*")}
    before = {path: time for path, time in before.items() if path.suffix != ".tmp"}
    assert len(before) == 2
    with pytest.raises(DataError, match="no finished embeddings"):
        whole(folder)
    assert cli.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(folder.glob("*.tmp"))
    undisturbed = Embedding(DataConfig(source=str(pairs)), tmp_path / "at once", per_shard=7)
    embed(model, undisturbed)
    resumed, expected = whole(folder), whole(tmp_path / "at once")
    assert resumed.ids == expected.ids
    assert len(set(resumed.ids)) == 48
    np.testing.assert_array_equal(resumed.embeddings, expected.embeddings)


def test_what_does_not_belong_together_is_refused(
    model: DualEncoderModel, finished_run: Path, tmp_path: Path
) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    draw("ring", "red").save(pictures / "a.png")
    data = DataConfig(source=str(pictures))
    first = embed(model, Embedding(data, out))
    assert embed(model, Embedding(data, out)) == first
    other = clip_lite_jax.load(finished_run, batch_size=16)
    critic = other.params["critic"]
    other.params = {**other.params, "critic": {**critic, "score_bias": critic["score_bias"] + 1}}
    with pytest.raises(
        ConfigError, match="model.weights: '[0-9a-f]{32}' there, '[0-9a-f]{32}' now"
    ):
        embed(other, Embedding(data, out))
    with pytest.raises(ConfigError, match="per_shard: 4096 there, 10 now"):
        embed(model, Embedding(data, out, per_shard=10))
    draw("bar", "blue").save(pictures / "a.png")  # same name, other picture
    with pytest.raises(ConfigError, match="data.files: '[0-9a-f]+' there, '[0-9a-f]+' now"):
        embed(model, Embedding(data, out))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"is not empty \(notes.txt\)"):
        embed(model, Embedding(data, tmp_path / "full"))


def test_files_of_strangers_are_read_with_care(model: DualEncoderModel, tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    draw("ring", "red").save(pictures / "a.png")
    embed(model, Embedding(DataConfig(source=str(pictures)), out, format="npy"))
    (file,) = out.glob("*.npy")
    np.save(file, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"allow_pickle=False"):
        whole(out)
    np.save(file, np.zeros((2, 16), np.float32))
    with pytest.raises(DataError, match=r"\(2, 16\) for 1 ids of 16"):
        whole(out)
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"images-', '"../images-'))
    with pytest.raises(DataError, match="names a file elsewhere"):
        whole(out)
    (out / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="no finished embeddings"):
        whole(out)
