"""The figures of a report: SVG by matplotlib's object API, each for light and for dark paper."""

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_lite_jax.evaluators.information import CHANCE_LOSS

Lines = Sequence[Mapping[str, Any]]
"""The lines of ``metrics.jsonl``."""

BINS = 100
"""Most points that a per-step curve is drawn with."""


@dataclass(frozen=True)
class Theme:
    """Colours of one figure: Okabe and Ito's, darker or lighter where the paper asks for it, told
    apart by everybody."""

    ink: str
    muted: str
    grid: str
    first: str
    second: str
    third: str
    fourth: str


LIGHT = Theme("#1c1c1a", "#5d5b56", "#e3e1db", "#0072b2", "#d55e00", "#00806a", "#a3497f")
DARK = Theme("#e9e7e2", "#aaa79f", "#3b3a37", "#56b4e9", "#e69f00", "#2fc4a0", "#dd94bd")


@dataclass(frozen=True)
class Plot:
    """One figure: data URIs of its two variants, and what stands around them."""

    title: str
    caption: str
    alt: str
    light: str
    dark: str


Paint = Callable[[Axes, Theme], None]


def plot(
    title: str,
    caption: str,
    alt: str,
    x_label: str,
    y_label: str,
    paint: Paint,
    legend_columns: int = 4,
) -> Plot:
    """Draws a figure once for each theme."""
    light, dark = (_draw(t, x_label, y_label, paint, legend_columns) for t in (LIGHT, DARK))
    return Plot(title, caption, alt, light, dark)


def _draw(theme: Theme, x_label: str, y_label: str, paint: Paint, legend_columns: int) -> str:
    # Small on purpose: on a phone it shrinks to 80 %, and 10 pt must stay readable then.
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    paint(axes, theme)
    axes.set_xlabel(x_label, color=theme.muted)
    axes.set_ylabel(y_label, color=theme.muted)
    axes.set_facecolor("none")
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=9.5, length=3)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(  # above the axes, where it cannot hide data
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=legend_columns,
            frameon=False,
            fontsize=9.5,
            labelcolor=theme.ink,
            borderaxespad=0.2,
            columnspacing=1.2,
            handlelength=1.6,
            handletextpad=0.5,
            labelspacing=0.25,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(_shortened(buffer.getvalue())).decode()}"


def _shortened(svg: bytes) -> bytes:
    """With coordinates to a hundredth of a point, of which matplotlib writes a millionth."""
    svg = re.sub(rb' (?:d|x|y)="[^"]*"', lambda found: _DIGITS.sub(rb"\1", found[0]), svg)
    return re.sub(rb"\n\s*", b"\n", svg)


_DIGITS = re.compile(rb"(\.\d\d)\d+")


def bars(
    title: str, caption: str, alt: str, x_label: str, y_label: str, x: np.ndarray, y: np.ndarray
) -> Plot:
    """Heights `y` ``[N]`` at the whole numbers `x` ``[N]``."""

    def paint(axes: Axes, theme: Theme) -> None:
        axes.bar(x, y, width=0.8, color=theme.first)
        axes.locator_params(axis="x", integer=True)

    return plot(title, caption, alt, x_label, y_label, paint)


def curves(lines: Lines, objective: str, hard: bool) -> list[Plot]:
    """Loss, scores, accuracy, temperature and retrieval over the steps; empty ones are left out."""
    if not lines:
        return []
    smoothing = _smoothing(lines)
    plots = [
        _loss(lines, objective, hard, smoothing),
        _scores(lines, smoothing),
        _accuracy(lines, smoothing),
        _temperature(lines),
    ]
    return [p for p in plots if p is not None] + _recalls(lines)


def _loss(lines: Lines, objective: str, hard: bool, smoothing: str) -> Plot | None:
    training = binned(lines, "loss")
    if training is None:
        return None
    jsd = objective == "jsd"
    held = "information/jsd_loss"
    held_out = logged(lines, held) if jsd else None
    caption = f"Training loss of the {objective} objective. {smoothing}"
    if held_out is not None:
        words = _band_words(lines, held)
        caption += f" Circles: held-out pairs against all their shufflings{words}."
    calibrated = logged(lines, "information/calibrated_jsd_loss") if jsd and hard else None
    if held_out is not None and hard:
        caption += (
            " Training draws hard negatives and the held-out loss random ones, so the two curves "
            "do not measure the same thing."
        )
    if calibrated is not None:
        caption += (
            " Diamonds: held out after the scores were scaled and shifted, as fits best on one "
            "half of the pairs, and read on the other; below chance, the scores know something."
        )
    if jsd:
        caption += " The dotted line, 2 log 2, is the loss of a critic that always says 0."

    def paint(axes: Axes, theme: Theme) -> None:
        _curve(axes, training, theme.first, "training")
        if held_out is not None:
            band(axes, lines, held, theme.second)
            _dots(axes, held_out, theme.second, "held out")
        if calibrated is not None:
            band(axes, lines, "information/calibrated_jsd_loss", theme.muted)
            axes.plot(*calibrated, "D", color=theme.ink, markersize=5, label="calibrated", zorder=3)
        if jsd:
            # Four entries need a short one to fit above the axes.
            label = "chance, 2 log 2" if calibrated is None else "2 log 2"
            _chance(axes, CHANCE_LOSS, theme, label)

    alt = f"Training loss over steps: {_from_to(training.mean)}."
    if held_out is not None:
        alt += f" Held-out loss: {_from_to(held_out[1])}, chance {CHANCE_LOSS:.2f}."
    if calibrated is not None:
        alt += f" After calibration: {_from_to(calibrated[1])}."
    return plot("Loss", caption, alt, "step", "nats", paint)


def _scores(lines: Lines, smoothing: str) -> Plot | None:
    matched, shuffled = binned(lines, "score_positive"), binned(lines, "score_negative")
    if matched is None or shuffled is None:
        return None
    held_out = [logged(lines, f"information/score_{side}") for side in ("positive", "negative")]

    def paint(axes: Axes, theme: Theme) -> None:
        _curve(axes, matched, theme.first, "pairs, $E_P[T]$")
        _curve(axes, shuffled, theme.second, "negatives, $E_Q[T]$", "--")
        for points, colour in zip(held_out, (theme.first, theme.second), strict=True):
            if points is not None:
                _dots(axes, points, colour)
        band(axes, lines, "information/score_positive", theme.first)

    alt = (
        f"Mean critic score over steps. Pairs: {_from_to(matched.mean)}. "
        f"Negatives: {_from_to(shuffled.mean)}."
    )
    words = _band_words(lines, "information/score_positive")
    caption = (
        "Mean score T of the pairs (solid) and of their negatives (dashed) in training; circles "
        f"are held-out pairs{words} and shufflings. {smoothing}"
    )
    return plot("Critic scores", caption, alt, "step", "T, nats", paint)


def _accuracy(lines: Lines, smoothing: str) -> Plot | None:
    training = binned(lines, "critic_accuracy")
    if training is None:
        return None
    held_out = logged(lines, "information/critic_accuracy")

    def paint(axes: Axes, theme: Theme) -> None:
        _curve(axes, training, theme.first, "training")
        if held_out is not None:
            _dots(axes, held_out, theme.second, "held out")
        _chance(axes, 0.5, theme, "chance")

    caption = (
        "Share of pairs with T > 0 and of negatives with T < 0, averaged; circles are held out. "
        f"{smoothing}"
    )
    alt = f"Accuracy of the critic in training: {_from_to(training.mean)}, chance 0.50."
    return plot("Telling pairs from negatives", caption, alt, "step", "balanced accuracy", paint)


def _temperature(lines: Lines) -> Plot | None:
    series = logged(lines, "temperature")
    if series is None:
        return None

    def paint(axes: Axes, theme: Theme) -> None:
        axes.plot(*series, color=theme.first, linewidth=1.8)

    caption = "The learned temperature that divides the similarity inside T. Not smoothed."
    alt = f"Temperature over steps: {_from_to(series[1])}."
    return plot("Temperature", caption, alt, "step", "temperature", paint)


def _recalls(lines: Lines) -> list[Plot]:
    """Validation R@10 of every gallery."""
    suffix = "/text_to_image_r10"
    names = (k.removesuffix(suffix) for line in lines for k in line if k.endswith(suffix))
    # Tasks say in their own tables how well they went.
    galleries = dict.fromkeys(name for name in names if name.startswith("retrieval/"))
    return [_recall(lines, gallery) for gallery in galleries]


def _recall(lines: Lines, gallery: str) -> Plot:
    series = {}
    for direction in ("text_to_image", "image_to_text"):
        points = logged(lines, f"{gallery}/{direction}_r10")
        chance = logged(lines, f"{gallery}/{direction}_r10_chance")
        assert points is not None
        assert chance is not None  # written together
        series[direction.replace("_to_", " → ")] = points, float(chance[1][-1])

    def paint(axes: Axes, theme: Theme) -> None:
        styles = zip(series.items(), (theme.first, theme.second), ("-", "--"), strict=True)
        for (name, (points, _)), colour, style in styles:
            axes.plot(*points, style, marker="o", color=colour, markersize=4.5, label=name)
            way = name.replace(" → ", "_to_")
            band(axes, lines, f"{gallery}/{way}_r10", colour)
        levels = [chance for _, chance in series.values()]
        if len(set(levels)) == 1:
            _chance(axes, levels[0], theme, "chance")
        else:  # several captions of a picture make its search easier than theirs
            for chance, colour in zip(levels, (theme.first, theme.second), strict=True):
                axes.axhline(chance, color=colour, linestyle=":", linewidth=1.4)
        axes.set_ylim(bottom=0)

    title = f"Validation R@10, {gallery.removeprefix('retrieval/').replace('_', ' ')}"
    changes = "; ".join(f"{name} {_from_to(points[1])}" for name, (points, _) in series.items())
    caption = (
        "Share of queries whose right answer is among the first 10, on the validation split"
        f"{_band_words(lines, f'{gallery}/text_to_image_r10')}."
    )
    if len({chance for _, chance in series.values()}) > 1:
        caption += " Dotted lines: chance, in the colour of its direction."
    chances = " and ".join(f"{chance:.3f}" for _, chance in series.values())
    alt = f"R@10 over steps: {changes}; chance {chances}."
    return plot(title, caption, alt, "step", "R@10", paint)


def histogram(matched: np.ndarray, shuffled: np.ndarray) -> Plot:
    """Densities of the scores of matched ``[N]`` and shuffled ``[M]`` held-out pairs."""
    both = np.concatenate([matched, shuffled])
    edges = np.linspace(both.min(), both.max() + 1e-6, 61)  # one constant score has a bin, too

    def paint(axes: Axes, theme: Theme) -> None:
        for scores, colour, label, hatch in (
            (shuffled, theme.second, "shuffled", "///"),
            (matched, theme.first, "matched", None),
        ):
            heights = np.histogram(scores, edges, density=True)[0]
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.25, hatch=hatch)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, label=label)
        axes.axvline(0, color=theme.ink, linewidth=1.2, linestyle=":", label="T = 0")

    alt = (
        f"Histogram of critic scores. Matched pairs: mean {matched.mean():.2f}, standard deviation "
        f"{matched.std():.2f}. Shuffled pairs: mean {shuffled.mean():.2f}, standard deviation "
        f"{shuffled.std():.2f}."
    )
    return plot("Scores of held-out pairs", "", alt, "critic score T, nats", "density", paint)


Points = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Binned:
    """Means over windows of consecutive logged steps, and the spread within a window."""

    step: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def logged(lines: Lines, key: str) -> Points | None:
    """(steps, values) of the lines that have a finite number under `key`."""
    found = [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
    return (np.array([s for s, _ in found]), np.array([v for _, v in found])) if found else None


def _window(count: int) -> int:
    return math.ceil(count / BINS)


def binned(lines: Lines, key: str) -> Binned | None:
    points = logged(lines, key)
    if points is None:
        return None
    steps, values = points
    starts = range(0, len(steps), _window(len(steps)))
    groups = [slice(start, start + _window(len(steps))) for start in starts]
    return Binned(
        step=np.array([steps[group].mean() for group in groups]),
        mean=np.array([values[group].mean() for group in groups]),
        deviation=np.array([values[group].std() for group in groups]),
    )


def _smoothing(lines: Lines) -> str:
    window = _window(sum("loss" in line for line in lines))
    if window <= 1:
        return "Not smoothed."
    return (
        f"Each point is the mean of {window} consecutive logged steps, the band one standard "
        "deviation to either side."
    )


def _curve(axes: Axes, curve: Binned, colour: str, label: str, style: str = "-") -> None:
    low, high = curve.mean - curve.deviation, curve.mean + curve.deviation
    axes.fill_between(curve.step, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(curve.step, curve.mean, style, color=colour, linewidth=1.8, label=label)


def _dots(axes: Axes, points: Points, colour: str, label: str | None = None) -> None:
    axes.plot(*points, "o", color=colour, markersize=6, label=label, zorder=3)


def band(axes: Axes, lines: Lines, key: str, colour: str) -> None:
    """The 95 % interval where the log has ``KEY_low`` and ``KEY_high``."""
    found = _between(lines, key)
    if len(found) == 1:
        step, low, high = found[0]
        axes.vlines(step, low, high, color=colour, linewidth=1.6)
    elif found:
        axes.fill_between(*np.array(found).T, color=colour, alpha=0.16, linewidth=0)


def _between(lines: Lines, key: str) -> list[tuple[float, float, float]]:
    """Steps and both ends of the intervals."""
    ends = f"{key}_low", f"{key}_high"
    return [
        (line["step"], line[ends[0]], line[ends[1]])
        for line in lines
        if all(math.isfinite(line.get(end, math.nan)) for end in ends)
    ]


def _band_words(lines: Lines, key: str) -> str:
    return ", with their 95 % intervals as a band" if _between(lines, key) else ""


def _chance(axes: Axes, value: float, theme: Theme, label: str) -> None:
    axes.axhline(value, color=theme.ink, linestyle=":", linewidth=1.4, label=label)


def _from_to(values: np.ndarray) -> str:
    return f"from {values[0]:.3g} to {values[-1]:.3g}"
