"""Tables and the plot of `benchmarks.objectives`."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.pages import table as markdown_table
from benchmarks.pages import write_tables
from clip_lite_jax.apps.report_plots import LIGHT
from clip_lite_jax.hlo import KINDS

DOCS = Path(__file__).parent.parent / "docs" / "costs.md"

ROWS_PER_DEVICE = 128
"""Pairs on each device where the number of devices grows."""

Record = dict[str, Any]


def of(part: Record | None, **wanted: Any) -> list[Record]:
    """The records with these values."""
    records = part["records"] if part else []
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def sent(record: Record) -> float:
    """Bytes that leave a device, all collectives together."""
    return float(sum(record["sent_bytes"].values()))


def seconds(record: Record) -> float | None:
    """Median CPU seconds of a call, of all devices together."""
    return statistics.median(record["cpu_seconds"]) if "cpu_seconds" in record else None


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - len(str(int(value))) + 1) if value >= 1 else 3
    return f"{value:,.{digits}f}"


def megabytes(size: float) -> str:
    return number(size / 1e6)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the docs by name, as Markdown."""
    cpu, tpu = results.get("cpu"), results.get("tpu")
    found = {
        "traffic": _traffic(cpu, tpu),
        "memory": _memory(cpu, tpu),
        "time": _time(cpu),
    }
    for name, part in (("cpu", cpu), ("tpu", tpu)):
        found[f"kinds, {name}"] = _kinds(part)
        found[f"made by, {name}"] = _made_by(part)
    return {name: table for name, table in found.items() if table}


Column = tuple[str, list[Record], Callable[[Record], str]]
"""Heading, the records that it shows, one for each case, and how."""


def _table(columns: Sequence[Column]) -> str:
    """One row for each case; empty without columns."""
    columns = [column for column in columns if column[1]]
    if not columns:
        return ""
    cases = dict.fromkeys(record["case"] for _, records, _ in columns for record in records)
    lines = [["", *(heading for heading, _, _ in columns)], ["---"] + ["---:"] * len(columns)]
    for case in cases:
        cells = [[show(r) for r in records if r["case"] == case] for _, records, show in columns]
        lines.append([case, *(cell[0] if cell else "" for cell in cells)])
    return markdown_table(lines)


def _traffic(cpu: Record | None, tpu: Record | None) -> str:
    columns: list[Column] = []
    for name, part, sizes in (("CPU", cpu, (2, 4, 8)), ("TPU", tpu, (4, 8, 16, 32))):
        for devices in sizes:
            records = of(part, devices=devices, batch=ROWS_PER_DEVICE * devices)
            columns.append((f"{name}, {devices}", records, lambda r: megabytes(sent(r))))
    return _table(columns)


def _memory(cpu: Record | None, tpu: Record | None) -> str:
    columns: list[Column] = []
    for name, part, batches in (
        ("CPU", cpu, (256, 1024, 4096, 16384)),
        ("TPU", tpu, (1024, 4096, 16384)),
    ):
        for batch in batches:
            records = of(part, devices=8, batch=batch)
            columns.append((f"{name}, {batch}", records, lambda r: megabytes(r["temp_bytes"])))
    return _table(columns)


def _time(cpu: Record | None) -> str:
    def show(record: Record) -> str:
        median = seconds(record)
        return "" if median is None else number(1000 * median)

    return _table(
        [
            (f"{devices} × CPU, {batch}", of(cpu, devices=devices, batch=batch), show)
            for devices in (1, 8)
            for batch in (256, 1024, 4096, 16384)
        ]
    )


def _kinds(part: Record | None) -> str:
    records = of(part, devices=8, batch=4096)

    def column(kind: str) -> Column:
        def show(record: Record) -> str:
            count, size = record["exchanges"][kind], record["sent_bytes"][kind]
            return f"{megabytes(size)} ({count})" if count else ""

        return kind, records, show

    products = ("products, GFLOP", records, lambda r: number(r["matmul_flops"] / 1e9))
    return _table([*map(column, KINDS), products])


def _made_by(part: Record | None) -> str:
    if part is None:
        return ""
    made = part["provenance"]
    return (
        f"`{part['command']}`, {part['minutes']:.0f} minutes on one core of {made['machine']}, "
        f"shared with other programs; commit {made['commit']}, jax {made['jax']}, "
        f"Python {made['python']}, {made['date']}."
    )


def write(results: dict[str, Any], docs: Path) -> None:
    """Puts the tables between their marks in `docs`, and the plot beside it."""
    write_tables(docs, tables(results))
    plot(results).savefig(docs.with_suffix(".png"), dpi=150)


LINES = (
    ("JSD, roll", "jsd, roll", "#56b4e9", "o", "-", 1.8),
    ("JSD, shuffle", "jsd, shuffle", "#0072b2", "s", "-", 3.8),
    ("JSD, hard or importance, lane", "jsd, hard, lane", "#009e73", "D", "-", 1.8),
    ("JSD, importance, block", "jsd, importance, block", "#cc79a7", "v", "-", 1.8),
    ("InfoNCE, dense", "infonce, all, dense", "#d55e00", "o", "--", 1.8),
    ("InfoNCE, gather", "infonce, all, gather", "#e69f00", "s", "--", 1.8),
    ("InfoNCE, ring", "infonce, all, ring", LIGHT.ink, "D", "--", 1.8),
)
"""Label, case, colour, marker, line and its width; the wide one shows where it is covered."""


def plot(results: dict[str, Any]) -> Figure:
    """Traffic against devices, memory and time against the batch, on logarithmic axes."""
    cpu, tpu = results.get("cpu"), results.get("tpu")
    growing = [
        r
        for r in (tpu or cpu or {"records": []})["records"]
        if r["batch"] == ROWS_PER_DEVICE * r["devices"] and r["devices"] > 1
    ]
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _panel(left, growing, "devices", lambda r: sent(r) / 1e6)
    _panel(middle, of(cpu, devices=8), "batch", lambda r: r["temp_bytes"] / 1e6)
    _panel(right, of(cpu, devices=1), "batch", lambda r: 1000 * (seconds(r) or float("nan")))
    kind = "TPU v5e" if tpu else "CPU"
    _label(left, f"{kind} devices, {ROWS_PER_DEVICE} pairs each", "MB sent by each device")
    _label(middle, "pairs in the batch, on 8 CPU devices", "MB of temporary memory per device")
    _label(right, "pairs in the batch, on 1 CPU device", "CPU ms for loss and gradient")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=LIGHT.ink
    )
    return figure


def _panel(axes: Axes, records: list[Record], by: str, value: Callable[[Record], float]) -> None:
    for label, case, colour, marker, line, width in LINES:
        mine = sorted((r for r in records if r["case"] == case), key=lambda r: int(r[by]))
        axes.loglog(
            [r[by] for r in mine],
            [value(r) for r in mine],
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=width,
            markersize=5 + width,
            markeredgecolor="white",
            label=label,
        )
    axes.set_xticks(sorted({r[by] for r in records}))


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=LIGHT.muted, fontsize=11)
    axes.set_title(y, color=LIGHT.ink, fontsize=11.5, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.minorticks_off()
    axes.grid(True, color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.muted, labelsize=10, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT.muted)
