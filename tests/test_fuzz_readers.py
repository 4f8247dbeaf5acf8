"""Readers of files that anything may have happened to: a result, or an error that explains itself.

Each example is a good file with some of its bytes changed, cut out or repeated.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import decode
from clip_lite_jax.data.records import Example, write_records
from clip_lite_jax.data.shards import samples_of
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import BadImage, DataError

Change = Callable[[bytes], bytes]

# `make test-long` tries more of them, others each time.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "120"))

# Files are written over and over in one folder: an example depends on nothing that another left.
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """A few edits at places given as parts of the length."""
    edits = draw(
        st.lists(
            st.tuples(
                st.floats(0, 1),
                st.sampled_from(("flip", "set", "insert", "delete", "cut", "repeat")),
                st.binary(min_size=1, max_size=8),
                st.integers(1, 64),
            ),
            min_size=1,
            max_size=5,
        )
    )

    def change(data: bytes) -> bytes:
        for place, kind, new, count in edits:
            at = int(place * len(data))
            if kind == "flip" and at < len(data):
                data = data[:at] + bytes([data[at] ^ new[0]]) + data[at + 1 :]
            elif kind == "set":
                data = data[:at] + new + data[at + len(new) :]
            elif kind == "insert":
                data = data[:at] + new + data[at:]
            elif kind == "delete":
                data = data[:at] + data[at + count :]
            elif kind == "repeat":
                data = data[:at] + data[at : at + count] * 3 + data[at + count :]
            elif kind == "cut":
                data = data[:at]
        return data

    return change


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@bounded
@given(change=changes())
def test_images(format: str, change: Change) -> None:
    try:
        picture = decode(change(hostile.encoded(hostile.noise(), format)))
    except BadImage:
        return
    assert picture.mode == "RGB"
    picture.tobytes()


def read(source: Path, **fields: object) -> None:
    """Reads every example of every split, if there are any."""
    bad = BadExamples()
    try:
        found = build_sources(DataConfig(source=str(source), threads=0, **fields), bad)
    except DataError:
        return
    for split in found.values():
        for i in range(len(split)):
            try:
                example = split[i]
            except BadImage:
                continue
            assert isinstance(example.image, bytes)
            assert all(isinstance(caption, str) and caption for caption in example.captions)


@cache
def jpeg() -> bytes:
    return hostile.encoded(hostile.noise(), "JPEG")


NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(jpeg())
    return tmp_path


@bounded
@given(change=changes())
def test_csv(folder: Path, change: Change) -> None:
    text = "image,caption,split\n" + "".join(
        f'{name},"a picture, ""{name}"" é",{split}\n'
        for name, split in zip(NAMES, ("train", "val", "test", ""), strict=True)
    )
    (folder / "pairs.csv").write_bytes(change(text.encode()))
    read(folder / "pairs.csv", split_column="split")


@bounded
@given(data=st.binary(max_size=400))
def test_anything_as_a_table(folder: Path, data: bytes) -> None:
    for ending in (".csv", ".tsv", ".jsonl", ".token", ".json", ".tar"):
        (folder / f"any{ending}").write_bytes(data)
        read(folder / f"any{ending}")


@bounded
@given(change=changes())
def test_json_lines(folder: Path, change: Change) -> None:
    rows = [{"image": name, "caption": ["ein Bild", "ü"], "split": "train"} for name in NAMES]
    (folder / "pairs.jsonl").write_bytes(change("\n".join(map(json.dumps, rows)).encode()))
    read(folder / "pairs.jsonl", split_column="split")


@bounded
@given(change=changes())
def test_coco(folder: Path, change: Change) -> None:
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
        "annotations": [{"id": i, "image_id": i, "caption": "a picture"} for i in range(4)],
    }
    (folder / "captions_train.json").write_bytes(change(json.dumps(content).encode()))
    read(folder / "captions_train.json", image_folder=str(folder))


@cache
def shard() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in (*NAMES, "long" * 40 + ".jpg"):
            for member, content in ((name, jpeg()), (name.replace(".jpg", ".txt"), b"a picture")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                info.pax_headers = {"comment": "é"}
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@bounded
@given(change=changes())
def test_tar(folder: Path, change: Change) -> None:
    path = folder / "shard.tar"
    path.write_bytes(change(shard()))
    for sample in samples_of(path, ("caption",)):
        assert sample.reason or 0 <= sample.offset <= sample.offset + sample.size
    read(path)


@cache
def parquet() -> bytes:
    buffer = io.BytesIO()
    columns = {
        "image": [{"bytes": jpeg(), "path": name} for name in NAMES],
        "caption": [["a picture", "é"] for _ in NAMES],
    }
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


@bounded
@given(change=changes())
def test_parquet(folder: Path, change: Change) -> None:
    (folder / "pairs.parquet").write_bytes(change(parquet()))
    read(folder / "pairs.parquet")


@bounded
@given(change=changes())
def test_records(folder: Path, change: Change) -> None:
    path = folder / "good.records"
    if not path.exists():
        write_records(path, [Example(name, name, ("a", "b"), jpeg(), {}) for name in NAMES])
    (folder / "pairs.arrayrecord").write_bytes(change(path.read_bytes()))
    read(folder / "pairs.arrayrecord")
