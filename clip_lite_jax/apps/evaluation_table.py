"""Results of `clip-lite eval`, of several models side by side."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from clip_lite_jax.apps.evaluation import FOLDER, Result, read_result
from clip_lite_jax.errors import ConfigError

ENDS = ("_low", "_high")


def read_results(places: Sequence[Path]) -> dict[str, list[Result]]:
    """The results in each place, a result file or the folder of a model, by its name.

    Raises:
      ConfigError: there are none in one of them.
    """
    found = {}
    for place in places:
        folder = place / FOLDER if (place / FOLDER).is_dir() else place
        files = sorted(folder.glob("*.json")) if folder.is_dir() else [place]
        if not files:
            raise ConfigError(f"{place} holds no results: clip-lite eval {place} TASK makes them")
        found[str(place)] = [read_result(file) for file in files]
    return found


def table(results: dict[str, list[Result]]) -> str:
    """A column for each model, a row for each number, results of one protocol and data together."""
    lines = []
    for question in dict.fromkeys(_question(r) for of in results.values() for r in of):
        columns = {
            name: next((r for r in of if _question(r) == question), None)
            for name, of in results.items()
        }
        some = next(r for r in columns.values() if r is not None)
        lines += [
            "",
            f"{some.task} on {some.source or 'the data of the run'}",
            f"  {some.protocol}",
        ]
        lines += [f"  data {some.data['fingerprint'][:12]}", ""]
        rows = [[""] + [Path(name).name for name in columns]]
        metrics = (r.metrics for r in columns.values() if r is not None)
        for metric in dict.fromkeys(m for of in metrics for m in of if not m.endswith(ENDS)):
            rows.append([metric, *(_cell(result, metric) for result in columns.values())])
        lines += _aligned(rows)
    return "\n".join(lines[1:])


def _question(result: Result) -> tuple[str, ...]:
    """What results must share to stand side by side."""
    return result.task, result.source, result.protocol, str(result.data["fingerprint"])


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
