"""The small files of a run: written whole or not at all, read without the line a kill cut short."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lite_jax.errors import CheckpointError

if TYPE_CHECKING:
    from clip_lite_jax.places import Place

# What lies in the folder of a run: here for those who look at it without jax.
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
CHECKPOINTS = "checkpoints"
RESULTS_FILE = "results.json"
STATUS_FILE = "status.json"


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
