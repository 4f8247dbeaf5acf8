"""Tables and the figure of `wrong_captions`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.pages import table

STATISTIC = "T"


def markdown(results: dict[str, Any]) -> str:
    """All tables, with what made them."""
    plan, made = results["plan"], results["provenance"]
    lines = [
        f"`{results['command']}`, {made['machine']}, {made['date']}, commit {made['commit']}: "
        f"{len(plan['seeds'])} seeds a row, {plan['draws']} exchanges of {plan['share']:.0%} of "
        f"the captions, the same for every row; {_seconds(results):.0f} s of training in all.",
    ]
    galleries = list(results["rows"][0]["galleries"])
    for gallery in galleries:
        lines += ["", f"AUROC, {gallery} [95 % interval over groups and seeds]:", ""]
        lines.append(table(_aurocs(results, gallery)))
    for gallery in galleries:
        lines += ["", f"Differences of the AUROC of T, {gallery}, row less column:", ""]
        lines.append(table(_differences(results, gallery)))
    lines += ["", "Calibration, mean over seeds, before → after:", ""]
    lines.append(table(_calibrations(results)))
    return "\n".join(lines)


def _seconds(results: dict[str, Any]) -> float:
    return sum(sum(row["seconds"]) for row in results["rows"])


def _found(results: dict[str, Any], a: str, b: str | None, gallery: str, kind: str) -> Any:
    key = {"a": a, "b": b, "gallery": gallery, "statistic": kind}
    return next(c for c in results["compared"] if key.items() <= c.items())


def _aurocs(results: dict[str, Any], gallery: str) -> Iterator[list[str]]:
    kinds = list(results["rows"][0]["galleries"][gallery]["auroc"])
    yield ["trained with", "learning rate ×", *(f"by {kind}" for kind in kinds)]
    yield ["---"] * (len(kinds) + 2)
    for row in results["rows"]:
        cells = [_found(results, row["name"], None, gallery, kind) for kind in kinds]
        shown = [f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells]
        yield [row["label"], f"{row['factor']:g}", *shown]


def _differences(results: dict[str, Any], gallery: str) -> Iterator[list[str]]:
    rows = results["rows"]
    yield ["", *(row["label"] for row in rows[1:])]
    yield ["---"] * len(rows)
    for i, a in enumerate(rows[:-1]):
        cells = [""] * i
        for b in rows[i + 1 :]:
            c = _found(results, a["name"], b["name"], gallery, STATISTIC)
            cells.append(f"{c['value']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]")
        yield [a["label"], *cells]


def _calibrations(results: dict[str, Any]) -> Iterator[list[str]]:
    heads = ["ECE", "ECE, equal mass", "Brier", "log loss"]
    yield ["trained with", "gallery", "scale", "shift", *heads, "ECE after, seeds"]
    yield ["---"] * 9
    for row in results["rows"]:
        for gallery, found in row["galleries"].items():
            each = found["calibration"]
            cells = []
            for name in ("ece", "ece_equal_mass", "brier", "log_loss"):
                before, after = (np.mean([c[when][name] for c in each]) for when in _WHEN)
                cells.append(f"{before:.3f} → {after:.3f}")
            errors = [c["after"]["ece"] for c in each]
            fitted = [f"{np.mean([c[name] for c in each]):.2f}" for name in ("scale", "shift")]
            spread = f"{min(errors):.3f} to {max(errors):.3f}"
            yield [row["label"], gallery, *fitted, *cells, spread]


_WHEN = ("before", "after")


def plot(results: dict[str, Any], path: Path) -> None:
    """Reliability of the first seed of every row, before and after calibration."""
    rows = results["rows"]
    galleries = list(rows[0]["galleries"])
    figure = Figure(figsize=(2.6 * len(rows), 2.7 * len(galleries)), layout="constrained")
    axes = figure.subplots(len(galleries), len(rows), squeeze=False, sharex=True, sharey=True)
    for line, gallery in zip(axes, galleries, strict=True):
        for ax, row in zip(line, rows, strict=True):
            points = row["galleries"][gallery]["calibration"][0]["points"]
            ax.plot([0, 1], [0, 1], ":", color="#5d5b56", linewidth=1)
            for when, style in zip(_WHEN, ("o--", "s-"), strict=True):
                x, y = ([p[key] for p in points[when]] for key in ("predicted", "observed"))
                colour = {"before": "#d55e00", "after": "#0072b2"}[when]
                ax.plot(x, y, style, color=colour, markersize=3.5, linewidth=1.2, label=when)
            ax.set_title(f"{row['label']}\n{gallery}", fontsize=8)
            ax.tick_params(labelsize=8)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.supxlabel("σ(scale · T + shift)", fontsize=9)
    figure.supylabel("share of pairs that are real", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
