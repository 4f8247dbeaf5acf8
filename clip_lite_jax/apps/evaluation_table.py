"""Results of `clip-lite eval`, of several models side by side."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from clip_lite_jax.apps.evaluation import FOLDER, Result, read_result
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.bootstrap import ENDS
from clip_lite_jax.files import CONFIG_FILE

log = logging.getLogger(__name__)


def read_results(places: Sequence[Path]) -> dict[str, list[Result]]:
    """The results in each place, a result file or the folder of a model or of results, by its name.

    Files that are no results are passed over, and the log says so.

    Raises:
      ConfigError: there are none in one of them.
    """
    found: dict[str, list[Result]] = {}
    for place, name in zip(places, _short(places), strict=True):
        if not place.is_dir():
            found[name] = [read_result(place)]
            continue
        folder = place / FOLDER if (place / FOLDER).is_dir() else place
        # Those of a run's or an export's own are no results.
        files = [] if (place / CONFIG_FILE).exists() and folder == place else folder.glob("*.json")
        found[name] = []
        for file in sorted(files):
            try:
                found[name].append(read_result(file))
            except ConfigError as error:
                log.warning("%s", error)
        if not found[name]:
            raise ConfigError(f"{place} holds no results: clip-lite eval {place} TASK makes them")
    return found


def _short(places: Sequence[Path]) -> list[str]:
    """Names as short as tells them apart: the last parts of their paths."""
    parts = [[p for p in place.resolve().parts if p != FOLDER] or ["/"] for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-count:]) for of in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("--table: one place is named twice")


def table(results: dict[str, list[Result]]) -> str:
    """A column for each model, a row for each number, results of one question together."""
    lines = []
    for question in dict.fromkeys(_question(r) for of in results.values() for r in of):
        columns = {
            name: [r for r in of if _question(r) == question] for name, of in results.items()
        }
        for number in range(max(map(len, columns.values()))):
            some = {name: of[number] for name, of in columns.items() if number < len(of)}
            lines += _part(list(results), some)
    return "\n".join(lines[1:])


def _part(names: Sequence[str], some: dict[str, Result]) -> list[str]:
    """The results of one question, at most one of each model."""
    first = next(iter(some.values()))
    settings = [f"{key}={value}" for key, value in {**first.options, **first.fields}.items()]
    lines = ["", f"{first.task} on {first.source or 'the data of the run'}", f"  {first.protocol}"]
    if settings:
        lines.append(f"  {', '.join(settings)}")
    if data := str(first.data.get("fingerprint", "")):
        lines.append(f"  data {data[:12]}")
    rows = [["", *names]]
    metrics = dict.fromkeys(m for r in some.values() for m in r.metrics if not m.endswith(ENDS))
    rows += [[metric, *(_cell(some.get(name), metric) for name in names)] for metric in metrics]
    return [*lines, "", *_aligned(rows)]


def _question(result: Result) -> tuple[str, ...]:
    """What results must share to stand side by side."""
    asked = json.dumps([result.options, result.fields], sort_keys=True)
    data = str(result.data.get("fingerprint", ""))
    return result.task, result.source, result.protocol, asked, data


def _cell(result: Result | None, metric: str) -> str:
    if result is None or metric not in result.metrics:
        return "-"
    value = _number(result.metrics[metric])
    low, high = (result.metrics.get(metric + end) for end in ENDS)
    return value if low is None or high is None else f"{value} ({_number(low)}, {_number(high)})"


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.0f}" if value == round(value) and abs(value) >= 1 else f"{value:.4g}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
