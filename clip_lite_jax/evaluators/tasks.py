"""Evaluation tasks by name: what `clip-lite eval` runs, and training with `eval.tasks`.

A task has options of its own, a frozen pydantic dataclass, and is built from the splits of a source
and what the towers read of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clip_lite_jax.config import from_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.train_step import EncodeFns


@dataclass(frozen=True)
class TaskData:
    """What a task is evaluated on."""

    splits: Mapping[str, Source]
    inputs: TowerInputs
    batch_size: int
    bad: BadExamples
    """Gets the examples that cannot be used."""

    def split(self, name: str) -> Source:
        """Raises `DataError` where there is no such split, or nothing in it."""
        if name not in self.splits or not len(self.splits[name]):
            there = ", ".join(f"{n} {len(s)}" for n, s in self.splits.items() if len(s))
            raise DataError(f"split {name!r} has no examples; there are: {there or 'none'}")
        return self.splits[name]


@dataclass(frozen=True)
class Outcome:
    """What a task found."""

    metrics: dict[str, float]
    """``NAME``, with ``NAME_low`` and ``NAME_high`` where there is an interval of 95 %."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """More than a number: rows of plain values, as ``per_class`` or ``confusion``."""


class TaskEvaluator:
    """An `Evaluator` that says by which protocol it measures, and keeps more than numbers."""

    protocol: str
    """In one line, with what decides the numbers: sizes, prompts, ties, costs."""

    def outcome(self, fns: EncodeFns) -> Outcome:
        raise NotImplementedError

    def run(self, fns: EncodeFns) -> dict[str, float]:
        return self.outcome(fns).metrics


@dataclass(frozen=True)
class Task:
    """How a task is built."""

    options: type
    build: Callable[[TaskData, Any], TaskEvaluator]
    summary: str


TASKS: dict[str, Task] = {}


def build_task(name: str, data: TaskData, options: Mapping[str, Any]) -> TaskEvaluator:
    """The evaluator of a task.

    Raises:
      ConfigError: no such task, or no such option of it.
      DataError: the source lacks what the task measures.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r}: choose from {', '.join(TASKS)}")
    task = TASKS[name]
    try:
        chosen: Any = from_dict(task.options, options)
    except ConfigError as error:
        raise ConfigError(f"options of the task {name!r}: {error}") from error
    return task.build(data, chosen)
