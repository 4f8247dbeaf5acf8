"""State dicts in torch's zip format and pickles for Detectron2, written without torch.

Pickles are written instruction by instruction: Python's own writer needs the classes that it names,
and what it writes depends on which equal strings are one object.  Here equal weights make equal
bytes.
"""

import io
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.files import replacing
from clip_lite_jax.pretrained.torch_files import DTYPES, STORAGES

CLASSES = {DTYPES[name]: storage for storage, name in STORAGES.items()}
"""NumPy's types → torch's classes of storages."""

ALIGNMENT = 64
"""Of a storage within the file, as torch has it: it can then be mapped into memory."""

TOP = "archive"
EPOCH = (1980, 1, 1, 0, 0, 0)
LONGEST = 2**32
"""Bytes of one array that a pickle's plain instruction can hold."""


def write_torch(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that ``torch.load(path, weights_only=True)`` reads, with ``mmap`` too.

    Raises:
      CheckpointError: torch has no storage for an array's type.
    """
    for name, array in weights.items():
        if array.dtype not in CLASSES:
            raise CheckpointError(
                f"{path}: torch's state dicts hold no {array.dtype}, as {name} is"
            )
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _record(archive, "data.pkl", _state_dict(weights))
        _record(archive, "byteorder", sys.byteorder.encode())
        for number, array in enumerate(weights.values()):
            _record(archive, f"data/{number}", in_order(array))
        _record(archive, "version", b"3\n")


def write_detectron2(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a ``.pkl`` whose names Detectron2 matches to its own, as its conversion scripts do.

    Raises:
      CheckpointError: an array has a type that NumPy alone does not know, or 4 GiB.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(b"\x80\x03}(" + _text("model") + b"}(")
        for name, array in weights.items():
            if array.dtype.kind not in "biufc" or not array.nbytes < LONGEST:
                raise CheckpointError(
                    f"{path}: {name} is {array.nbytes} bytes of {array.dtype}, which Detectron2's "
                    "pickles do not hold: use float32"
                )
            _array(file, name, array)
        file.write(b"u" + _text("__author__") + _text("clip_lite_jax"))
        file.write(_text("matching_heuristics") + b"\x88u.")


def in_order(array: np.ndarray) -> memoryview:
    """An array's bytes in C order, copied only where they do not lie so."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def _record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds a record, stored and aligned."""
    info = zipfile.ZipInfo(f"{TOP}/{name}", EPOCH)
    # A local header has 30 bytes, the name and the extra fields: 20 bytes with sizes (zip64), and
    # as torch does it, one of zeros that pads, with 4 bytes of its own.
    start = archive.fp.tell() + 30 + len(info.filename) + 20 + 4  # type: ignore[union-attr]
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(data)


def _state_dict(weights: Mapping[str, np.ndarray]) -> bytes:
    """The pickle of an ``OrderedDict`` of tensors, protocol 2 as torch writes it."""
    out = io.BytesIO()
    out.write(b"\x80\x02" + EMPTY_ORDERED_DICT + b"(")
    for number, (name, array) in enumerate(weights.items()):
        # In elements, of an array in C order.
        strides = [
            int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)
        ]
        storage = b"(" + _text("storage") + _global("torch", CLASSES[array.dtype])
        storage += _text(str(number)) + _text("cpu") + _int(array.size) + b"tQ"
        out.write(_text(name) + _global("torch._utils", "_rebuild_tensor_v2"))
        out.write(b"(" + storage + _int(0) + _ints(array.shape) + _ints(strides))
        out.write(b"\x89" + EMPTY_ORDERED_DICT + b"tR")  # no gradient, no hooks
    out.write(b"u.")
    return out.getvalue()


def _array(file: BinaryIO, name: str, array: np.ndarray) -> None:
    """Name and array as NumPy pickles it, under the module's name that all its versions know."""
    data = in_order(array)
    file.write(_text(name) + _global("numpy.core.multiarray", "_reconstruct"))
    file.write(_global("numpy", "ndarray") + _ints((0,)) + b"C\x01b" + b"\x87R")
    file.write(b"(" + _int(1) + _ints(array.shape) + _global("numpy", "dtype"))
    file.write(_text(array.dtype.str[1:]) + b"\x89\x88\x87R(" + _int(3))
    file.write(_text(array.dtype.str[0]) + b"NNN" + _int(-1) * 2 + _int(0) + b"tb")
    file.write(b"\x89B" + struct.pack("<I", len(data)))  # in C order
    file.write(data)
    file.write(b"tb")


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(number: int) -> bytes:
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


def _ints(numbers: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


EMPTY_ORDERED_DICT = _global("collections", "OrderedDict") + b")R"
