"""NumPy's archives, and the pickles of arrays that Detectron2 reads."""

import io
import mmap
import re
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.pretrained.pickles import (
    BUILTINS,
    Buildable,
    Constructor,
    read_pickle,
)
from clip_lite_jax.pretrained.zips import Zip

NPZ_GROWTH = 100
"""How many times the size of a compressed archive its arrays may have."""

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive under their own names.

    Raises:
      CheckpointError: one is of Python objects or text, or they unpack to `NPZ_GROWTH` times the
        file.
    """
    with Zip(file, NPZ_GROWTH) as archive:
        return {
            name.removesuffix(".npy"): _npy(archive.read(name), f"{file}: {name[:100]}")
            for name in archive.names
        }


def _npy(data: bytes, where: str) -> np.ndarray:
    """A view of the bytes.  NumPy's own reader allocates what the header claims."""
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    if version not in HEADERS:
        raise CheckpointError(f"{where} has version {version} of NumPy's format: 1 and 2 are read")
    shape, fortran, dtype = HEADERS[version](stream)
    if dtype == "V2":  # NumPy does not know bfloat16, and writes it so
        dtype = np.dtype(ml_dtypes.bfloat16)
    elif dtype.kind not in "biufc":
        raise CheckpointError(f"{where} holds {dtype}: only arrays of numbers are read")
    return _array(data, dtype, shape, fortran, stream.tell())


def read_detectron2(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a pickled dict, or of the dict under its key ``model``.

    Raises:
      CheckpointError: the pickle names anything but dicts and arrays of numbers.
    """
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as stream,
    ):
        root = read_pickle(stream, file, lambda module, name: GLOBALS[f"{module}.{name}"])
    weights = root.get("model", root) if isinstance(root, dict) else {}
    pickled = weights.items() if isinstance(weights, dict) else ()
    arrays = {name: x.array for name, x in pickled if isinstance(x, _Array) and x.array is not None}
    if not arrays or not all(isinstance(name, str) for name in arrays):
        raise CheckpointError(
            f"{file} holds no arrays by name, alone or under 'model' as Detectron2 has them"
        )
    return arrays


def _array(
    data: bytes | bytearray, dtype: np.dtype, shape: Any, fortran: Any, offset: int = 0
) -> np.ndarray:
    """A view; raises `ValueError` where the bytes are not as many as the shape needs."""
    if len(shape) > 64 or prod(shape) * dtype.itemsize != len(data) - offset:
        raise ValueError("an array's shape does not fit its bytes")
    array = np.ndarray(shape, dtype, data, offset, order="F" if fortran else "C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


class _Dtype(Buildable):
    """Stands for ``numpy.dtype``; its state has the order of bytes."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"\?|b1|[iu][1248]|f[248]|c(8|16)", name):
            raise ValueError("an array whose type is not of numbers")
        self.dtype = np.dtype(name)

    def set_state(self, state: Any) -> None:
        _, order, *_ = state
        if order not in ("<", ">", "|", "="):
            raise ValueError("an array with an unknown order of bytes")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(Buildable):
    """Stands for ``numpy.ndarray``; its state has everything."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise ValueError("an array without a type")
        if isinstance(data, str):  # Python 2's bytes
            data = data.encode("latin-1")
        if not isinstance(data, (bytes, bytearray)):
            raise ValueError("an array of objects")
        self.array = _array(data, dtype.dtype, shape, fortran)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    """Protocol 5."""
    made = _Array()
    made.set_state((1, shape, dtype, order == "F", data))
    return made


def _scalar(dtype: Any, data: Any) -> None:
    """A number beside the weights, which nothing asks for."""
    _Array().set_state((1, (), dtype, False, data))


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 stores bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin-1")


GLOBALS: dict[str, Any] = {
    **BUILTINS,
    "_codecs.encode": Constructor(_encode),
    "numpy.dtype": Constructor(_Dtype),
    "numpy.ndarray": "ndarray",  # an argument of _reconstruct
    **{
        f"numpy.{core}.{name}": Constructor(make)
        for core in ("core", "_core")
        for name, make in (
            ("multiarray._reconstruct", lambda *_: _Array()),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
"""All that such pickles may name, and what stands for it here."""
