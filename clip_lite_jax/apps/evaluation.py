"""``clip-lite eval``: tasks on a trained model, and a file for what each of them found."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.apps.evaluation_pages import PAGES
from clip_lite_jax.apps.identity import identity_of
from clip_lite_jax.config import DataConfig, TaskConfig, from_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import Source, build_sources, fingerprint
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.registry import TASKS, build_task, options_of, task_of
from clip_lite_jax.evaluators.tasks import TaskData, data_of
from clip_lite_jax.files import write_atomic
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.provenance import provenance

FORMAT = 1
"""Of result files; raised when readers of before would misread them."""
FOLDER = "evaluations"
"""Where results lie in the folder of a model."""
BAD_LISTED = 100


def parse_task(text: str, fields: Mapping[str, Any], options: Mapping[str, Any]) -> TaskConfig:
    """``NAME`` or ``NAME:SOURCE``, with the fields of `data` and the options of the task.

    Raises:
      ConfigError: there is no such task.
    """
    name, _, source = text.partition(":")
    task_of(name)
    return TaskConfig(task=name, source=source, fields=dict(fields), options=dict(options))


@dataclass(frozen=True)
class Result:
    """What a result file holds."""

    task: str
    source: str
    """As `data.source`; empty for the data of the model's run."""
    protocol: str
    """How it was measured: with the data's fingerprint, what two results must share."""
    metrics: dict[str, float | None]
    """None where there is no finite number."""
    model: dict[str, Any]
    """`Identity`."""
    data: dict[str, Any]
    """``fingerprint`` and ``splits``, the number of examples of each."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of `data`, that the source needed otherwise."""
    options: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bad_count: int = 0
    """Examples of the source that could not be used, by this task or those before it."""
    bad_examples: dict[str, str] = field(default_factory=dict)
    """The first hundred of them, with reasons."""
    seconds: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def evaluate_model(
    model: DualEncoderModel,
    name: str,
    tasks: Sequence[TaskConfig],
    out: Path,
    done: Callable[[Path, Result], None] = lambda path, result: None,
    own_folder: bool = False,
) -> list[Path]:
    """Runs tasks one after another and writes a file for each, and pages beside it.

    `name` is what results call the model: its folder or URL.  A task that fails takes nothing from
    those before it.  `done` is told of each.  In the model's `own_folder` files need not say which
    model they are of.

    Raises:
      ConfigError, DataError: what is asked for cannot be measured.
    """
    for task in tasks:  # before any of them takes its time
        options_of(task.task, task.options)
        data_of(task, model.config.data)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}; name a folder with --out") from error
    identity = identity_of(model, name).to_json()

    def tokenize(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return model.tokenizer(captions)  # weights without one are measured where it is not needed

    inputs = TowerInputs(model.pixels, tokenize)
    opened: dict[str, _Opened] = {}
    written = []
    for task in tasks:
        start = time.perf_counter()
        splits = opened.setdefault(
            json.dumps([task.source, task.fields], sort_keys=True),
            _Opened(data_of(task, model.config.data)),
        )
        data = TaskData(splits, inputs, model.batch_size, splits.bad)
        evaluator = build_task(task.task, data, task.options)
        outcome = evaluator.outcome(model.fns)
        result = Result(
            task=task.task,
            source=task.source,
            protocol=evaluator.protocol,
            metrics={**outcome.metrics},
            model=identity,
            data=splits.facts(),
            fields=dict(task.fields),
            options=dict(task.options),
            tables=outcome.tables,
            bad_count=len(splits.bad),
            bad_examples=dict(list(splits.bad.reasons.items())[:BAD_LISTED]),
            seconds=time.perf_counter() - start,
            provenance=provenance(),
        )
        path = out / file_name(task, "" if own_folder else identity["weights"][:8])
        content = json.dumps(_finite(asdict(result)), indent=1, allow_nan=False)
        write_atomic(path, content + "\n")
        if task.task in PAGES:
            page = PAGES[task.task](evaluator, model.fns, outcome)
            write_atomic(path.with_suffix(".html"), page)
        written.append(path)
        done(path, result)
    return written


class _Opened(Mapping[str, Source]):
    """The splits of a source, which is read when one of them is asked for: not all tasks do."""

    def __init__(self, data: DataConfig) -> None:
        self.data, self.bad = data, BadExamples()
        self._splits: dict[str, Source] | None = None

    def _found(self) -> dict[str, Source]:
        if self._splits is None:
            self._splits = build_sources(self.data, self.bad, training=False)
        return self._splits

    def __getitem__(self, name: str) -> Source:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def facts(self) -> dict[str, Any]:
        """What a result says of its data; nothing where they were not needed."""
        if self._splits is None:
            return {"fingerprint": "", "splits": {}}
        return {
            "fingerprint": fingerprint(self._splits),
            "splits": {split: len(source) for split, source in self._splits.items()},
        }


def file_name(task: TaskConfig, model: str = "") -> str:
    """The same for the same question, another for another; beside results of other models with a
    name of the `model`."""
    asked = json.dumps([task.source, task.fields, task.options], sort_keys=True)
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    words = re.sub(r"[^\w.-]+", "_", Path(task.source).name)[:60] or "own_data"
    return "-".join(filter(None, (task.task, words, model, digest))) + ".json"


def options_text() -> str:
    """All tasks and their options with defaults, for ``--help``."""
    lines = ["tasks, with their options (--TASK.OPTION=VALUE) and defaults:"]
    for name, task in TASKS.items():
        lines.append(f"  {name}: {task.summary}")
        options = asdict(task.options()).items()
        values = ", ".join(f"{key}={json.dumps(value)}" for key, value in options)
        lines.append(f"      {values}")
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    """The same with None for every number that is none: JSON has no such."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_result(path: Path) -> Result:
    """A result file.

    Raises:
      ConfigError: it is none, or of another version.
    """
    try:
        values = json.loads(path.read_text(), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no result of clip-lite eval: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{path} has format={found!r}, and {FORMAT} is read here")
    try:
        return from_dict(Result, values)
    except ConfigError as error:
        raise ConfigError(f"{path} is no result of clip-lite eval: {error}") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
