"""What files a checkpoint has: written after all of them, and looked at before any is read.

Orbax restores a checkpoint of which a byte has changed without a word.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clip_lite_jax.files import write_atomic

MANIFEST = "manifest.json"
THREADS = 4  # hashing leaves Python's lock alone


def seal(folder: Path, numbers: Mapping[str, float] | None = None) -> None:
    """Writes the manifest of a finished folder: size and SHA-256 of every file below it.

    `numbers` tell how good it is, see `numbers_of`.
    """
    seal_with(folder, content_of(listed(folder), numbers or {}))


def seal_with(folder: Path, content: bytes) -> None:
    """Writes a manifest of which every file below `folder` is known to be as it says."""
    write_atomic(folder / MANIFEST, content)
    _SOUND.add(_state_of(folder))


def content_of(files: Mapping[str, Any], numbers: Mapping[str, float]) -> bytes:
    """What a manifest holds."""
    return json.dumps({"files": dict(files), "numbers": dict(numbers)}, indent=1).encode()


def listed(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file below a folder, by its path there."""
    return {name: size_and_hash(folder / name) for name in _names(folder)}


def numbers_of(folder: Path) -> dict[str, float]:
    """The numbers that a folder was sealed with; none where there is nothing to be read."""
    try:
        return dict(json.loads((folder / MANIFEST).read_bytes())["numbers"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def problem_of(folder: Path) -> str:
    """What is wrong with a folder that was sealed; nothing if it is as it was.

    What this process has written or looked at, and nobody has touched since, is not read again.
    """
    if _state_of(folder) in _SOUND:
        return ""
    problem = _problem_of(folder)
    if not problem:
        _SOUND.add(_state_of(folder))
    return problem


_SOUND: set[tuple[object, ...]] = set()


def _state_of(folder: Path) -> tuple[object, ...]:
    """What changes when a file does, as far as its file system says so."""
    states = ((name, (folder / name).stat()) for name in [*_names(folder), MANIFEST])
    try:
        return folder, *((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in states)
    except OSError:
        return ()


def _problem_of(folder: Path) -> str:
    try:
        known: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())["files"]
    except FileNotFoundError:
        return f"it was never finished: there is no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    there = _names(folder)
    for name in sorted(known.keys() ^ set(there)):
        return f"{name} is missing" if name in known else f"{name} does not belong to it"
    for name in there:  # sizes first: they cost nothing
        if (folder / name).stat().st_size != known[name][0]:
            return f"{name} has {(folder / name).stat().st_size:,} bytes, not {known[name][0]:,}"
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            found = list(pool.map(lambda name: size_and_hash(folder / name), there))
        except OSError as error:
            return str(error)
    changed = [name for name, value in zip(there, found, strict=True) if value != known[name]]
    return f"the content of {changed[0]} has changed" if changed else ""


def size_and_hash(path: Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [os.fstat(file.fileno()).st_size, digest]


def _names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return sorted(name for name in names if name != MANIFEST)
