"""Work on pieces of a source, spread over processes."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TypeVar

from clip_lite_jax.config import DataConfig, from_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sharing import Shared
from clip_lite_jax.data.sources import Source, build_sources
from clip_lite_jax.processes import process_pool

Job = TypeVar("Job")
Result = TypeVar("Result")


def as_text(data: DataConfig) -> str:
    """A configuration that travels and can be compared."""
    return json.dumps(asdict(data))


def from_text(data: str) -> DataConfig:
    return from_dict(DataConfig, json.loads(data))


_opening = threading.Lock()
_opened: dict[str, dict[str, Source]] = {}
"""Sources by their configuration: each is opened once, and not again by the processes that help."""


def open_sources(data: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """The splits of a source, which jobs will find by `sources_of`; raises as `build_sources`."""
    with _opening:
        return _open(data, bad)


def sources_of(data: str) -> dict[str, Source]:
    """The splits of a source; those of another machine open it themselves."""
    with _opening:
        return _opened.get(data) or _open(from_text(data), BadExamples())


def _open(data: DataConfig, bad: BadExamples) -> dict[str, Source]:
    found = build_sources(data, bad, training=False)
    _opened.clear()  # of those before it nobody asks
    _opened[as_text(data)] = found
    return found


def run_jobs(
    work: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[Result]:
    """``work(job)`` of every job, in their order, by so many processes."""
    if processes < 2 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    shared = Shared(_opened)
    with process_pool(min(processes, len(jobs)), _remember, shared) as pool:
        try:
            yield from pool.map(work, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or all others would be done first
            raise


def _remember(opened: dict[str, dict[str, Source]]) -> None:
    _opened.update(opened)
