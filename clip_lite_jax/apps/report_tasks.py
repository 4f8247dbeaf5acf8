"""What tasks have found: those of `eval.tasks`, and those of ``clip-lite eval`` on the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_lite_jax.apps.evaluation import FOLDER, read_result
from clip_lite_jax.apps.report_gallery import shorten
from clip_lite_jax.apps.report_tables import Numbers
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.bootstrap import ENDS

ROWS = 10
"""Of a table."""
COLUMNS = 8
CELL = 80
"""Characters of a cell."""
QUALITY = ("accuracy", "top1", "recall", "average_precision", "ap", "f1", "precision", "top5")
"""Columns by which the worst rows of a table are found, the first that is there."""


@dataclass(frozen=True)
class Metric:
    name: str
    value: str
    interval: str


@dataclass(frozen=True)
class Table:
    """Some rows of a table."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    of: int
    """Rows of the whole table."""
    worst: str
    """The column by which the worst rows were chosen; empty for the first ones."""


@dataclass(frozen=True)
class TaskResult:
    """One task, as it is shown."""

    title: str
    protocol: str
    origin: str
    """Which file says so, of which data and when."""
    metrics: list[Metric]
    tables: list[Table] = field(default_factory=list)
    bad: int = 0


def tasks_of_run(
    results: Mapping[str, Any] | None, numbers: Numbers, stage: str
) -> list[TaskResult]:
    """Those of `eval.tasks`, from results.json or from the latest validation."""
    protocols = (results or {}).get("protocols", {}) if stage == "test" else {}
    tables = (results or {}).get("tables", {}) if stage == "test" else {}
    return [
        TaskResult(
            name.removeprefix("tasks/").replace("_", " "),
            protocols.get(name, ""),
            f"eval.tasks, {'results.json' if stage == 'test' else 'metrics.jsonl'}",
            _metrics(values),
            _tables(tables.get(name, {})),
        )
        for name, values in numbers.items()
        if name.startswith("tasks/")
    ]


def tasks_of_model(workdir: Path, step: int | None = None) -> tuple[list[TaskResult], list[str]]:
    """Those of ``clip-lite eval``, and what is wrong with files that cannot be read.

    One of another step than `step` says so.
    """
    found, problems = [], []
    for path in sorted((workdir / FOLDER).glob("*.json")):
        try:
            result = read_result(path)
        except ConfigError as error:
            problems.append(shorten(str(error), 200))
            continue
        origin = f"{FOLDER}/{path.name}, {result.provenance.get('date', 'no date')}"
        if fingerprint := result.data.get("fingerprint"):
            origin += f", data {str(fingerprint)[:12]}"
        measured_at = result.model.get("step")
        if step is not None and measured_at not in (None, step):
            origin += f"; of step {measured_at}, not of this report's {step}"
        found.append(
            TaskResult(
                f"{result.task} on {result.source or 'the data of the run'}",
                result.protocol,
                origin,
                _metrics(result.metrics),
                _tables(result.tables),
                result.bad_count,
            )
        )
    return found, problems


def _metrics(values: Mapping[str, float | None]) -> list[Metric]:
    rows = []
    for name, value in values.items():
        if name.endswith(ENDS) or name.endswith("_chance"):
            continue
        low, high = (values.get(name + end) for end in ENDS)
        none = low is None or high is None or low == high  # of equal values: no width
        interval = "" if none else f"{_plain(low)} to {_plain(high)}"
        rows.append(Metric(name.replace("_", " "), _plain(value), interval))
    return rows


def _tables(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    shown = []
    for name, given in tables.items():
        rows = [row for row in given if isinstance(row, Mapping)]
        if not rows:
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))[:COLUMNS]
        worst = next((key for key in QUALITY if any(_is_number(row.get(key)) for row in rows)), "")
        some = sorted(rows, key=lambda row: _value_or_last(row.get(worst))) if worst else rows
        cells = [[_cell(row.get(column)) for column in columns] for row in some[:ROWS]]
        titles = [column.replace("_", " ") for column in columns]
        shown.append(Table(name.replace("_", " "), titles, cells, len(rows), worst))
    return shown


def _value_or_last(value: Any) -> float:
    """For sorting: a class that was left out has no value, and is not the worst one."""
    return float(value) if _is_number(value) else math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return _plain(value) if _is_number(value) else shorten(str(value), CELL)  # type: ignore[arg-type]


def _plain(value: float | None) -> str:
    """With four significant digits, or whole."""
    if value is None or not math.isfinite(value):
        return "not finite"
    whole = value == round(value) and abs(value) >= 1
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "−")
