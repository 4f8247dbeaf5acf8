"""The record format: what goes in comes out, the same examples give the same bytes, and nothing
damaged or foreign passes."""

import concurrent.futures
import contextlib
import os
import pathlib
import pickle
import types

import msgpack
import numpy as np
import pytest

from clip_lite_jax.data.records import (
    Example,
    RecordSource,
    decode_record,
    encode_record,
    write_records,
)

EXAMPLE = Example(
    id="noto/1f600",
    group="1f600",
    captions=("grinning face", "visage tout sourire, 😀"),
    image=bytes(range(256)),
    attributes={"split": "train", "artist": "noto"},
)


def _examples(count: int) -> list[Example]:
    return [
        Example(f"id{i}", f"g{i // 2}", (f"caption {i}",) * (i % 3), b"\x00" * (i * 37 + 1), {})
        for i in range(count)
    ]


def _fields(**changes: object) -> bytes:
    fields = msgpack.unpackb(encode_record(EXAMPLE))
    return msgpack.packb({**fields, **changes})


def test_round_trip() -> None:
    assert decode_record(encode_record(EXAMPLE)) == EXAMPLE


def test_equal_examples_give_equal_bytes() -> None:
    turned = dict(reversed(EXAMPLE.attributes.items()))
    other = Example(
        EXAMPLE.id,
        EXAMPLE.group,
        EXAMPLE.captions,
        EXAMPLE.image,
        types.MappingProxyType(turned),
    )
    assert encode_record(other) == encode_record(EXAMPLE)


def test_every_truncation_is_refused() -> None:
    record = encode_record(EXAMPLE)
    for length in range(len(record)):
        with pytest.raises(ValueError, match="record"):
            decode_record(record[:length])


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="not a msgpack record"):
        decode_record(encode_record(EXAMPLE) + b"\x00")


def test_random_bytes_never_fail_otherwise() -> None:
    random = np.random.default_rng(0)
    record = encode_record(EXAMPLE)
    for _ in range(2000):
        damaged = bytearray(record)
        for position in random.integers(len(damaged), size=3):
            damaged[position] = random.integers(256)
        with contextlib.suppress(ValueError):
            assert isinstance(decode_record(bytes(damaged)), Example)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "not a msgpack record"),
        (b"\xc1", "not a msgpack record"),
        (b"\x91" * 100_000, "not a msgpack record"),  # nested lists
        (b"\xdd\xff\xff\xff\xff", "not a msgpack record"),  # announces 4 G items
        (b"\xc6\xff\xff\xff\xff", "not a msgpack record"),  # announces 4 GB
        (msgpack.packb(None), "found NoneType"),
        (msgpack.packb([1, 2]), "found list"),
        (msgpack.packb({"id": "a"}), r"found \['id'\]"),
        (_fields(extra=1), "extra"),
        (_fields(id=""), "'id'"),
        (_fields(id=7), "'id'"),
        (_fields(id=b"bytes"), "'id'"),
        (_fields(group=None), "'group'"),
        (_fields(captions="text"), "'captions'"),
        (_fields(captions=["text", 1]), "'captions'"),
        (_fields(captions={"text": 1}), "'captions'"),
        (_fields(image="text"), "'image'"),
        (_fields(image=b""), "'image'"),
        (_fields(attributes=[]), "'attributes'"),
        (_fields(attributes={"a": 1}), "'attributes'"),
        (_fields(attributes={b"a": "b"}), "'attributes'"),
        (_fields(image=msgpack.ExtType(5, b"x")), "extension type 5"),
        (_fields(image=msgpack.Timestamp(1)), "'image'"),
        (_fields(id=b"\xff").replace(b"\xc4\x01\xff", b"\xa1\xff"), "not a msgpack record"),
    ],
)
def test_foreign_records_are_refused(record: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_record(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "'id'"),
        ({"captions": "text"}, "tuple"),
        ({"captions": (1,)}, "'captions'"),
        ({"image": "text"}, "'image'"),
        ({"attributes": {"a": 1}}, "'attributes'"),
    ],
)
def test_bad_examples_are_not_written(
    change: dict[str, object], message: str, tmp_path: pathlib.Path
) -> None:
    bad = Example(**{**vars(EXAMPLE), **change})
    with pytest.raises(ValueError, match=message):
        write_records(tmp_path / "a", [EXAMPLE, bad])
    assert os.listdir(tmp_path) == []  # neither the file nor a temporary one


def test_a_failed_write_keeps_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a"
    write_records(path, _examples(3))
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_records(path, (_examples(1)[0] for i in range(3) if 1 // (1 - i)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_files_round_trip_and_are_deterministic(tmp_path: pathlib.Path) -> None:
    examples = _examples(2000)
    assert write_records(tmp_path / "a", examples) == 2000
    assert write_records(str(tmp_path / "b"), iter(examples)) == 2000
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    source = RecordSource(tmp_path / "a")
    assert len(source) == 2000
    assert list(source) == examples
    assert source[np.int64(1999)] == examples[-1]
    for index in (-1, 2000):
        with pytest.raises(IndexError, match=str(index)):
            source[index]


def test_an_empty_file_is_valid(tmp_path: pathlib.Path) -> None:
    assert write_records(tmp_path / "a", []) == 0
    assert list(RecordSource(tmp_path / "a")) == []


def test_source_is_lazy_picklable_and_shared_between_threads(tmp_path: pathlib.Path) -> None:
    source = RecordSource(tmp_path / "a")  # there is no file yet
    examples = _examples(200)
    write_records(tmp_path / "a", examples)
    assert source[7] == examples[7]
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).integers(200, size=2000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, order)) == [examples[i] for i in order]


def test_missing_and_damaged_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="none-here"):
        len(RecordSource(tmp_path / "none-here"))
    write_records(tmp_path / "a", _examples(200))
    whole = (tmp_path / "a").read_bytes()
    for content in (b"", b"not records", whole[:-1], whole[: len(whole) // 2]):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(ValueError, match="not a complete ArrayRecord file"):
            RecordSource(tmp_path / "b")[0]


def test_damage_inside_a_file_is_reported(tmp_path: pathlib.Path) -> None:
    write_records(tmp_path / "a", _examples(200))
    damaged = bytearray((tmp_path / "a").read_bytes())
    position = damaged.index(b"id100") - 20
    damaged[position] ^= 0xFF
    (tmp_path / "a").write_bytes(damaged)
    with pytest.raises(ValueError, match="record 100"):
        RecordSource(tmp_path / "a")[100]
