"""Tables and the figure of `benchmarks.scaling`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.objectives_report import number
from benchmarks.pages import table as markdown_table
from benchmarks.pages import write_tables
from clip_lite_jax.apps.report_plots import LIGHT

DOCS = Path(__file__).parent.parent / "docs" / "scaling.md"

OURS = "jsd, shuffle, 8 devices"
"""What the others are compared with."""
THEIRS = ("infonce, gather", "infonce, ring")

Record = dict[str, Any]
Value = Callable[[Record], float | None]


def of(part: Record | None, **wanted: Any) -> list[Record]:
    """The records with these values, by the number of devices."""
    records = part["records"] if part else []
    found = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda r: int(r["devices"]))


def sent(record: Record) -> float | None:
    """Bytes that leave a device, all collectives together."""
    kinds = record.get("sent_bytes")
    return None if kinds is None else float(sum(kinds.values()))


def held(record: Record) -> float | None:
    """Bytes of temporaries of a device, or all that a program needs that does not fit."""
    return record.get("temp_bytes", record.get("refused_bytes"))


def size(value: float) -> str:
    """Bytes with their unit, three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{number(value / scale)} {unit}"
    return f"{value:.0f} B"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the docs by name, as Markdown."""
    found = {"ratios": _ratios(results), "step": _step(results), "made by": _made_by(results)}
    for name in ("tpu", "cpu"):
        losses = of(results.get(name), what="loss")
        found[f"sent, {name}"] = _by_method(losses, sent, exchanges=True)
        found[f"held, {name}"] = _by_method(losses, held)
    return {name: table for name, table in found.items() if table}


def _table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    return markdown_table([heading, ["---"] + ["---:"] * (len(heading) - 1), *rows])


def _by_method(records: list[Record], value: Value, exchanges: bool = False) -> str:
    """One row for each method, one column for each number of devices."""
    if not records:
        return ""
    devices = list(dict.fromkeys(r["devices"] for r in records))
    heading = ["", *map(str, devices)] + (["exchanges"] if exchanges else [])
    rows = []
    for method in _methods(records):
        mine = {r["devices"]: r for r in records if r["method"] == method}
        cells = [_cell(value(mine[n])) if n in mine else "" for n in devices]
        if exchanges:
            last = mine[max(mine)].get("exchanges", {})
            cells.append(f"{sum(last.values()):,}")
        rows.append([method, *cells])
    return _table(heading, rows)


def _methods(records: list[Record]) -> list[str]:
    """Those of one negative first."""
    found = dict.fromkeys(r["method"] for r in records)
    return sorted(found, key=lambda method: not method.startswith("jsd"))


def _cell(value: float | None) -> str:
    return "" if value is None else size(value)


def _ratios(results: dict[str, Any]) -> str:
    """How many times `OURS` the others send and hold, for the loss alone."""
    columns: dict[int, list[str]] = {}
    names = []
    for target in ("tpu", "cpu"):
        for what, value in (("sent", sent), ("held", held)):
            ours = {r["devices"]: value(r) for r in _losses(results, target, OURS)}
            for method in THEIRS:
                theirs = {r["devices"]: value(r) for r in _losses(results, target, method)}
                names.append(f"{what}, {method}, {target.upper()}")
                for n in sorted(ours.keys() | theirs.keys() | columns.keys()):
                    one, other = theirs.get(n), ours.get(n)
                    times = number(one / other) if one and other else ""
                    columns.setdefault(n, [""] * (len(names) - 1)).append(times)
    rows = [[name, *(columns[n][row] for n in sorted(columns))] for row, name in enumerate(names)]
    return _table(["", *map(str, sorted(columns))], rows) if columns else ""


def _losses(results: dict[str, Any], target: str, method: str) -> list[Record]:
    return of(results.get(target), what="loss", method=method)


def gradients(part: Record | None, devices: int) -> float | None:
    """Bytes of a step that every data-parallel training sends, with so many devices.

    Sums over all devices, nearly all of them of gradients: `OURS` sends nothing else by all-reduce.
    """
    steps = of(part, what="step", method=OURS, devices=devices)
    return float(steps[0]["sent_bytes"]["all-reduce"]) if steps else None


def of_the_loss(part: Record | None, record: Record) -> float | None:
    """Bytes of a step that its negatives add."""
    everything, shared = sent(record), gradients(part, record["devices"])
    return None if everything is None or shared is None else everything - shared


def _step(results: dict[str, Any]) -> str:
    columns = [
        (f"{target.upper()}, {n}", results.get(target), n)
        for target in ("tpu", "cpu")
        for n in dict.fromkeys(r["devices"] for r in of(results.get(target), what="step"))
    ]
    if not columns:
        return ""
    methods = _methods([r for part in results.values() for r in of(part, what="step")])
    rows = [["sent: gradients", *(_cell(gradients(part, n)) for _, part, n in columns)]]
    for name, value in (("sent besides", of_the_loss), ("held", lambda _, record: held(record))):
        for method in methods:
            cells = [
                "".join(_cell(value(part, r)) for r in _steps(part, method, n))
                for _, part, n in columns
            ]
            rows.append([f"{name}: {method}", *cells])
    return _table(["", *(heading for heading, _, _ in columns)], rows)


def _steps(part: Record | None, method: str, devices: int) -> list[Record]:
    return of(part, what="step", method=method, devices=devices)


def _made_by(results: dict[str, Any]) -> str:
    if not results:
        return ""
    made = [part["provenance"] for part in results.values()]
    seconds = [
        (r["devices"], r["compile_cpu_seconds"])
        for part in results.values()
        for r in part["records"]
    ]
    total = sum(spent for _, spent in seconds)
    minutes = sum(part["minutes"] for part in results.values())
    slowest = max((spent, n) for n, spent in seconds)
    command = next(iter(results.values()))["command"]
    commits = ", ".join(dict.fromkeys(m["commit"] for m in made))
    return (
        f"`{command}`: {len(seconds)} programs in {minutes:.0f} minutes, {total / 60:.0f} of them "
        f"on the processor, which others used too; {slowest[0]:.0f} s of it for the slowest, for "
        f"{slowest[1]} devices. {made[0]['machine']}; commit {commits}, jax {made[0]['jax']}, "
        f"Python {made[0]['python']}, {made[-1]['date']}."
    )


def write(results: dict[str, Any], docs: Path) -> None:
    """Puts the tables between their marks in `docs`, and the figure beside it."""
    write_tables(docs, tables(results))
    plot(results).savefig(docs.with_suffix(".png"), dpi=150)


# --- The figure -----------------------------------------------------------------------------------

LINES = (
    ("JSD, roll", "jsd, roll", "#56b4e9", "o"),
    ("JSD, shuffle among 8 devices", OURS, "#0072b2", "s"),
    ("InfoNCE, all-gather", "infonce, gather", "#d55e00", "^"),
    ("InfoNCE, ring", "infonce, ring", "#e69f00", "D"),
)
"""Label, method, colour, marker.  The others lie upon these, or send nothing."""


DECADES = 100
"""The least that an axis spans, as a factor."""


def plot(results: dict[str, Any]) -> Figure:
    """Sent and held against devices, for the loss alone and for whole steps."""
    rows = next((part["rows"] for part in results.values()), {"loss": 0, "step": 0})
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    titles = {
        "loss": f"The loss alone, {rows['loss']:,} pairs on each device",
        "step": f"A whole training step, {rows['step']:,} pairs on each device",
    }
    for (left, right), (what, title) in zip(panels, titles.items(), strict=True):
        for target in ("tpu", "cpu"):
            part = results.get(target)
            for line in LINES:
                _draw(left, part, what, target, line, sent)
                _draw(right, part, what, target, line, held)
            if what == "step":
                _draw_gradients(left, part, target)
        _label(left, title, "sent by each device")
        _label(right, title, "temporary memory of each device")
    _legend(figure)
    return figure


def _draw(
    axes: Axes,
    part: Record | None,
    what: str,
    target: str,
    line: tuple[str, str, str, str],
    value: Value,
) -> None:
    _, method, colour, marker = line
    points = [(r["devices"], value(r)) for r in of(part, what=what, method=method)]
    points = [(n, size) for n, size in points if size]
    axes.loglog(
        [n for n, _ in points],
        [size for _, size in points],
        color=colour,
        marker=marker,
        **_style(target, colour),
    )


def _style(target: str, colour: str) -> dict[str, Any]:
    """TPUs: solid and filled; fake devices: broken and hollow."""
    if target == "tpu":
        return {"linestyle": "-", "linewidth": 2.2, "markersize": 8, "markeredgecolor": "white"}
    return {
        "linestyle": (0, (3, 2)),
        "linewidth": 1.4,
        "markersize": 6,
        "markerfacecolor": "white",
        "markeredgecolor": colour,
    }


def _draw_gradients(axes: Axes, part: Record | None, target: str) -> None:
    steps = of(part, what="step", method=OURS)
    points = [(r["devices"], gradients(part, r["devices"])) for r in steps]
    points = [(n, size) for n, size in points if size]
    style = _style(target, LIGHT.muted) | {"linewidth": 6, "alpha": 0.25, "linestyle": "-"}
    axes.loglog([n for n, _ in points], [size for _, size in points], color=LIGHT.ink, **style)


def _legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, label=label, **_style("tpu", colour))
        for label, _, colour, marker in LINES
    ]
    for label, target in (("TPU v5e", "tpu"), ("fake CPU devices", "cpu")):
        style = _style(target, LIGHT.muted)
        handles.append(Line2D([], [], color=LIGHT.muted, marker="o", label=label, **style))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=3,
        frameon=False,
        labelcolor=LIGHT.ink,
        fontsize=11,
    )


def _label(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, color=LIGHT.ink, fontsize=11.5, loc="left")
    axes.set_xlabel("devices", color=LIGHT.muted, fontsize=11)
    axes.set_ylabel(y, color=LIGHT.muted, fontsize=11)
    axes.set_xlim(0.85, 300)
    low, high = axes.get_ylim()
    if high < DECADES * low:  # or what is flat would look steep
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / DECADES**0.5, middle * DECADES**0.5)
    axes.xaxis.set_major_locator(FixedLocator([2**n for n in range(9)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.muted, labelsize=10, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT.muted)
