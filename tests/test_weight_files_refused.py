"""Weight files that are damaged or mean harm: an error that names the file, and nothing runs."""

import builtins
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weight_files import COUNT, MANY, SAMPLES, plain, rewritten, same, torch_stream, torch_zip

from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.pretrained.files import read_weights, write_safetensors
from clip_lite_jax.pretrained.torch_writer import write_detectron2


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def dangerous(canary: Path) -> dict[str, bytes]:
    """Pickles that leave a file, were they loaded as Python does."""
    touch = f"open({str(canary)!r}, 'w')"
    calls = {
        "posix.system": Call(os.system, f"touch {canary}"),
        "builtins.eval": Call(builtins.eval, touch),
        "builtins.exec": Call(builtins.exec, touch),
        "io.open": Call(io.open, str(canary), "w"),
        "builtins.getattr": Call(builtins.getattr, "", "join"),
    }
    pickles = {}
    for name, call in calls.items():
        for protocol in range(6):
            pickles[f"{name} {protocol}"] = pickle.dumps({"state_dict": {"w": call}}, protocol)
    text = f"X{struct.pack('<I', len(touch)).decode('latin-1')}{touch}".encode("latin-1")
    for name in ("torch.serialization load", "torch.hub load", "torch._utils _import_dotted_name"):
        pickles[name] = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + text + b"\x85R."
    pickles["inst"] = b"(" + text + b"ibuiltins\neval\n."
    pickles["obj"] = b"\x80\x02(cbuiltins\neval\n" + text + b"o."
    pickles["a text is called"] = b"\x80\x02" + text + text + b"\x85R."
    pickles["a factory is called"] = b"\x80\x02cbuiltins\ndict\n)R."
    pickles["a type is called"] = b"\x80\x02ctorch\nFloatStorage\n" + text + b"\x85R."
    pickles["a dict's state"] = b"\x80\x02}}X\x07\x00\x00\x00__dict__cbuiltins\neval\nsb."
    pickles["a list's state"] = b"\x80\x02]}b."
    pickles["a class's state"] = b"\x80\x02c__torch__\nA\n" + text + b"\x81."
    pickles["dunder"] = b"\x80\x02c__torch__.a\n__init__.__globals__\n)R."
    pickles["extension"] = b"\x80\x02\x82\x01)R."
    pickles["dict of a call"] = (
        b"\x80\x02ccollections\nOrderedDict\nccollections\nOrderedDict\n\x85R."
    )
    return pickles


@pytest.mark.parametrize("put", [torch_zip, torch_stream, plain])
def test_nothing_runs(put: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, pickled in dangerous(canary).items():
        with pytest.raises(CheckpointError, match="weights.pth") as caught:
            read_weights(put(tmp_path / "weights.pth", pickled))
        module, _, asked = name.split()[0].rpartition(".")
        if module and pickled.startswith(b"\x80"):
            assert asked in str(caught.value), name
            assert "nothing was run" in str(caught.value), name
    assert not canary.exists()


def test_a_pickle_that_would_run_does_with_pickle(tmp_path: Path) -> None:
    """The canary works."""
    canary = tmp_path / "canary"
    pickle.loads(dangerous(canary)["posix.system 2"])
    assert canary.exists()


def test_a_whole_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"__main__.Scaled.*model.state_dict\(\)"):
        read_weights(SAMPLES / "whole_model.pth")


def tensor(shape: str, strides: str, offset: str = "K\x00", key: str = "0") -> bytes:
    """A state dict of one tensor; the arguments are pickle instructions."""
    text = f"U{chr(len(key))}{key}"
    body = f"U\x01wctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n{text}"
    body += f"U\x03cpuK\x06tQ{offset}{shape}{strides}\x89NtRs."
    return b"\x80\x02}" + body.encode("latin-1")


def number(value: int) -> str:
    return "J" + struct.pack("<i", value).decode("latin-1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("K\x07\x85", "K\x01\x85"),
        ("K\x06\x85", "K\x01\x85", "K\x01"),
        ("K\x02\x85", "K\x06\x85"),
        ("K\x02\x85", number(-1) + "\x85", "K\x05"),
        ("K\x02\x85", "K\x01\x85", number(-1)),
        (number(-2) + "\x85", "K\x01\x85"),
        (number(2**31 - 1) + "\x85", "K\x00\x85"),
        ("K\x02K\x03\x86", "K\x01\x85"),
        ("G?\xf0\x00\x00\x00\x00\x00\x00\x85", "K\x01\x85"),
        ("U\x05abcde", "K\x01\x85"),
        ("K\x05", "K\x01\x85"),
        ("(" + "K\x01" * 65 + "t", "(" + "K\x01" * 65 + "t"),
        ("(" + "\x8a\x10" + "\xff" * 15 + "\x7f" + "K\x00t", "K\x01K\x01\x86"),
        ("K\x06\x85", "K\x01\x85", "K\x00", "../0"),
        ("K\x06\x85", "K\x01\x85", "K\x00", "7"),
    ],
    ids=repr,
)
def test_tensors_stay_within_their_storage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    data = {"0": COUNT[0].tobytes()}
    good = torch_zip(tmp_path / "good", tensor("K\x02K\x03\x86", "K\x03K\x01\x86"), data)
    same(read_weights(good), {"w": COUNT[0].reshape(2, 3)})
    with pytest.raises(CheckpointError, match="bad is damaged|bad: tensor w is damaged"):
        read_weights(torch_zip(tmp_path / "bad", tensor(*arguments), data))


def test_pickles_of_nothing_useful(tmp_path: Path) -> None:
    for value in ([1, 2], "text", {}, {"epoch": 3}, {"state_dict": {"a": 1}}, {"model": [3]}):
        for put in (torch_zip, torch_stream, plain):
            with pytest.raises(CheckpointError, match="holds no"):
                read_weights(put(tmp_path / "weights", pickle.dumps(value, protocol=2)))


PAIRS = b"".join(b"J" + struct.pack("<i", n) + b"N\x86" for n in range(20_000))
LONG = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000

BOMBS = {
    "deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "deep call": b"\x80\x02)" + b"\x85" * 100_000 + b")R.",
    "laughs": b"\x80\x02)" + b"q\x00h\x00\x86" * 100 + b"q\x00}h\x00Ns.",
    "memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "integer": b"\x80\x02\x8b" + struct.pack("<I", 10_000) + b"\x7f" * 10_000 + b".",
    "digits": b"\x80\x02L" + b"9" * 10_000 + b"L\n.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.",
    "no end": b"\x80\x02}",
    "no mark": b"\x80\x02}u.",
    "only a mark": b"\x80\x02(.",
    "nothing": b"\x80\x02.",
    "get": b"\x80\x02h\x05.",
    "put": b"\x80\x02q\x05.",
    "odd items": b"\x80\x02}(Nu.",
    "many dicts": b"\x80\x02]("
    + PAIRS
    + b"eq\x00"
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 2000,
    "many bytes": b"\x80\x02" + LONG + b"q\x00" + b"c_codecs\nencode\nh\x00U\x06latin1\x86R" * 2000,
    "long names": b"\x80\x04" + LONG + b"q\x00" + b"h\x00\x93h\x00" * 2000,
    "many arguments": b"\x80\x02(" + b"N" * 100_000 + b"tq\x00" + b"ctorch\nSize\nh\x00R" * 1000,
    "keys of one hash": b"\x80\x02}"
    + b"".join(
        b"\x8a\x10" + (n * (2**61 - 1)).to_bytes(16, "little") + b"Ns" for n in range(1, 50_000)
    )
    + b".",
}


@pytest.fixture
def bounded() -> Iterator[None]:
    """The test's peak of memory is far below what its files claim."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str, tmp_path: Path) -> None:
    for put in (torch_zip, plain):
        with pytest.raises(CheckpointError, match="weights"):
            read_weights(put(tmp_path / "weights", BOMBS[bomb]))


def test_modules_that_contain_themselves(tmp_path: Path) -> None:
    pickled = b"\x80\x02c__torch__\nA\n)\x81q\x00}U\x01ah\x00sb."
    with pytest.raises(CheckpointError, match="without end"):
        read_weights(torch_zip(tmp_path / "weights", pickled))


def test_too_many_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_lite_jax.pretrained.pickles.MOST_STEPS", 20)
    with pytest.raises(CheckpointError, match="more than 20 pickle instructions"):
        read_weights(SAMPLES / "zip.pth")


@pytest.mark.usefixtures("bounded")
def test_compressed_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="data.pkl is compressed"):
        read_weights(rewritten(SAMPLES / "zip.pth", tmp_path, {}, zipfile.ZIP_DEFLATED))
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros(30_000_000, np.uint8))
    with pytest.raises(CheckpointError, match="more than 100 times its size"):
        read_weights(tmp_path / "bomb.npz")
    # It says that it is small.
    lying = (tmp_path / "bomb.npz").read_bytes()
    size = struct.pack("<I", 30_000_128)
    assert size in lying
    (tmp_path / "bomb.npz").write_bytes(lying.replace(size, struct.pack("<I", 1000)))
    with pytest.raises(CheckpointError, match="bomb.npz"):
        read_weights(tmp_path / "bomb.npz")
    np.savez(tmp_path / "fine.npz", w=COUNT)
    with pytest.raises(CheckpointError, match="compressed"):
        read_weights(rewritten(tmp_path / "fine.npz", tmp_path, {}, zipfile.ZIP_LZMA))


def test_overlapping_records_count_each_time(tmp_path: Path) -> None:
    """A thousand entries may not all stand for the same bytes."""
    file = torch_zip(tmp_path / "weights", tensor("K\x06\x85", "K\x01\x85"), {"0": bytes(24)})
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo("x/data/0")
    size = struct.pack("<II", entry.file_size, entry.compress_size)
    file.write_bytes(data.replace(size, struct.pack("<II", 2**31, 2**31)))
    with pytest.raises(CheckpointError, match="more than 1 times its size"):
        read_weights(file)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"shape": (2**40,), "descr": "<f4", "fortran_order": False}, "does not fit"),
        ({"shape": (-4, -6), "descr": "<f4", "fortran_order": False}, "damaged"),
        ({"shape": (24,), "descr": "|O", "fortran_order": False}, "object"),
        ({"shape": (12,), "descr": "<U2", "fortran_order": False}, "only arrays of numbers"),
        ({"shape": (24,)}, "damaged"),
        ("(" * 5000, "damaged"),
        ("__import__('os')", "damaged"),
    ],
)
def test_npz_headers(header: Any, message: str, tmp_path: Path) -> None:
    text = repr(header) if isinstance(header, dict) else header
    text = f"{text}\n".encode()
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + COUNT.tobytes()
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("w.npy", array)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "weights.npz")


def test_npz_of_objects(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    array = np.array([Call(os.system, f"touch {canary}")], dtype=object)
    np.savez(tmp_path / "weights.npz", w=array)
    with pytest.raises(CheckpointError, match="holds object"):
        read_weights(tmp_path / "weights.npz")
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"w": np.array([{}], object)}, protocol=2))
    with pytest.raises(CheckpointError, match="not of numbers"):
        read_weights(tmp_path / "weights.pkl")
    assert not canary.exists()


def test_zips_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="neither torch's nor NumPy's"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs", bytes(100)])
def test_files_of_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no file of weights"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}, "b": 3},
        {"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [24, 0]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [2**40, 2**40 + 24]}},
        {"a": {"dtype": "X9", "shape": [6], "data_offsets": [0, 24]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        },
    ],
)
def test_safetensors_headers(header: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    for length in (len(text), len(text) - 5, len(text) + 10, 2**20, 2**60):
        file = tmp_path / "weights.safetensors"
        file.write_bytes(struct.pack("<Q", length) + text + bytes(24))
        with pytest.raises(CheckpointError, match="weights.safetensors"):
            read_weights(file)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    write_safetensors(folder / "a.safetensors", MANY, {"format": "pt"})
    numbers = {name: array for name, array in MANY.items() if name != "bfloat16"}
    write_detectron2(folder / "a.pkl", numbers)
    np.savez_compressed(folder / "a.npz", **numbers)
    np.savez(folder / "b.npz", **numbers)
    ours = {file.name: file.read_bytes() for file in folder.iterdir()}
    names = ("zip.pth", "stream.pth", "script.pt", "checkpoint.pth", "no_crc.pth")
    return ours | {name: (SAMPLES / name).read_bytes() for name in names}


def survives(file: Path, content: bytes) -> bool:
    """Whether arrays are read; the only error is ours, and it names the file."""
    file.write_bytes(content)
    failure = ""
    try:
        weights = read_weights(file)
    except CheckpointError as error:
        failure = str(error)
    if failure:
        assert str(file) in failure
        return False
    for array in weights.values():
        assert isinstance(array, np.ndarray)
        array.tobytes()
    return True


FORMATS = ("a.safetensors", "a.pkl", "a.npz", "b.npz", "zip.pth", "stream.pth", "script.pt")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files(name: str, good_files: dict[str, bytes], tmp_path: Path) -> None:
    good = good_files[name]
    assert survives(tmp_path / name, good)
    for end in np.linspace(0, len(good) - 1, 200, dtype=int):
        assert not survives(tmp_path / name, good[:end]), end


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", [*FORMATS, "checkpoint.pth", "no_crc.pth"])
def test_flipped_bytes(name: str, good_files: dict[str, bytes], tmp_path: Path) -> None:
    """One to four bytes change; checksums, where a format has them, do not save the reader."""
    random = np.random.default_rng(0)
    good = good_files[name]
    for _ in range(500):
        bad = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 5)):
            bad[place] = random.integers(0, 256)
        survives(tmp_path / name, bytes(bad))


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", ["zip.pth", "script.pt", "checkpoint.pth"])
def test_flipped_bytes_of_pickles(name: str, tmp_path: Path) -> None:
    """Behind checksums that fit."""
    random = np.random.default_rng(1)
    with zipfile.ZipFile(SAMPLES / name) as archive:
        record = next(record for record in archive.namelist() if record.endswith("/data.pkl"))
        good = archive.read(record)
    for _ in range(500):
        bad = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 5)):
            bad[place] = random.integers(0, 256)
        content = rewritten(SAMPLES / name, tmp_path, {record: bytes(bad)}).read_bytes()
        survives(tmp_path / name, content)
