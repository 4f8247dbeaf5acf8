"""What `index` and `embed` take for changed, for bad, and for none of their business."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from fsspec.implementations.memory import MemoryFileSystem

import clip_lite_jax
from clip_lite_jax.apps.embed import Embedding, embed
from clip_lite_jax.apps.embed_files import read_shards
from clip_lite_jax.apps.index import Index
from clip_lite_jax.apps.index_build import build_index
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.labelled import ArrayImages
from clip_lite_jax.data.pairs import Pairs, inside
from clip_lite_jax.data.records import Example, write_records
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import BadImage, ConfigError, Unreadable
from clip_lite_jax.inference import DualEncoderModel


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return clip_lite_jax.load(finished_run, batch_size=16)


def png(shape: str, colour: str, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    draw(shape, colour, size).save(buffer, "PNG")
    return buffer.getvalue()


def as_parquet(path: Path, pictures: list[bytes]) -> None:
    captions = [f"picture {number}" for number in range(len(pictures))]
    pq.write_table(pa.table({"image": pictures, "caption": captions}), path)


def as_tar(path: Path, pictures: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, picture in enumerate(pictures):
            for ending, data in (("png", picture), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def as_records(path: Path, pictures: list[bytes]) -> None:
    examples = [Example(str(n), str(n), ("a picture",), x, {}) for n, x in enumerate(pictures)]
    write_records(path, examples)


CONTAINERS = {".parquet": as_parquet, ".tar": as_tar, ".arrayrecord": as_records}


@pytest.mark.parametrize("ending", CONTAINERS)
def test_pictures_replaced_within_a_file_are_encoded_again(
    model: DualEncoderModel, tmp_path: Path, ending: str
) -> None:
    write: Callable[[Path, list[bytes]], None] = CONTAINERS[ending]
    file, index = tmp_path / f"pictures{ending}", tmp_path / "index"
    write(file, [png("ring", "red"), png("bar", "blue")])
    data = DataConfig(source=str(file))
    assert build_index(model, data, index).encoded == 2
    assert build_index(model, data, index).encoded == 0
    embed(model, Embedding(data, tmp_path / "rows"))
    write(file, [png("cross", "black"), png("ring", "pink")])  # under the same ids
    os.utime(file, ns=(0, 0))
    built = build_index(model, data, index)
    assert (built.encoded, built.removed) == (2, 2)
    build_index(model, data, tmp_path / "fresh")
    rows, expected = (Index.open(x).embedding(0) for x in (index, tmp_path / "fresh"))
    np.testing.assert_array_equal(rows, expected)
    with pytest.raises(ConfigError, match="data.files: "):
        embed(model, Embedding(data, tmp_path / "rows"))


def test_a_bucket_says_what_has_changed(
    buckets: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stamps() -> dict[str, str]:
        data = DataConfig(source="memory://bucket/pictures", format="pictures")
        (source,) = build_sources(data, BadExamples(), training=False).values()
        assert isinstance(source, Pairs)
        return {source.metadata(n).id: source.stamp(n) for n in range(len(source))}

    for name in ("a.png", "b.png", "below/c.png"):
        buckets.pipe(f"/bucket/pictures/{name}", png("ring", "red"))
    before = stamps()
    assert set(before) == {"a.png", "b.png", "below/c.png"}
    assert all(before.values())
    buckets.pipe("/bucket/pictures/b.png", png("ring", "red", size=40))
    buckets.pipe("/bucket/pictures/below/c.png", png("ring", "red", size=40))
    now = stamps()
    assert [name for name in now if now[name] != before[name]] == ["b.png", "below/c.png"]
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[1] = 3
    arrays = ArrayImages(pixels, np.array([1, 0, 1]))
    assert arrays.stamp(0) == arrays.stamp(2) != arrays.stamp(1)


def test_what_could_not_be_read_is_tried_again(
    model: DualEncoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for colour in ("red", "blue"):
        draw("ring", colour).save(pictures / f"{colour}.png")
    (pictures / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    data, read, reads = DataConfig(source=str(pictures)), Path.read_bytes, []
    failing = True

    def failing_disk(path: Path) -> bytes:
        if path.parent == pictures:
            reads.append(path.name)
        if failing and path.name == "red.png":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing_disk)
    built = build_index(model, data, tmp_path / "index")
    manifest = embed(model, Embedding(data, tmp_path / "rows"))
    assert (built.rows, manifest["count"]) == ({"images": 1}, 1)
    assert dict(built.skipped)["red.png"] == "cannot be read: Input/output error"
    failing = False
    reads.clear()
    built = build_index(model, data, tmp_path / "index")
    assert (built.rows, built.encoded) == ({"images": 2}, 1)
    assert reads == ["red.png"]  # not what is broken for good
    manifest = embed(model, Embedding(data, tmp_path / "rows"))
    assert (manifest["count"], manifest["skipped"]) == (2, 1)
    (shard,) = read_shards(tmp_path / "rows")
    assert sorted(shard.ids) == ["blue.png", "red.png"]
    reads.clear()
    embed(model, Embedding(data, tmp_path / "rows"))
    build_index(model, data, tmp_path / "index")
    assert reads == []


def test_only_names_that_no_file_can_have_are_bad_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadImage, match="not a path") as caught:
        inside(tmp_path, "x" * 10_000)
    assert not isinstance(caught.value, Unreadable)

    def away(path: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "is_file", away)
    with pytest.raises(Unreadable, match="cannot be read: Stale file handle"):
        inside(tmp_path, "a.png")


def test_a_shard_of_pictures_alone_has_no_texts(model: DualEncoderModel, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw("ring", "red").save(pictures / "a.png")
    data = DataConfig(source=str(pictures), format="pictures")
    manifest = embed(model, Embedding(data, tmp_path / "rows", what="both"))
    assert manifest["count"] == 1
    assert manifest["splits"]["pictures"]["texts"] == {"rows": 0, "files": []}


def test_folders_of_others_stay_as_they_are(model: DualEncoderModel, tmp_path: Path) -> None:
    draw("ring", "red").save(tmp_path / "a.png")
    data, other = DataConfig(source=str(tmp_path), format="pictures"), tmp_path / "other"
    other.mkdir()
    (other / "skipped.jsonl").write_text('{"id": "of a run"}\n')
    (other / "notes.txt").write_text("mine")
    for make in (
        lambda: embed(model, Embedding(data, other)),
        lambda: build_index(model, data, other),
    ):
        with pytest.raises(ConfigError, match="is not empty"):
            make()
        assert {path.name: path.read_text() for path in other.iterdir()} == {
            "skipped.jsonl": '{"id": "of a run"}\n',
            "notes.txt": "mine",
        }


def test_an_index_knows_its_model_from_everywhere(
    model: DualEncoderModel, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    draw("ring", "red").save(tmp_path / "pictures" / "a.png")
    data, url = DataConfig(source=str(tmp_path / "pictures")), "gs://bucket/run"
    with monkeypatch.context() as patch:
        patch.chdir(finished_run.parent)
        build_index(model, data, tmp_path / "index", path=finished_run.name)
    assert Index.open(tmp_path / "index").model.path == str(finished_run)
    build_index(model, data, tmp_path / "other", path=url)
    assert Index.open(tmp_path / "other").model.path == url
    other = clip_lite_jax.load(finished_run, batch_size=16)
    critic = other.params["critic"]
    other.params = {**other.params, "critic": {**critic, "score_bias": critic["score_bias"] + 1}}
    message = f"delete {tmp_path / 'index'} and run clip-lite index again"
    with pytest.raises(ConfigError, match=message):
        build_index(other, data, tmp_path / "index")


def test_names_that_are_no_utf8_are_told_of(model: DualEncoderModel, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw("ring", "red").save(pictures / "a.png")
    try:
        Path(os.fsdecode(os.fsencode(pictures) + b"/caf\xe9.png")).write_bytes(png("bar", "blue"))
    except OSError:
        pytest.skip("a file system without such names")
    built = build_index(model, DataConfig(source=str(pictures)), tmp_path / "index")
    assert built.skipped == [("caf\\udce9.png", "its name is not UTF-8: rename it")]
    (line,) = (tmp_path / "index" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "caf\\udce9.png"
