"""The plots of docs/mathematics.md: ``python -m tools.build_plots`` (into docs/mathematics).

Pairs (x, y) are correlated standard normals of 20 dimensions.  Their density ratio r = dP/dQ is
known, and so are the information I and how far a critic T is from log r.  All losses are
`objectives`, all read-offs `evaluators.information`: what training and evaluation use.
"""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_lite_jax.evaluators.information import certified_bound, infonce_read_offs, read_offs
from clip_lite_jax.objectives import Scores, build_objective

DIMENSIONS = 20
BLUE, ORANGE, GREEN, GREY = "#3366cc", "#dd7711", "#22884f", "#777777"


def correlation(information: float) -> float:
    """The correlation of each dimension at which the pairs share `information` nats."""
    return math.sqrt(1 - math.exp(-2 * information / DIMENSIONS))


def log_ratios(rng: np.random.Generator, pairs: int, information: float) -> np.ndarray:
    """log r ``[N, N]`` of x_i with y_j; the diagonal holds draws from P, the rest from Q."""
    rho = correlation(information)
    x = rng.standard_normal((pairs, DIMENSIONS))
    y = rho * x + math.sqrt(1 - rho**2) * rng.standard_normal((pairs, DIMENSIONS))
    spread = 2 * (1 - rho**2)
    squares = (rho**2) * (np.sum(x**2, 1)[:, None] + np.sum(y**2, 1)[None, :])
    return information + (2 * rho * (x @ y.T) - squares) / spread


def scores_of(positive: np.ndarray, negative: np.ndarray) -> Scores:
    """Scores of pairs ``[B]`` and of their negatives ``[B, K]``, on one side."""
    candidates = jnp.asarray(negative)[None]
    return Scores(
        positive=jnp.asarray(positive),
        negative=candidates,
        valid=jnp.ones_like(candidates, bool),
        log_weight=jnp.zeros_like(candidates),
    )


def others(matrix: np.ndarray, count: int) -> np.ndarray:
    """Of scores ``[N, N]`` those with the `count` next partners, ``[N, count]``."""
    rows = np.arange(len(matrix))[:, None]
    return matrix[rows, (rows + 1 + np.arange(count)) % len(matrix)]


def plot_bounds(rng: np.random.Generator) -> Figure:
    """Read-offs of the best critic over the true information, from 128 pairs, 50 times each."""
    pairs, times, truths = 128, 50, range(1, 11)
    names = ("jsd_lower_bound", "nwj_lower_bound", "infonce_lower_bound")
    drawn: dict[str, list[list[float]]] = {name: [] for name in names}
    for truth in truths:
        values: dict[str, list[float]] = {name: [] for name in drawn}
        for _ in range(times):
            matrix = log_ratios(rng, pairs, truth)
            own = np.diagonal(matrix)
            found = read_offs(own, others(matrix, pairs - 1).ravel()) | infonce_read_offs(matrix)
            for name in drawn:
                values[name].append(found[name])
        for name, found_all in drawn.items():
            found_all.append(values[name])
    figure, axes = _axes("true information, nats", "read off 128 pairs, nats")
    axes.plot(truths, truths, color=GREY, linestyle="--", label="the truth")
    axes.axhline(math.log(pairs), color=GREY, linewidth=0.8, linestyle=":")
    axes.text(1, math.log(pairs) + 0.15, "log 128: InfoNCE reads no more", color=GREY, fontsize=9)
    looks = {
        "jsd_lower_bound": (BLUE, "JSD, certified"),
        "nwj_lower_bound": (ORANGE, "NWJ"),
        "infonce_lower_bound": (GREEN, "InfoNCE"),
    }
    for name, (colour, label) in looks.items():
        low, middle, high = np.quantile(np.array(drawn[name]), (0.05, 0.5, 0.95), axis=1)
        axes.plot(truths, middle, color=colour, label=label)
        axes.fill_between(truths, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_ylim(-2, 12)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.93))
    return figure


def plot_one_negative(rng: np.random.Generator) -> Figure:
    """The loss of the best critic by negatives per pair: its mean, and the spread of a batch."""
    counts, batch, times, truth = [2**power for power in range(8)], 128, 100, 4.0
    figure, (left, right) = _two_axes("negatives per pair")
    for axes, name, colour in ((left, "jsd", BLUE), (right, "infonce", GREEN)):
        loss = jax.jit(build_objective(name))
        found: list[list[float]] = [[] for _ in counts]
        for _ in range(times):
            matrix = log_ratios(rng, batch, truth)
            for place, count in enumerate(counts):
                scores = scores_of(np.diagonal(matrix), others(matrix, min(count, batch - 1)))
                found[place].append(float(loss(scores)[0]))
        values = np.array(found)
        low, high = np.quantile(values, (0.05, 0.95), axis=1)
        axes.plot(counts, values.mean(axis=1), color=colour, marker="o", markersize=4)
        axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(min(count, batch - 1)) for count in counts])
        axes.set_ylim(0, None)
    left.set_title("JSD: the mean stays", fontsize=11)
    right.set_title("InfoNCE: another loss for each number", fontsize=11)
    left.set_ylabel("loss of the best critic, nats")
    return figure


def plot_critic(rng: np.random.Generator) -> Figure:
    """Losses of T = log r + c over the shift c, each less its least value: where the best T is."""
    matrix = log_ratios(rng, 512, 2.0)
    shifts = np.linspace(-2, 3, 51)
    figure, axes = _axes("T − log r, nats", "loss above its least, nats")
    names = {"jsd": BLUE, "nwj": ORANGE, "infonce": GREEN}
    labels = {"jsd": "JSD: T = log r", "nwj": "NWJ: T = 1 + log r", "infonce": "InfoNCE: any shift"}
    for name, colour in names.items():
        loss = jax.jit(build_objective(name))
        shifted = (matrix + shift for shift in shifts)
        values = np.array(
            [float(loss(scores_of(np.diagonal(t), others(t, 511)))[0]) for t in shifted]
        )
        axes.plot(shifts, values - values.min(), color=colour, label=labels[name])
    axes.set_ylim(-0.02, 1)
    axes.legend(frameon=False)
    return figure


def plot_certified() -> Figure:
    """`certified_bound` over the JSD loss, and what the best critic on Gaussians reaches."""
    losses = np.linspace(0.005, 2 * math.log(2), 400)
    figure, axes = _axes("JSD loss, nats", "information, nats")
    bounds = [certified_bound(float(loss)) for loss in losses]
    axes.plot(losses, bounds, color=BLUE, label="certified: at least this")
    axes.fill_between(losses, bounds, color=BLUE, alpha=0.1, linewidth=0)
    truths = range(1, 11)
    rng = np.random.default_rng(0)
    reached = []
    for truth in truths:
        matrix = log_ratios(rng, 2048, truth)
        reached.append(read_offs(np.diagonal(matrix), others(matrix, 64).ravel())["jsd_loss"])
    axes.plot(
        reached,
        truths,
        color=ORANGE,
        marker="o",
        markersize=4,
        label="the best critic on Gaussians",
    )
    axes.axvline(2 * math.log(2), color=GREY, linewidth=0.8, linestyle=":")
    axes.text(
        1.37, 9.4, "2 log 2: a critic\nthat knows nothing", color=GREY, fontsize=9, ha="right"
    )
    axes.set_ylim(0, 10.5)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.25, 0.75))
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _two_axes(x: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_xlabel(x)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, (left, right)


PLOTS: Mapping[str, Callable[[], Figure]] = {
    "bounds": lambda: plot_bounds(np.random.default_rng(0)),
    "one_negative": lambda: plot_one_negative(np.random.default_rng(1)),
    "critic": lambda: plot_critic(np.random.default_rng(2)),
    "certified": plot_certified,
}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/mathematics")
    folder.mkdir(parents=True, exist_ok=True)
    # Equal plots make equal files, whatever fonts there are.
    mpl.rcParams.update({"svg.hashsalt": "clip_lite_jax", "svg.fonttype": "path", "font.size": 11})
    for name, plot in PLOTS.items():
        plot().savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
