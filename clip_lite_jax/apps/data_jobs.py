"""Work on pieces of a source, spread over processes that each open the source once."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from typing import TypeVar

from clip_lite_jax.config import DataConfig, from_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import Source, build_sources
from clip_lite_jax.processes import process_pool

Job = TypeVar("Job")
Result = TypeVar("Result")


def as_text(data: DataConfig) -> str:
    """A configuration that travels and can be compared."""
    return json.dumps(asdict(data))


def from_text(data: str) -> DataConfig:
    return from_dict(DataConfig, json.loads(data))


@cache
def sources_of(data: str) -> dict[str, Source]:
    """The splits of a source, built once in each process."""
    return build_sources(from_text(data), BadExamples(), training=False)


def run_jobs(
    work: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[Result]:
    """``work(job)`` of every job, in their order, by so many processes."""
    if processes < 2 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    with process_pool(min(processes, len(jobs))) as pool:
        yield from pool.map(work, jobs)
