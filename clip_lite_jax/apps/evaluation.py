"""``clip-lite eval``: tasks on a trained model, and a file for what each of them found."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clip_lite_jax.apps.evaluation_pages import PAGES
from clip_lite_jax.apps.identity import identity_of
from clip_lite_jax.config import DataConfig, TaskConfig, from_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import Source, build_sources, fingerprint
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.registry import TASKS, build_task, task_of
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
    data: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bad_examples: dict[str, str] = field(default_factory=dict)
    """Ids of examples that could not be used, with reasons; the first hundred."""
    seconds: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def evaluate_model(
    model: DualEncoderModel,
    name: str,
    tasks: Sequence[TaskConfig],
    out: Path,
    done: Callable[[Path, Result], None] = lambda path, result: None,
) -> list[Path]:
    """Runs tasks one after another and writes a file for each, and pages beside it.

    `name` is what results call the model: its folder or URL.  A task that fails takes nothing from
    those before it.  `done` is told of each.

    Raises:
      ConfigError, DataError: what is asked for cannot be measured.
    """
    opened: dict[str, _Opened] = {}
    written = []
    for task in tasks:
        start = time.perf_counter()
        key = json.dumps([task.source, task.fields], sort_keys=True)
        if key not in opened:
            opened[key] = _open(model, task)
        splits, bad, data = opened[key].splits, opened[key].bad, opened[key].data
        inputs = TowerInputs(model.pixels, model.tokenizer)
        evaluator = build_task(
            task.task, TaskData(splits, inputs, model.batch_size, bad), task.options
        )
        outcome = evaluator.outcome(model.fns)
        result = Result(
            task=task.task,
            source=task.source,
            protocol=evaluator.protocol,
            metrics={key: _finite(value) for key, value in outcome.metrics.items()},
            model=identity_of(model, name).to_json(),
            data={
                "fingerprint": fingerprint(splits),
                "splits": {split: len(source) for split, source in splits.items()},
                "fields": _changed(data),
            },
            options=dict(task.options),
            tables=outcome.tables,
            bad_examples=dict(list(bad.reasons.items())[:BAD_LISTED]),
            seconds=time.perf_counter() - start,
            provenance=provenance(),
        )
        path = out / file_name(task)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(asdict(result), indent=1, allow_nan=False) + "\n")
        if task.task in PAGES:
            page = PAGES[task.task](evaluator, model.fns, outcome)
            write_atomic(path.with_suffix(".html"), page)
        written.append(path)
        done(path, result)
    return written


@dataclass(frozen=True)
class _Opened:
    splits: Mapping[str, Source]
    bad: BadExamples
    data: DataConfig


def _open(model: DualEncoderModel, task: TaskConfig) -> _Opened:
    data, bad = data_of(task, model.config.data), BadExamples()
    return _Opened(build_sources(data, bad, training=False), bad, data)


def file_name(task: TaskConfig) -> str:
    """The same for the same question, another for another."""
    asked = json.dumps([task.source, task.fields, task.options], sort_keys=True)
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    words = re.sub(r"[^\w.-]+", "_", Path(task.source).name)[:60] or "own_data"
    return f"{task.task}-{words}-{digest}.json"


def options_text() -> str:
    """All tasks and their options with defaults, for ``--help``."""
    lines = ["tasks, with their options (--TASK.OPTION=VALUE) and defaults:"]
    for name, task in TASKS.items():
        lines.append(f"  {name}: {task.summary}")
        values = ", ".join(f"{key}={value!r}" for key, value in asdict(task.options()).items())
        lines.append(f"      {values}")
    return "\n".join(lines)


def _changed(data: DataConfig) -> dict[str, Any]:
    """The fields of `data` that are not as they are by default."""
    values, usual = (json.loads(json.dumps(asdict(d))) for d in (data, DataConfig()))
    return {key: value for key, value in values.items() if value != usual[key]}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def read_result(path: Path) -> Result:
    """A result file.

    Raises:
      ConfigError: it is none, or of another version.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no result of clip-lite eval: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{path} has format={found!r}, and {FORMAT} is read here")
    try:
        return from_dict(Result, values)
    except ConfigError as error:
        raise ConfigError(f"{path} is no result of clip-lite eval: {error}") from error
