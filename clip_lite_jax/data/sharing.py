"""Large objects that worker processes map into memory instead of each having a copy."""

import mmap
import pickle
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

ALIGNMENT = 64


class Shared:
    """Pickles as the name of a file that holds `value`; its arrays are mapped from there.

    The file lies in a folder that no other user may enter, and goes with this object.  For NumPy
    and Arrow, whose arrays leave their buffers out of a pickle (PEP 574).
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._reduced: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reduced is None:
            folder = tempfile.mkdtemp(prefix="clip_lite_jax-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder, "shared")
            self._reduced = _read, (path, *_write(path, self.value))
        return self._reduced


Place = tuple[int, int]
"""First byte in the file, and the one after the last."""


def _write(path: Path, value: Any) -> tuple[Place, list[Place]]:
    """Where in the file the pickle lies, and where its buffers."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    places = []
    with path.open("wb") as file:
        for data in (memoryview(content), *(buffer.raw() for buffer in buffers)):
            file.write(bytes(-file.tell() % ALIGNMENT))
            start = file.tell()
            file.write(data)
            places.append((start, file.tell()))
    return places[0], places[1:]


def _read(path: Path, content: Place, buffers: list[Place]) -> Any:
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    parts = [mapped[start:stop] for start, stop in buffers]
    return pickle.loads(mapped[slice(*content)], buffers=parts)
