"""Tables made from files once and kept: what random access needs to know beforehand."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from clip_lite_jax.files import cache_folder, replacing
from clip_lite_jax.places import Place, version_of
from clip_lite_jax.processes import process_pool

ALONE_BYTES = 2**28
"""Less is read before another process has started."""


def indices(
    paths: Sequence[Place],
    make: Callable[[Place], pa.Table],
    version: Sequence[Any],
    processes: int,
) -> Iterator[pa.Table]:
    """``make(path)`` of every file, from the cache if it was made before.

    Args:
      make: travels to other processes, so a function of a module, or a `partial` of one.
      version: whatever `make` depends on besides the file, whose path, size and time count anyway.
      processes: how many make tables at a time.
    """
    known = [version_of(path) for path in paths]
    files = [_file((*some, *version)) for some in known]
    new = [
        (path, file)
        for path, file, (*_, tag) in zip(paths, files, known, strict=True)
        if not file.exists() or tag == ""  # without one nobody knows whether it has changed
    ]
    job = partial(_make, make)
    little = sum(version_of(path)[1] for path, _ in new) < ALONE_BYTES
    if processes < 2 or len(new) < 2 or little:
        for pair in tqdm(new, "index", disable=little):
            job(pair)
    else:
        with process_pool(min(processes, len(new))) as pool:
            for _ in tqdm(pool.map(job, new), "index", len(new)):
                pass
    for file in files:
        with pa.memory_map(str(file)) as source:
            yield pa.ipc.open_file(source).read_all()


def _make(make: Callable[[Place], pa.Table], pair: tuple[Place, Path]) -> None:
    path, file = pair
    table = make(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
        writer.write_table(table)


def _file(known: tuple[Any, ...]) -> Path:
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
    return cache_folder() / "index" / f"{name}.arrow"
