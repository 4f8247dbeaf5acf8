"""The small files of a run: written whole or not at all, read without the line a kill cut short."""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lite_jax.errors import CheckpointError

if TYPE_CHECKING:
    from clip_lite_jax.places import Place

log = logging.getLogger(__name__)

# What lies in the folder of a run: here for those who look at it without jax.
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
CHECKPOINTS = "checkpoints"
RESULTS_FILE = "results.json"
STATUS_FILE = "status.json"
REPORT_FILE = "report.html"


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file, none where there is no file; one cut short is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def read_json(path: "Place") -> Any:
    """The content of a JSON file of strangers; raises `CheckpointError` where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes the whole file under another name and renames it; an equal file is left alone."""
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


class Appended:
    """A file that grows at its end; what a full disk does not take waits, and comes first later.

    An error is told of once, not raised: what is written here must not end a run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Without a buffer of Python's, which would not say how much of it has been written.
        self._file = path.open("ab", buffering=0)
        self._rest = b""
        self._failed = False

    def write(self, text: str) -> None:
        self._rest += text.encode()
        try:
            while self._rest:
                self._rest = self._rest[self._file.write(self._rest) :]
        except OSError as error:
            if not self._failed:
                log.error("%s: %s; what belongs there waits in memory", self._path, error)
            self._failed = True
        else:
            if self._failed:
                log.warning("%s is written again, and nothing is missing", self._path)
            self._failed = False

    def close(self) -> None:
        self.write("")
        if self._rest:
            log.error("%s: its last %d bytes could not be written", self._path, len(self._rest))
        self._file.close()


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$CLIP_LITE_CACHE``, or as the XDG standard says."""
    if folder := os.environ.get("CLIP_LITE_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "clip_lite_jax"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write under; that file takes the place of `path` if no error is raised."""
    # Threads, and machines that share the folder, may write the same file at once.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
