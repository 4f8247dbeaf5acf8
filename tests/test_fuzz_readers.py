"""Readers of files that anything may have happened to: a result, or an error that explains itself.

Each example is a good file with some of its bytes changed, cut out or repeated.
"""

import os
from collections.abc import Callable
from pathlib import Path

import good_files
import hostile
import pytest
from good_files import read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_lite_jax.data.shards import samples_of

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
    good_files.read_image(change(hostile.encoded(hostile.noise(), format)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    good_files.write_images(tmp_path)
    return tmp_path


@bounded
@given(change=changes())
def test_csv(folder: Path, change: Change) -> None:
    (folder / "pairs.csv").write_bytes(change(good_files.csv()))
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
    (folder / "pairs.jsonl").write_bytes(change(good_files.json_lines()))
    read(folder / "pairs.jsonl", split_column="split")


@bounded
@given(change=changes())
def test_coco(folder: Path, change: Change) -> None:
    (folder / "captions_train.json").write_bytes(change(good_files.coco()))
    read(folder / "captions_train.json", image_folder=str(folder))


@bounded
@given(change=changes(), which=st.sampled_from(("refs(unc).p", "instances.json")))
def test_refcoco(folder: Path, change: Change, which: str) -> None:
    for name, data in good_files.refcoco().items():
        (folder / name).write_bytes(change(data) if name == which else data)
    read(folder / "refs(unc).p", image_folder=str(folder))


@bounded
@given(change=changes())
def test_tar(folder: Path, change: Change) -> None:
    path = folder / "shard.tar"
    path.write_bytes(change(good_files.shard()))
    for sample in samples_of(path, ("caption",)):
        assert sample.reason or 0 <= sample.offset <= sample.offset + sample.size
    read(path)


@bounded
@given(change=changes())
def test_parquet(folder: Path, change: Change) -> None:
    (folder / "pairs.parquet").write_bytes(change(good_files.parquet()))
    read(folder / "pairs.parquet")


@bounded
@given(change=changes())
def test_records(folder: Path, change: Change) -> None:
    (folder / "pairs.arrayrecord").write_bytes(change(good_files.records()))
    read(folder / "pairs.arrayrecord")
