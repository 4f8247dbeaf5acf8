"""Statistics, tables and the picture of `one_negative`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.one_negative_methods import RECIPES
from benchmarks.pages import table

REFERENCE = "infonce"
FULL = "sigmoid"
BEST = "best_on_validation"


def paired(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of runs of equal seeds, with its 95 % interval by Student's t.

    Seed by seed, as far as both go.
    """
    difference = np.array([a - b for a, b in zip(values, reference, strict=False)])
    mean = float(difference.mean())
    error = difference.std(ddof=1) / np.sqrt(difference.size)
    half = float(stats.t.ppf(0.975, difference.size - 1) * error)
    return mean, mean - half, mean + half


def _table(head: list[str], lines: list[list[str]]) -> str:
    return table([head, ["---"] * len(head), *lines]) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def _against(row: dict[str, Any], reference: dict[str, Any], batch: str) -> str:
    found = paired(row["batches"][batch]["top_1"], reference["batches"][batch]["top_1"])
    return f"{found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}]"


def _choice(row: dict[str, Any], batch: str) -> str:
    cell = row["batches"][batch]
    return str(cell.get("row", f"{cell['factor']:.2f}"))


def _costs(row: dict[str, Any]) -> list[list[str]]:
    """A line for every batch size whose memory was read."""
    return [
        [
            row["label"],
            batch,
            f"{cell['scored']:,}",
            f"{cell['back_propagated']:,}",
            f"{cell['seconds']:.1f} s",
            f"{cell['temporaries'] / 1e6:.2f} MB",
        ]
        for batch, cell in row["batches"].items()
        if cell["temporaries"] is not None
    ]


def markdown(results: dict[str, Any]) -> str:
    """Top-1, differences to InfoNCE and to the full sigmoid loss, chosen rates, and costs."""
    rows = {row["name"]: row for row in results["rows"]}
    batches = list(next(iter(rows.values()))["batches"])
    reference, full = rows[REFERENCE], rows[FULL]
    others = [row for name, row in rows.items() if name != REFERENCE]
    head = ["row", *(f"batch {batch}" for batch in batches)]

    def lines(cell: Any, of: list[dict[str, Any]]) -> list[list[str]]:
        return [[row["label"], *(cell(row, batch) for batch in batches)] for row in of]

    def top_1(row: dict[str, Any], batch: str) -> str:
        return _mean_and_deviation(row["batches"][batch]["top_1"])

    parts = [
        ("Mean top-1 of the four test sets", _table(head, lines(top_1, list(rows.values())))),
        (
            f"Difference to {reference['label']}, paired by seed",
            _table(head, lines(lambda r, b: _against(r, reference, b), others)),
        ),
        (
            f"Difference to {full['label']}, paired by seed",
            _table(
                head,
                lines(lambda r, b: _against(r, full, b), [r for r in others if r is not full]),
            ),
        ),
        (
            "Costs",
            _table(
                ["row", "batch", "pairs scored", "back-propagated", "run", "temporaries of a step"],
                [line for row in rows.values() if row["name"] in RECIPES for line in _costs(row)],
            ),
        ),
        (
            "What validation chose: learning rate, as a factor of 1e-2 · sqrt(batch / 64), or row",
            _table(head, lines(_choice, list(rows.values()))),
        ),
    ]
    return "\n".join(f"### {title}\n\n{table}" for title, table in parts) + "\n" + _made_by(results)


def _made_by(results: dict[str, Any]) -> str:
    made = results["provenance"]
    runs = {
        row["label"]: len(next(iter(row["batches"].values()))["top_1"]) for row in results["rows"]
    }
    most = max(runs.values())
    fewer = [f"{label} {count}" for label, count in runs.items() if count < most]
    seeds = f"{most} seeds a cell" + (f", but of {'; '.join(fewer)}" if fewer else "")
    return (
        f"{seeds}. Intervals are two-sided 95 % ones. Made by `{results['command']}` at commit "
        f"{made['commit']}, {made['machine']}, jax {made['jax']}, Python {made['python']}, "
        f"{made['date']}.\n"
    )


# Okabe and Ito's colours can be told apart by colour-blind readers.
COLOURS = ("#0072b2", "#009e73", "#56b4e9", "#e69f00", "#d55e00", "#cc79a7")


def plot(results: dict[str, Any], path: Path) -> None:
    """Top-1 against the batch size, and how far the chosen negative is from InfoNCE."""
    from matplotlib.figure import Figure

    rows = {row["name"]: row for row in results["rows"]}
    sizes = [int(batch) for batch in rows[REFERENCE]["batches"]]
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    levels, differences = figure.subplots(1, 2)
    full = {REFERENCE: "#000000", FULL: "#7f7f7f"}
    others = [name for name in rows if name in RECIPES and name not in full]
    for name, colour in (full | dict(zip(others, COLOURS, strict=False))).items():
        top_1 = [np.mean(cell["top_1"]) for cell in rows[name]["batches"].values()]
        style = "s--" if name in full else "o-"
        levels.plot(sizes, top_1, style, color=colour, lw=1.8, ms=4, label=rows[name]["label"])
    levels.set_ylabel("top-1, mean of four held-out sets")
    levels.set_title("One negative per pair, or the whole batch", loc="left", fontsize=11)

    # Each a little aside, so that bars do not hide each other.
    compared = {BEST: ("#0072b2", 0.94), FULL: ("#7f7f7f", 1.0), "jsd_shuffle": ("#d55e00", 1.06)}
    for name, (colour, shift) in compared.items():
        if name not in rows:
            continue
        found = np.array(
            [
                paired(cell["top_1"], reference["top_1"])
                for cell, reference in zip(
                    rows[name]["batches"].values(), rows[REFERENCE]["batches"].values(), strict=True
                )
            ]
        )
        mean, errors = found[:, 0], np.abs(found[:, 1:] - found[:, :1]).T
        differences.errorbar(
            np.multiply(sizes, shift),
            mean,
            errors,
            fmt="o-" if name == BEST else "s--",
            color=colour,
            lw=1.8,
            ms=4,
            capsize=3,
            label=rows[name]["label"],
        )
    differences.axhline(0, color="#000000", lw=1)
    differences.set_ylabel("top-1 less that of InfoNCE over the batch")
    differences.set_title("Paired by seed, 95 % intervals", loc="left", fontsize=11)
    for axes in (levels, differences):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("batch size")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
