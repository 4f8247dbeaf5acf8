"""What an evaluation task is; `registry` has them by name.

A task has options of its own, a frozen pydantic dataclass, and is built from the splits of a source
and what the towers read of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic

from clip_lite_jax.config import DataConfig, TaskConfig, explain
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.train_step import EncodeFns

ALL = "all"


@dataclass(frozen=True)
class Joined:
    """A `Source`: the examples of several, one after another."""

    parts: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Example:
        part, place = self._place(index)
        return part[place]

    def metadata(self, index: int) -> Example:
        part, place = self._place(index)
        return part.metadata(place)

    def _place(self, index: int) -> tuple[Source, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True)
class TaskData:
    """What a task is evaluated on."""

    splits: Mapping[str, Source]
    inputs: TowerInputs
    batch_size: int
    bad: BadExamples
    """Gets the examples that cannot be used."""

    def split(self, name: str) -> Source:
        """The split of that name, or ``all`` of them one after another.

        Raises:
          DataError: there is no such split, or nothing in it.
        """
        if name == ALL and name not in self.splits and any(map(len, self.splits.values())):
            return Joined(tuple(self.splits.values()))
        if name not in self.splits or not len(self.splits[name]):
            there = ", ".join(f"{n} {len(s)}" for n, s in self.splits.items() if len(s))
            raise DataError(
                f"split {name!r} has no examples; there are: {there or 'none'}; {ALL!r} is all"
            )
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


def data_of(task: TaskConfig, data: DataConfig) -> DataConfig:
    """Where a task's pairs come from, prepared as `data`, the model's own, are.

    Raises:
      ConfigError: a field that there is not, or a value of the wrong type.
    """
    if not task.source:
        if task.fields:
            raise ConfigError(
                f"fields {', '.join(task.fields)} of data for the task {task.task!r}, whose data "
                "are the run's own: name a source"
            )
        return data
    if own := [name for name in task.fields if name in PREPARATION]:
        raise ConfigError(
            f"data.{own[0]} is the model's, whatever it is measured on: leave it out, or train "
            "another model with it"
        )
    try:
        return DataConfig(
            **{"source": task.source}
            | {name: getattr(data, name) for name in PREPARATION}
            | task.fields
        )
    except (pydantic.ValidationError, TypeError) as error:
        why = explain(error) if isinstance(error, pydantic.ValidationError) else error
        raise ConfigError(f"fields of the task {task.task!r}: {why}") from error


PREPARATION = (
    "image_size",
    "resize",
    "max_tokens",
    "caption_normalization",
    "threads",
)
"""Fields of `data` that say what a model reads, wherever its pairs come from."""
