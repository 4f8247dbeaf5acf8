"""Weight files of other projects: arrays, or a `CheckpointError`, and nothing is run."""

import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.files import read_json, replacing
from clip_lite_jax.pretrained import hub, packages
from clip_lite_jax.pretrained.numpy_files import read_detectron2, read_npz
from clip_lite_jax.pretrained.torch_files import (
    DTYPES,
    LEGACY_MAGIC,
    is_torch_record,
    read_torch_stream,
    read_torch_zip,
)
from clip_lite_jax.pretrained.torch_writer import in_order

IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""What is looked for in a folder, in this order."""

SAFETENSORS = {
    DTYPES[name]: kind
    for name, kind in {
        **{"bool": "BOOL", "float16": "F16", "bfloat16": "BF16", "float32": "F32"},
        **{"float64": "F64", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64"},
        **{"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64"},
    }.items()
}
"""NumPy's types → those of safetensors."""

DAMAGED = (
    *(
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
    ),
    *(ValueError, SyntaxError, tokenize.TokenError, struct.error, zipfile.BadZipFile),
    *(zlib.error, SafetensorError),
)
"""What the readers of formats raise where a file is not what it should be."""


def resolve_path(source: str | Path) -> Path:
    """A local path as it is; of ``hf://`` and ``package:`` addresses, where their files are."""
    address = str(source)
    if address.startswith(hub.SCHEME):
        return hub.download(address)
    if address.startswith(packages.SCHEME):
        return packages.locate(address)
    return Path(source)


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file, or of a folder, by the names they have there.

    What a file is, its content decides: safetensors, alone or in shards with an index; torch's
    state dicts, in both its formats and inside checkpoints; TorchScript; NumPy's ``.npz``;
    Detectron2's ``.pkl``.  Arrays can be read-only.

    Args:
      path: a file, a folder with one of `IN_FOLDERS`, ``hf://owner/name[@revision]``, or
        ``package:NAME/path`` in an installed package.

    Raises:
      CheckpointError: there is none, it is damaged, or it asks for anything but arrays.
    """
    path = resolve_path(path)
    if path.is_dir():
        present = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not present:
            raise CheckpointError(f"{path} has none of {', '.join(IN_FOLDERS)}")
        path = present[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    return _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)


def write_safetensors(
    path: Path, weights: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one file; equal weights and metadata make equal bytes.

    The library's own writer orders the metadata at random.

    Raises:
      CheckpointError: an array has a type that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    # The widest first, as the library does it: every array is then aligned to its type.
    arrays = sorted(weights.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, array in arrays:
        if (kind := SAFETENSORS.get(array.dtype)) is None:
            raise CheckpointError(f"{path}: safetensors holds no {array.dtype}, as {name} is")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, array in arrays:
            file.write(in_order(array))


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Of an index, ``{"weight_map": {tensor: file}}``; the files lie beside it."""
    stated = read_json(index)
    places = stated.get("weight_map") if isinstance(stated, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard or shard == "..":
            raise CheckpointError(f"{index} names {shard[:200]!r}, which is not beside it")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names {shard[:200]!r}, which is not there")
        weights |= _read_file(index.parent / shard)
    if missing := sorted(places.keys() - weights.keys()):
        raise CheckpointError(f"{index} names {missing[0][:200]!r}, which no shard has")
    return {name: weights[name] for name in places}


def _read_file(file: Path) -> dict[str, np.ndarray]:
    """One file; everything that can go wrong with it becomes a `CheckpointError`."""
    try:
        with file.open("rb") as opened:
            head = opened.read(32)
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(file)
        if LEGACY_MAGIC in head:
            return read_torch_stream(file)
        if head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= file.stat().st_size:
            return load_file(file)
        if head.startswith(b"\x80"):
            return read_detectron2(file)
    except CheckpointError:
        raise
    except DAMAGED as error:
        raise CheckpointError(
            f"{file} is damaged, cut short or not what it looks like: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    raise CheckpointError(
        f"{file} begins with {head[:16]!r} and is no file of weights, or cut short: safetensors, "
        "torch's .pth and TorchScript, NumPy's .npz and Detectron2's .pkl are read"
    )


def _read_zip(file: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(map(is_torch_record, names)):
        return read_torch_zip(file)
    if names and all(name.endswith(".npy") for name in names):
        return read_npz(file)
    raise CheckpointError(f"{file} is a zip archive, but neither torch's nor NumPy's")
