"""Weight files for the tests of their readers."""

import pickle
import zipfile
from pathlib import Path

import numpy as np

SAMPLES = Path(__file__).parent / "data" / "torch_files"
COUNT = np.arange(24, dtype=np.float32).reshape(4, 6)

MANY = {
    "a.weight": COUNT,
    "turned": COUNT.T,
    "scalar": np.array(7),
    "empty": np.zeros((3, 0), np.float32),
    **{
        kind: COUNT[1].astype(kind)
        for kind in ("bool", "float16", "float64", "int8", "uint8", "int16", "int32", "bfloat16")
    },
}
"""Arrays of many types and layouts."""

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
"""How a stream of torch before 1.6 begins."""


def same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert got.keys() == wanted.keys()
    for name, array in got.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert array.tobytes() == wanted[name].tobytes(), name


def torch_zip(file: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in (records or {}).items():
            archive.writestr(f"x/data/{name}", data)
    return file


def torch_stream(file: Path, pickled: bytes) -> Path:
    parts = [pickle.dumps(part, protocol=2) for part in (MAGIC, 1001, SYSTEM)]
    file.write_bytes(b"".join(parts) + pickled + pickle.dumps([], protocol=2))
    return file


def plain(file: Path, pickled: bytes) -> Path:
    file.write_bytes(pickled)
    return file


def rewritten(source: Path, folder: Path, records: dict[str, bytes], method: int = 0) -> Path:
    """A zip archive with some records changed, or compressed."""
    file = folder / "rewritten"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, records.get(name, old.read(name)))
    return file
