"""Files and folders by their paths or URLs: on this machine, or wherever fsspec reaches."""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from clip_lite_jax.files import write_atomic
from clip_lite_jax.remote import RemotePath

Result = TypeVar("Result")

THREADS = 16
"""Requests at a time where there are many."""

Place = Path | RemotePath


def is_remote(name: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def place(name: str) -> Place:
    """The file or folder of a path or URL; what was listed there before is forgotten.

    Raises:
      DataError: a protocol that is unknown, or whose package is not installed.
    """
    if not is_remote(name):
        return Path(name)
    found = RemotePath(name)
    found.forget_listings()
    return found


def as_place(path: str | os.PathLike[str]) -> Place:
    return path if isinstance(path, Path | RemotePath) else Path(path)


def matching(pattern: str) -> Sequence[Place]:
    """The files of a pattern with ``*``, ``?`` or ``[``, sorted."""
    if not is_remote(pattern):
        return sorted(map(Path, glob.glob(pattern, recursive=True)))
    return RemotePath(pattern).matching()


def version_of(path: Place) -> tuple[str, int, int | str]:
    """Which file, its size, and what else changes when it does."""
    if isinstance(path, RemotePath):
        return path.url, path.known.size or 0, path.known.tag
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def stamp_of(path: Place) -> str:
    """Another text when a file has changed: its size, and the time of change or what a bucket
    gives for it; ``missing`` where there is none."""
    try:
        if isinstance(path, RemotePath):
            return f"{path.known.size or 0} {path.known.tag}"
        status = path.stat()
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def each(function: Callable[[Any], Result], places: Sequence[Place]) -> Iterator[Result]:
    """``function(place)`` of all in their order, of remote ones many at a time.

    None of them runs any more when this ends, or is closed before.
    """
    if any(isinstance(path, RemotePath) for path in places):
        yield from at_once(function, places)
    else:
        yield from map(function, places)


def at_once(function: Callable[[Any], Result], items: Sequence[Any]) -> Iterator[Result]:
    """``function(item)`` of all in their order, many at a time; ends as `each` does."""
    waiting = deque(_pool().submit(function, item) for item in items)
    try:
        while waiting:
            yield waiting[0].result()
            waiting.popleft()
    finally:
        # What went on would write over what comes after: after an error that is tried again.
        wait([future for future in waiting if not future.cancel()])


@cache
def _pool() -> ThreadPoolExecutor:
    # One for all: file systems that are no coroutines have a connection in each thread.
    return ThreadPoolExecutor(THREADS)


@contextmanager
def writing(target: Place) -> Iterator[Path]:
    """A local file to write, which then lies at `target`: itself, or sent there whole."""
    if isinstance(target, Path):
        yield target
        return
    with TemporaryDirectory() as folder:
        file = Path(folder, target.name)
        yield file
        target.upload(file)


def write_text(target: Place, content: str) -> None:
    """Writes a small file, whole or not at all where the file system has it so: all buckets do."""
    if isinstance(target, Path):
        write_atomic(target, content)
    else:
        target.write_bytes(content.encode())
