"""Tables and the plot of `benchmarks.mutual_information`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.mi_training import certified_excess
from benchmarks.pages import table, write_tables
from clip_lite_jax.apps.report_plots import LIGHT

DOCS = Path(__file__).parent.parent / "docs" / "mutual_information.md"

HEADLINE = ("jsd_one", "calibrated")
"""Training and read-off that stand for JSD, fixed on seeds that the tables do not show."""

ESTIMATORS = (
    ("JSD, one negative: E_P[T], calibrated", "jsd_one", "calibrated"),
    ("JSD, one negative: E_P[T]", "jsd_one", "score_positive"),
    ("JSD, one negative: NWJ at T + 1", "jsd_one", "nwj_shifted"),
    ("JSD, one negative: certified bound", "jsd_one", "jsd_lower_bound"),
    ("JSD, 63 negatives: E_P[T], calibrated", "jsd_all", "calibrated"),
    ("JSD, 63 negatives: E_P[T]", "jsd_all", "score_positive"),
    ("JSD, 63 negatives: NWJ at T + 1", "jsd_all", "nwj_shifted"),
    ("JSD, 63 negatives: certified bound", "jsd_all", "jsd_lower_bound"),
    ("SMILE, τ = 5", "jsd_all", "smile"),
    ("NWJ", "nwj", "nwj"),
    ("MINE: DV, moving average", "mine", "dv"),
    ("DV, gradient of the batch", "dv", "dv"),
    ("InfoNCE, 64 candidates", "infonce", "infonce"),
)
"""Label, training, read-off."""

RIVALS = [e for e in ESTIMATORS if e[1:] == HEADLINE or e[1] in ("mine", "dv", "infonce")]

TASK_ROWS = (
    ("CCA", "cca", None, "cca"),
    ("KSG, 5 neighbours", "ksg", None, "ksg"),
    ("JSD, one negative: E_P[T], calibrated", "jsd_one", "standardised", "calibrated"),
    ("JSD, one negative: E_P[T]", "jsd_one", "standardised", "score_positive"),
    ("JSD, one negative: certified bound", "jsd_one", "standardised", "jsd_lower_bound"),
    ("the same on normal scores: E_P[T], calibrated", "jsd_one", "normal scores", "calibrated"),
    ("the same on normal scores: certified bound", "jsd_one", "normal scores", "jsd_lower_bound"),
    ("NWJ", "nwj", "standardised", "nwj"),
    ("MINE: DV, moving average", "mine", "standardised", "dv"),
    ("InfoNCE, 64 candidates", "infonce", "standardised", "infonce"),
)
"""Label, training, inputs, read-off."""

LOST = 1e3
"""Nats beyond which an estimate counts as diverged."""


@dataclass(frozen=True)
class Spread:
    """How the estimates of one number compare with the truth, in nats."""

    mean: float
    bias: float
    deviation: float  # standard deviation
    rmse: float
    lost: int  # seeds that diverged; the other numbers are of those that did not
    seeds: int


def spread(
    means: Sequence[float | None], truth: float, variances: Sequence[float | None] | None = None
) -> Spread:
    """Of the estimates of several seeds, or of all batches of theirs, given their moments."""
    kept = [i for i, mean in enumerate(means) if mean is not None and abs(mean) < LOST]
    values = np.array([means[i] for i in kept], np.float64)
    if len(values) == 0:
        return Spread(math.nan, math.nan, math.nan, math.nan, len(means), len(means))
    if variances is None:
        variance = float(values.var(ddof=1)) if len(values) > 1 else math.nan
    else:
        within = [v for i in kept if (v := variances[i]) is not None]
        variance = (float(np.mean(within)) if within else 0.0) + float(values.var())
    bias = float(values.mean()) - truth
    square = np.mean((values - truth) ** 2) if variances is None else bias**2 + variance
    lost = len(means) - len(kept)
    return Spread(
        bias + truth, bias, math.sqrt(variance), math.sqrt(float(square)), lost, len(means)
    )


def held_out(
    results: dict[str, Any], task: str, critic: str, training: str, name: str, level: float
) -> Spread:
    records = _records(results, task, critic, training, level)
    return spread([record["held_out"][name] for record in records], level)


def per_batch(
    results: dict[str, Any], task: str, critic: str, training: str, name: str, level: float
) -> Spread | None:
    """None where nothing of the kind is read off a batch."""
    stats = [record["batch"] for record in _records(results, task, critic, training, level)]
    if not stats or name not in stats[0]:
        return None
    means = [stat[name]["mean"] for stat in stats]
    return spread(means, level, [stat[name]["variance"] for stat in stats])


def _records(
    results: dict[str, Any], task: str, critic: str, training: str, level: float
) -> list[dict[str, Any]]:
    wanted = {"task": task, "critic": critic, "training": training, "level": level}
    return [r for r in results["staircase"] if all(r[k] == v for k, v in wanted.items())]


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the docs by name, as Markdown."""
    found = {"oracle": _oracle_table(results), "headline": _headline_table(results)}
    found["tasks"] = _tasks_table(results)
    for task, critic in _pairs(results):
        for protocol, function in (("held-out", held_out), ("batch", per_batch)):
            found[f"{protocol}, {task}, {critic}"] = _spread_table(results, task, critic, function)
    found["certified"] = _certified(results)
    found["made by"] = _made_by(results)
    return found


def _pairs(results: dict[str, Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["task"], r["critic"]) for r in results["staircase"]))


def _oracle_table(results: dict[str, Any]) -> str:
    lines = [["MI", "JSD loss", "E_P[T]", "NWJ at T + 1", "certified bound"], ["---"] * 5]
    for row in results["oracle"]:
        lines.append(
            [
                f"{row['level']:.0f}",
                f"{row['jsd_loss']:.4f} ± {row['jsd_loss_error']:.4f}",
                f"{row['score_positive']:.3f}",
                f"{row['nwj_shifted']:.3f} ± {row['nwj_shifted_error']:.3f}",
                f"{row['jsd_lower_bound']:.3f}",
            ]
        )
    return table(lines)


def _headline_table(results: dict[str, Any]) -> str:
    levels = results["settings"]["levels"]
    lines = [["task", "critic", "estimator", *(f"{level:.0f} nats" for level in levels)]]
    lines.append(["---"] * len(lines[0]))
    for task, critic in _pairs(results):
        for label, training, name in RIVALS:
            if not _records(results, task, critic, training, levels[0]):
                continue
            cells = []
            for level in levels:
                s = held_out(results, task, critic, training, name, level)
                share = f"{_number(s.mean)} ({100 * s.bias / level:+.0f} %)"
                cells.append(share.replace("-", "−") if s.lost == 0 else _lost(s))
            bold = "**" if (training, name) == HEADLINE else ""
            lines.append([task, critic, f"{bold}{label}{bold}", *cells])
    return table(lines)


def _spread_table(results: dict[str, Any], task: str, critic: str, function: Any) -> str:
    levels = results["settings"]["levels"]
    lines = [["estimator", *(f"{level:.0f} nats" for level in levels)]]
    lines.append(["---"] * len(lines[0]))
    for label, training, name in ESTIMATORS:
        if not _records(results, task, critic, training, levels[0]):
            continue
        spreads = [function(results, task, critic, training, name, level) for level in levels]
        if None not in spreads:
            lines.append([label, *(_cell(s) for s in spreads)])
    return table(lines)


def _cell(s: Spread) -> str:
    """Bias ± standard deviation (RMSE)."""
    if s.lost:
        return _lost(s)
    return f"{_number(s.bias)} ± {_number(s.deviation)} ({_number(s.rmse)})"


def _lost(s: Spread) -> str:
    return "diverged" if s.lost == s.seeds else f"{_number(s.mean)}, {s.lost} of {s.seeds} diverged"


def _tasks_table(results: dict[str, Any]) -> str:
    truths = {record["task"]: record["information"] for record in results["tasks"]}
    lines = [["estimator", *truths], ["---"] * (len(truths) + 1)]
    lines.append(["**truth**", *(f"**{truth:.3f}**" for truth in truths.values())])
    for label, training, inputs, name in TASK_ROWS:
        cells = []
        for task, truth in truths.items():
            wanted = {"task": task, "training": training}
            values = [
                record["values"][name]
                for record in results["tasks"]
                if all(record[k] == v for k, v in wanted.items()) and record.get("inputs") == inputs
            ]
            if not values:
                break
            s = spread(values, truth)
            cells.append(_lost(s) if s.lost else f"{_number(s.mean, 3)} ± {s.deviation:.3f}")
        if cells:
            lines.append([label, *cells])
    return table(lines)


def certified_excesses(results: dict[str, Any]) -> list[float]:
    """`certified_excess` of every critic with finite read-offs of held-out pairs, in nats."""
    staircase = [(r["held_out"], r["level"]) for r in results["staircase"]]
    tasks = [(r["values"], r["information"]) for r in results["tasks"]]
    return [
        certified_excess(values, truth)
        for values, truth in staircase + tasks
        if values.get("jsd_loss_error") is not None
    ]


def _certified(results: dict[str, Any]) -> str:
    excesses = certified_excesses(results)
    above = sum(excess > 0 for excess in excesses)
    return (
        f"Of {len(excesses)} critics, whatever they were trained with, {above} have a certified "
        "bound above the truth, read at three standard errors above their JSD loss."
    )


def _made_by(results: dict[str, Any]) -> str:
    made, seeds = results["provenance"], results["settings"]["seeds"]
    minutes = sum(record["seconds"] for record in results["staircase"]) / 60
    return (
        f"Made by `{results['command']}` at commit {made['commit']}, {made['machine']}, one of "
        f"them used and shared with other programs, jax {made['jax']}, Python {made['python']}, "
        f"{made['date']}; {len(seeds)} seeds. Training on the staircase took {minutes:.0f} minutes."
    )


def _number(value: float, digits: int = 2) -> str:
    text = f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"
    return text.replace("-", "−")


def write(results: dict[str, Any], docs: Path) -> None:
    """Puts the tables between their marks in `docs`, and the plot beside it."""
    write_tables(docs, tables(results))
    plot(results).savefig(docs.with_suffix(".png"), dpi=150)


PANELS = (
    ("JSD, one negative\n$E_P[T]$", "jsd_one", "score_positive", "calibrated"),
    ("JSD, one negative\ncertified bound", "jsd_one", "jsd_lower_bound", "jsd_lower_bound"),
    ("SMILE, τ = 5\n", "jsd_all", "smile", "smile"),
    ("NWJ\n", "nwj", "nwj", "nwj"),
    ("MINE\n", "mine", "dv", "dv"),
    ("InfoNCE\n64 candidates", "infonce", "infonce", "infonce"),
)
"""Title, training, read-off of the curve and of the dots."""

COLOURS = {"separable": LIGHT.first, "concat": LIGHT.second}
LIMITS = (-1.5, 13.5)


def plot(results: dict[str, Any]) -> Figure:
    """The staircase: one row for each task, one panel for each estimator."""
    tasks = [t for t in ("plain", "cubic") if any(r["task"] == t for r in results["staircase"])]
    figure = Figure(figsize=(13, 0.9 + 2.5 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(PANELS), sharex=True, sharey=True, squeeze=False)
    for row, task in enumerate(tasks):
        for column, (title, training, curve, dots) in enumerate(PANELS):
            axes = grid[row, column]
            _panel(axes, results, task, training, curve, dots)
            if row == 0:
                axes.set_title(title, fontsize=11, color=LIGHT.ink)
            if row == len(tasks) - 1:
                axes.set_xlabel("thousand steps", color=LIGHT.muted)
        grid[row, 0].set_ylabel(f"{task}\nnats", color=LIGHT.muted)
    handles = [Line2D([], [], color=LIGHT.ink, linewidth=1.4, linestyle=":", label="truth")]
    for critic, colour in COLOURS.items():
        handles.append(Line2D([], [], color=colour, linewidth=1.8, label=f"{critic}, batches"))
        label = f"{critic}, held out"
        handles.append(Line2D([], [], color=colour, marker="o", linestyle="", label=label))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=5, frameon=False, labelcolor=LIGHT.ink
    )
    return figure


def _panel(
    axes: Axes, results: dict[str, Any], task: str, training: str, curve: str, dots: str
) -> None:
    levels, steps = results["settings"]["levels"], results["settings"]["steps"] / 1000
    ends = steps * np.arange(len(levels) + 1)
    axes.stairs(levels, ends, baseline=None, color=LIGHT.ink, linewidth=1.4, linestyle=":")
    for critic, colour in COLOURS.items():
        records = [_records(results, task, critic, training, level) for level in levels]
        curves = [next((r["curve"] for r in level if r["curve"]), None) for level in records]
        if any(values is None for values in curves):
            continue
        values = np.array([v for found in curves if found for v in found[curve]], np.float64)
        at = ends[-1] * (np.arange(len(values)) + 0.5) / len(values)
        axes.plot(at, np.clip(values, -100, 100), color=colour, linewidth=1.6, alpha=0.8)
        spreads = [held_out(results, task, critic, training, dots, level) for level in levels]
        shift = steps * (0.12 if critic == "separable" else 0.22)  # so that dots do not coincide
        inside = [LIMITS[0] < s.mean < LIMITS[1] and s.lost == 0 for s in spreads]
        axes.errorbar(
            (ends[1:] - shift)[inside],
            [s.mean for s, good in zip(spreads, inside, strict=True) if good],
            yerr=[np.nan_to_num(s.deviation) for s, g in zip(spreads, inside, strict=True) if g],
            fmt="o",
            color=colour,
            markeredgecolor="white",
            markersize=6,
            zorder=3,
        )
    axes.set_ylim(*LIMITS)
    axes.set_yticks([0, *levels])
    axes.grid(True, axis="y", color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.muted, labelsize=9.5, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT.muted)
