"""What held-out scores said about mutual information while a run was trained, as one figure."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from clip_lite_jax.apps.report_plots import Lines, Plot, Theme, band, logged, plot
from clip_lite_jax.config import Config
from clip_lite_jax.objectives import OPTIMAL_CRITIC

FLOOR = -0.5
"""Nats below which nothing is drawn: a bound below 0 says nothing, however far below it is."""

BOUNDS = {
    "jsd_lower_bound": "certified",
    "nwj_lower_bound": "NWJ",
    "infonce_lower_bound": "InfoNCE",
}
CALIBRATED = {
    "calibrated_jsd_lower_bound": "certified, cal.",
    "calibrated_nwj_lower_bound": "NWJ, cal.",
    "infonce_lower_bound": "InfoNCE",
}
"""Those of scores that were scaled and shifted first, see `evaluators.information`."""


def biased_negatives(config: Config) -> bool:
    """Whether negatives are not drawn from the product of the marginals: T has another optimum."""
    negatives = config.negatives
    return negatives.name in ("hard", "queue", "memory") or negatives.pool == "memory"


def information_curves(lines: Lines, config: Config) -> Plot | None:
    """The read-offs over the steps with their 95 % bands; None where nothing was read off."""
    biased = biased_negatives(config)
    names = CALIBRATED if biased else BOUNDS
    found = {name: points for name in names if (points := logged(lines, f"information/{name}"))}
    score = logged(lines, "information/score_positive")
    if not found:
        return None
    if score is not None and score[1].max() < FLOOR:
        score = None
    truth, pairs = (logged(lines, f"information/{key}") for key in ("true_information", "pairs"))
    cap = None if pairs is None else math.log(pairs[1][-1])
    tops = [points[1].max() for points in found.values()]
    tops += [_highest(lines, f"information/{name}", FLOOR) for name in found]
    tops += [] if score is None else [score[1].max()]
    tops += [] if truth is None else [truth[1][-1]]
    top = max(max(tops) * 1.08, 0.5)
    cap_shown = cap is not None and cap < 2 * top

    def paint(axes: Axes, theme: Theme) -> None:
        colours = (theme.first, theme.second, theme.third)
        for (name, points), colour, marker in zip(found.items(), colours, "osD", strict=False):
            band(axes, lines, f"information/{name}", colour)
            axes.plot(*points, f"-{marker}", color=colour, markersize=4.5, label=names[name])
        if score is not None:
            axes.plot(*score, "--", color=theme.fourth, linewidth=1.8, label="mean T, no bound")
        if truth is not None:
            axes.axhline(truth[1][-1], color=theme.ink, linewidth=1.6, label="truth")
        if cap is not None and cap_shown:
            axes.axhline(cap, color=theme.third, linestyle=":", linewidth=1.4, label="log N")
        axes.axhline(0, color=theme.muted, linewidth=0.8)
        axes.set_ylim(FLOOR, max(top, cap * 1.05 if cap is not None and cap_shown else 0))

    ends = "; ".join(f"{names[n]} {p[1][0]:.2f} to {p[1][-1]:.2f}" for n, p in found.items())
    alt = f"Nats of information over steps, from first to last evaluation: {ends}."
    if truth is not None:
        alt += f" The truth is {truth[1][-1]:.2f}."
    caption = _caption(config, biased, found, score is not None, cap, cap_shown, truth is not None)
    return plot("Information over training", caption, alt, "step", "nats", paint, legend_columns=3)


def _caption(
    config: Config,
    biased: bool,
    found: Mapping[str, Any],
    score: bool,
    cap: float | None,
    cap_shown: bool,
    known: bool,
) -> str:
    words = ["Read off held-out validation pairs and all their shufflings, with 95 % bands."]
    if biased:
        words.append(
            "Solid lines are lower bounds on the information, for any critic. Training drew "
            f"{'hard' if config.negatives.name == 'hard' else 'remembered'} negatives, which "
            "shifts and stretches T: cal. means scaled and shifted first, as fits best on one half "
            "of the pairs, and read on the other."
        )
    else:
        words.append("Solid lines are lower bounds on the information, for any critic.")
    words.append(
        "They hold in expectation; one below 0 proves nothing, and what is below the axis is not "
        "drawn."
    )
    optimum = OPTIMAL_CRITIC[config.objective.name]
    which = "The dashed mean score of the pairs" if score else "The mean score, below this figure,"
    if optimum == "log r" and not biased:
        words.append(
            f"{which} is no bound: it tends to the information only as T tends to its optimum, "
            "log r."
        )
    else:
        why = "with such negatives the optimum of T is not log r"
        why = why if biased else f"the optimum of T is {optimum}"
        words.append(f"{which} is no bound and no estimate: {why}.")
    if cap is not None and "infonce_lower_bound" in found:
        words.append(
            f"InfoNCE can never read above log N = {cap:.2f}"
            + (", the dotted line." if cap_shown else ", far above this figure.")
        )
    if known:
        words.append("The level line is the exact value, which the source of these pairs knows.")
    return " ".join(words)


def _highest(lines: Lines, key: str, otherwise: float) -> float:
    points = logged(lines, f"{key}_high")
    return otherwise if points is None else float(np.max(points[1]))
