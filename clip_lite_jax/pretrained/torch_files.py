"""State dicts that torch wrote, read without torch and without running what they name.

Three layouts: the zip archive of torch 1.6 and later, the stream of pickles before that, and
TorchScript archives, in which OpenAI distributes CLIP (only their data are read, never their code).
"""

import io
import mmap
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.pretrained.pickles import (
    BUILTINS,
    FOREIGN_CLASS,
    Constructor,
    Instance,
    read_pickle,
)
from clip_lite_jax.pretrained.zips import Zip

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
}
"""Torch's names of types → NumPy's."""

STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
"""Names of storage classes → types."""

LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How the stream of torch before 1.6 begins, after the protocol's number: a pickled integer."""

NESTED = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which training scripts keep weights."""

DATA = "/data.pkl"
"""What a zip archive of torch has under its own name."""

MOST_AXES = 64
MOST_ATTRIBUTES = 200_000
LONGEST_NAME = 1000


@dataclass(eq=False, frozen=True)
class Storage:
    """Where numbers lie: the key of their record, and their type."""

    key: str
    dtype: np.dtype


@dataclass(eq=False, frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def is_torch_record(name: str) -> bool:
    """Whether a zip archive with a record of this name is torch's."""
    return name.endswith(DATA) and name.count("/") == 1


def read_torch_zip(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a zip archive, a state dict's or TorchScript's; raises `CheckpointError`."""
    with Zip(file) as archive:
        # All names begin with the one that the file had when it was written.
        top = next(name.removesuffix(DATA) for name in archive.names if is_torch_record(name))
        stream = io.BytesIO(archive.read(f"{top}{DATA}"))
        tensors = _tensors(read_pickle(stream, file, _find, _storage), file)
        order = f"{top}/byteorder"
        order = archive.read(order).decode() if order in archive.names else "little"
        return _arrays(tensors, lambda key: archive.read(f"{top}/data/{key}"), order, file)


def read_torch_stream(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch before 1.6 wrote; raises `CheckpointError`."""
    widths: dict[str, int] = {}

    def storage(identity: Any) -> Storage:
        found = _storage(identity)
        widths[found.key] = found.dtype.itemsize
        return found

    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as stream,
    ):
        # Magic number, protocol, facts about the machine, the state dict, keys of its storages.
        _, _, machine, root, keys = (read_pickle(stream, file, _find, storage) for _ in range(5))
        records = {}
        for key in keys:
            (count,) = struct.unpack("<q", stream.read(8))
            start, size = stream.tell(), count * widths[key]
            if not 0 <= size <= len(stream) - start:
                raise CheckpointError(f"{file} is cut short: storage {key[:100]} has no end")
            records[key] = slice(start, start + size)
            stream.seek(start + size)
        order = "little" if machine["little_endian"] else "big"
        return _arrays(_tensors(root, file), lambda key: stream[records[key]], order, file)


def _tensors(root: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, checkpoint or module by name."""
    if isinstance(root, Instance):
        found = dict(_of_module(root))
    elif isinstance(root, dict):
        candidates = [root, *(root[key] for key in NESTED if isinstance(root.get(key), dict))]
        named = [
            {name: x for name, x in each.items() if isinstance(x, Tensor) and isinstance(name, str)}
            for each in candidates
        ]
        found = max(named, key=len)
    else:
        found = {}
    if not found:
        raise CheckpointError(
            f"{file} holds no state dict: tensors by name, alone or under one of "
            f"{', '.join(NESTED)}. Save one with torch: torch.save(model.state_dict(), path)"
        )
    return found


def _of_module(root: Instance) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a module's attributes and its submodules', as its state dict names them."""
    waiting = [("", root)]
    visits = 0
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module.state, dict):
            continue
        for name, value in module.state.items():
            visits += 1
            if visits > MOST_ATTRIBUTES or len(prefix) + len(name) > LONGEST_NAME:
                raise ValueError("modules that contain each other without end")
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Instance):
                waiting.append((f"{prefix}{name}.", value))


def _arrays(
    tensors: Mapping[str, Tensor], read: Callable[[str], bytes], order: str, file: Path
) -> dict[str, np.ndarray]:
    """Each tensor as a view of its storage, which is read once."""
    records: dict[tuple[str, int], bytes] = {}
    arrays = {}
    for name, tensor in tensors.items():
        parts = 2 if tensor.dtype.kind == "c" else 1
        unit = 1 if order == sys.byteorder else tensor.dtype.itemsize // parts  # to be swapped
        record = tensor.storage.key, unit
        if record not in records:
            data = read(tensor.storage.key)
            records[record] = (
                data if unit == 1 else np.frombuffer(data, f"u{unit}").byteswap().tobytes()
            )
        try:
            arrays[name] = _view(tensor, records[record])
        except (OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: tensor {name[:200]} is damaged: {error}") from error
    return arrays


def _view(tensor: Tensor, record: bytes) -> np.ndarray:
    """NumPy checks that the view stays within the record."""
    width = tensor.dtype.itemsize
    # A stride of zero would let a small file stand for an array of any size.
    if prod(tensor.shape) * width > len(record):
        raise ValueError(f"its shape {tensor.shape} does not fit {len(record)} bytes")
    strides = [stride * width for stride in tensor.strides]
    return np.ndarray(tensor.shape, tensor.dtype, record, tensor.offset * width, strides)


def _storage(identity: Any) -> Storage:
    """Of a persistent id: ``("storage", type, key, device, count)``, before 1.6 with a view."""
    kind, dtype, key, _, _, *view = identity
    known = isinstance(dtype, np.dtype) and isinstance(key, str)
    if kind != "storage" or not known or any(part is not None for part in view):
        raise ValueError("a persistent id that is no storage")
    return Storage(key, dtype)


def _rebuild_tensor(
    storage: Storage, offset: int, shape: Any, strides: Any, *_: Any, dtype: Any = None
) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor of something that is no storage")
    if len(shape) > MOST_AXES or len(shape) != len(strides):
        raise ValueError("a tensor whose shape and strides have no meaning")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor whose shape, strides or offset are no natural numbers")
    return Tensor(storage, offset, tuple(shape), tuple(strides), dtype or storage.dtype)


def _rebuild_typed(
    storage: Storage,
    offset: int,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    if not isinstance(dtype, np.dtype):
        raise ValueError("a tensor without a type")
    return _rebuild_tensor(storage, offset, shape, strides, dtype=dtype)


def _find(module: str, name: str) -> Any:
    """What stands for a global; raises `KeyError`."""
    if module == "__torch__" or module.startswith("__torch__."):
        return FOREIGN_CLASS
    return GLOBALS[f"{module}.{name}"]


_FIRST = Constructor(lambda value, *_: value)

GLOBALS: dict[str, Any] = {
    **BUILTINS,
    "torch._utils._rebuild_tensor": Constructor(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Constructor(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": Constructor(_rebuild_typed),
    "torch._utils._rebuild_parameter": _FIRST,
    "torch.Size": _FIRST,
    "torch.device": Constructor(lambda *parts: parts),
    "torch.storage.UntypedStorage": DTYPES["uint8"],
    # TorchScript's lists with the type of their items.
    "torch.jit._pickle.restore_type_tag": _FIRST,
    "torch.jit._pickle.build_intlist": _FIRST,
    "torch.jit._pickle.build_doublelist": _FIRST,
    "torch.jit._pickle.build_boollist": _FIRST,
    "torch.jit._pickle.build_tensorlist": _FIRST,
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch.{name}": DTYPES[kind] for name, kind in STORAGES.items()},
    **{f"torch.cuda.{name}": DTYPES[kind] for name, kind in STORAGES.items()},
}
"""All that torch's files may name, and what stands for it here."""
