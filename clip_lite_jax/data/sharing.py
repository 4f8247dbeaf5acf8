"""Large objects that worker processes map into memory instead of each having a copy."""

import mmap
import os
import pickle
import threading
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile, gettempdir
from typing import Any

from clip_lite_jax.errors import DataError

ALIGNMENT = 64

# Linux shows the open files of a process: one without a name goes with it, however it ends.
_OPEN_FILES = Path("/proc/self/fd")


class Shared:
    """Pickles as the place of a file that holds `value`; its arrays are mapped from there.

    The file is open to this user alone, and goes with this object (on Linux even where the process
    is killed).  For NumPy and Arrow, whose
    arrays leave their buffers out of a pickle (PEP 574).
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._file: Any = None
        self._reduced: tuple[Any, ...] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        with self._lock:  # processes may be started by several threads
            if self._reduced is None:
                self._reduced = self._written()
            return self._reduced

    def _written(self) -> tuple[Any, ...]:
        try:
            if _OPEN_FILES.exists():
                self._file = TemporaryFile()  # noqa: SIM115  as long as this object
                path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
            else:
                self._file = NamedTemporaryFile()  # noqa: SIM115
                path = self._file.name
            return _read, (path, *_write(self._file, self.value))
        except OSError as error:
            raise DataError(
                f"{gettempdir()} cannot hold a source's table for worker processes "
                f"({error.strerror}): let TMPDIR name a folder with more room, or work without "
                "processes (data.workers=0, --processes 1)"
            ) from error


Span = tuple[int, int]
"""First byte in the file, and the one after the last."""


def _write(file: Any, value: Any) -> tuple[Span, list[Span]]:
    """Where in the file the pickle lies, and where its buffers."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    spans = []
    for data in (memoryview(content), *(buffer.raw() for buffer in buffers)):
        file.write(bytes(-file.tell() % ALIGNMENT))
        start = file.tell()
        file.write(data)
        spans.append((start, file.tell()))
    file.flush()
    return spans[0], spans[1:]


def _read(path: str, content: Span, buffers: list[Span]) -> Any:
    with open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    parts = [mapped[start:stop] for start, stop in buffers]
    return pickle.loads(mapped[slice(*content)], buffers=parts)
