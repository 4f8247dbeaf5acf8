"""The figures of a comparison of runs: each a number over the steps, of all groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from clip_lite_jax.apps.report_information import biased_negatives
from clip_lite_jax.apps.report_plots import Plot, Theme, band, binned, logged, plot
from clip_lite_jax.evaluators.retrieval import DIRECTIONS

if TYPE_CHECKING:
    from clip_lite_jax.apps.compare import Group

DRAWN = 6
"""Groups with a colour and a mark of their own; further ones are in the tables alone."""
MARKS = "osD^vP"
STYLES = ("-", "--", "-.", ":", "-", "--")


def overlays(groups: Sequence["Group"]) -> list[Plot]:
    """Loss where it is the same thing, R@10 of every gallery, and information."""
    drawn = groups[:DRAWN]
    plots = [_loss(drawn)] if _same_loss(drawn) else []
    keys = dict.fromkeys(key for g in drawn for run in g.runs for line in run.lines for key in line)
    suffix = f"/{DIRECTIONS[0]}_r10"
    galleries = [k.removesuffix(suffix) for k in keys if k.endswith(suffix)]
    for gallery in (name for name in galleries if name.startswith("retrieval/")):
        for direction in DIRECTIONS:
            title = gallery.removeprefix("retrieval/").replace("_", " ")
            title += f", {direction.replace('_to_', ' → ')}"
            caption = "Validation R@10: the right answer is among the first 10."
            key = f"{gallery}/{direction}_r10"
            plots.append(_overlay(drawn, key, title, caption, "R@10", floor=0))
    calibrated = any(biased_negatives(group.first.config) for group in drawn)
    start = "calibrated_" if calibrated else ""
    how = ", after scaling and shifting scores on one half of the pairs" if calibrated else ""
    for name, title in (("jsd_lower_bound", "Certified bound"), ("nwj_lower_bound", "NWJ bound")):
        caption = f"A lower bound on the information of held-out validation pairs{how}."
        key = f"information/{start}{name}"
        plots.append(_overlay(drawn, key, title, caption, "nats", lowest=-0.5))
    return [p for p in plots if p is not None]


def _same_loss(groups: Sequence["Group"]) -> bool:
    """Training losses of other objectives, negatives or batches are not one thing."""
    configs = [group.first.config for group in groups]
    return all(
        (c.objective, c.negatives, c.batch_size)
        == (configs[0].objective, configs[0].negatives, configs[0].batch_size)
        for c in configs
    )


def _loss(groups: Sequence["Group"]) -> Plot | None:
    curves: list[Any] = []
    for group in groups:
        found = [c for run in group.runs if (c := binned(run.lines, "loss")) is not None]
        lengths = {len(curve.mean) for curve in found}
        if found and len(lengths) == 1:
            curves.append((group, found[0].step, np.mean([curve.mean for curve in found], axis=0)))
    if not curves:
        return None

    def paint(axes: Axes, theme: Theme) -> None:
        for group, steps, mean in curves:
            number = groups.index(group)
            axes.plot(
                steps, mean, STYLES[number], color=_colours(theme)[number], linewidth=1.8,
                label=group.label,
            )  # fmt: skip

    ends = "; ".join(f"{group.letter} {mean[0]:.3g} to {mean[-1]:.3g}" for group, _, mean in curves)
    objective = groups[0].first.config.objective.name
    caption = f"Training loss of the {objective} objective, averaged over neighbouring steps"
    caption += " and seeds." if any(len(group.runs) > 1 for group in groups) else "."
    return plot("Training loss", caption, f"Loss over steps: {ends}.", "step", "nats", paint)


def _overlay(
    groups: Sequence["Group"],
    key: str,
    title: str,
    caption: str,
    unit: str,
    floor: float | None = None,
    lowest: float | None = None,
) -> Plot | None:
    """`floor` is the lower end of the axis, `lowest` the least it may be."""
    found = [
        (number, *points) for number, group in enumerate(groups) if (points := _points(group, key))
    ]
    if not found:
        return None

    def paint(axes: Axes, theme: Theme) -> None:
        for number, steps, means, deviations in found:
            group, colour = groups[number], _colours(theme)[number]
            style = f"{STYLES[number]}{MARKS[number]}"
            axes.plot(steps, means, style, color=colour, markersize=4.5, label=group.label)
            if deviations is None:
                band(axes, group.first.lines, key, colour)
            else:
                axes.fill_between(
                    steps, means - deviations, means + deviations, color=colour, alpha=0.16,
                    linewidth=0,
                )  # fmt: skip
        if floor is not None:
            axes.set_ylim(bottom=floor)
        elif lowest is not None and axes.get_ylim()[0] < lowest:
            axes.set_ylim(lowest, max(axes.get_ylim()[1], 0.5))

    several = any(deviations is not None for *_, deviations in found)
    banded = any(f"{key}_low" in line for g in groups for line in g.first.lines)
    parts = ["one standard deviation over seeds"] if several else []
    parts += ["the 95 % interval of a single run"] if banded else []
    caption += f" Bands: {' or '.join(parts)}." if parts else ""
    ends = "; ".join(
        f"{groups[number].letter} {means[0]:.3g} to {means[-1]:.3g}"
        for number, _, means, _ in found
    )
    title = title[:1].upper() + title[1:]
    return plot(title, caption, f"{title} over steps: {ends}.", "step", unit, paint)


def _points(group: "Group", key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Steps, means and standard deviations over seeds, at the steps that all of them have."""
    found = [points for run in group.runs if (points := logged(run.lines, key)) is not None]
    if not found:
        return None
    if len(found) == 1:
        return *found[0], None
    values = [dict(zip(steps.tolist(), numbers.tolist(), strict=True)) for steps, numbers in found]
    steps = sorted(set.intersection(*(set(value) for value in values)))
    if not steps:
        return None
    table = np.array([[value[step] for step in steps] for value in values])
    return np.array(steps), table.mean(axis=0), table.std(axis=0, ddof=1)


def _colours(theme: Theme) -> tuple[str, ...]:
    return theme.first, theme.second, theme.third, theme.fourth, theme.ink, theme.muted
