"""Where held-out images and captions lie: the two directions in which their embeddings differ most.

Source: Pearson (1901), principal components; the gap between the two kinds of embeddings: Liang et
al. (arXiv 2203.02053).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from clip_lite_jax.apps.report_gallery import order_by_hash, shorten
from clip_lite_jax.apps.report_plots import DARK, Plot, Theme, plot
from clip_lite_jax.apps.report_tables import category_names
from clip_lite_jax.evaluators.retrieval import Retrieval
from clip_lite_jax.vectors import unit

DRAWN = 150
"""Pairs in the figures; numbers are of all.  Each is four marks in the file, two for each paper."""
NAMED = 8
"""Kinds with a colour and a shape of their own; the rest is grey."""
SHAPES = ("o", "s", "^", "D", "v", "P", "p", "h")

# Okabe and Ito's eight but for black, which is a ninth kind's ink, and yellow on white paper.
LIGHT_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#a3497f", "#b58900", "#3a9bd9", "#6b4ba1", "#7a5230",
)  # fmt: skip
DARK_COLOURS = (
    "#56b4e9", "#e69f00", "#2fc4a0", "#dd94bd", "#f0e442", "#8fd0ff", "#b79cf0", "#d0a17a",
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingMap:
    """Two figures and the numbers that go with them."""

    pairs: int
    drawn: int
    gap: float
    """Distance of the two means of unit vectors; 0 to 2."""
    spread: tuple[float, float]
    """Root mean square distance of image and text embeddings from their own mean."""
    matched: float
    """Mean cosine of the pairs."""
    shuffled: float
    """Mean cosine of an image with the caption of another."""
    plots: list[Plot]
    kinds: str
    """What colours tell apart, or nothing."""


def embedding_map(
    retrieval: Retrieval, images: np.ndarray, texts: np.ndarray
) -> EmbeddingMap | None:
    """The map of a gallery's images ``[N, D]`` and texts ``[M, D]``, as the critic takes them.

    An image stands with its first caption, or with the mean of all that were embedded for it.  None
    where the two are not vectors of one space, or fewer than three pairs.
    """
    count = len(images)
    if count < 3 or images.ndim != 2 or images.shape[1:] != texts.shape[1:]:
        return None
    images, texts = unit(images, np.float64), unit(texts, np.float64)
    if retrieval.averaged is not None:
        starts = np.cumsum(retrieval.averaged) - retrieval.averaged
        texts = unit(np.add.reduceat(texts, starts, axis=0))
    else:
        texts = texts[np.searchsorted(retrieval.owner, np.arange(count))]
    names, kinds = kinds_of(retrieval)
    ids = [example.id for example in retrieval.examples]
    chosen = np.array(order_by_hash(ids)[:DRAWN])
    products = images @ texts.T
    means = images.mean(axis=0), texts.mean(axis=0)
    centred = images - means[0], texts - means[1]
    title = "Embeddings, as they are", "Embeddings, each kind about its own mean"
    return EmbeddingMap(
        pairs=count,
        drawn=len(chosen),
        gap=float(np.linalg.norm(means[0] - means[1])),
        spread=tuple(float(np.sqrt(np.mean(np.sum(x**2, axis=1)))) for x in centred),  # type: ignore[arg-type]
        matched=float(np.mean(np.diagonal(products))),
        shuffled=float((products.sum() - np.trace(products)) / (count * (count - 1))),
        plots=[
            _figure(title[0], images, texts, chosen, names),
            _figure(title[1], *centred, chosen, names),
        ],
        kinds=kinds,
    )


def principal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two components ``[N, 2]`` of vectors ``[N, D]`` about their mean, and the share of
    the variance of each ``[2]``."""
    left, sizes, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    shares = sizes**2 / max(float(np.sum(sizes**2)), 1e-12)
    points = (left * sizes)[:, :2]
    if points.shape[1] < 2:  # embeddings of one number
        points, shares = np.pad(points, ((0, 0), (0, 1))), np.pad(shares, (0, 1))
    signs = np.where(np.sum(points**3, axis=0) < 0, -1, 1)  # else a coin of the SVD would turn it
    return points * signs, shares[:2]


def kinds_of(retrieval: Retrieval) -> tuple[np.ndarray, str]:
    """The kind of each image ``[N]``, empty beyond the `NAMED` most frequent ones, and what it is.

    Kinds are the attribute ``category``, else groups of more than one image.
    """
    values = category_names(retrieval)
    counts = Counter(value for value in values if value)
    frequent = [name for name, times in counts.most_common(NAMED) if times > 1]
    if len(frequent) < 2:
        return np.array([""] * len(values)), ""
    what = "category" if "category" in retrieval.examples[0].attributes else "group"
    return np.array([value if value in frequent else "" for value in values]), what


def _figure(
    title: str, images: np.ndarray, texts: np.ndarray, chosen: np.ndarray, names: np.ndarray
) -> Plot:
    count = len(images)
    points, shares = principal(np.concatenate([images, texts]))
    image_points, text_points = points[:count][chosen], points[count:][chosen]
    kinds = names[chosen]
    order = [name for name, _ in Counter(names[names != ""].tolist()).most_common()]

    def paint(axes: Axes, theme: Theme) -> None:
        colours = DARK_COLOURS if theme is DARK else LIGHT_COLOURS
        styles: Sequence[tuple[str, str, str]] = [
            ("", theme.muted, "." if order else "o"),
            *zip(order, colours, SHAPES, strict=False),
        ]
        for name, colour, shape in styles:
            rows = kinds == name
            if not rows.any():
                continue
            label = shorten(name, 22) if name else ("other" if order else "image")
            size = 5.0 if shape != "." else 6.0
            axes.plot(
                *image_points[rows].T, shape, color=colour, markersize=size,
                markeredgewidth=0, label=label,
            )  # fmt: skip
            axes.plot(
                *text_points[rows].T, "x", color=colour, markersize=4.5,
                label=None if order else "caption",
            )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")

    first, second = (f"{100 * share:.0f} %" for share in shares)
    alt = (
        f"Scatter plot of {len(chosen)} images and their captions on the first two principal "
        f"components, which hold {first} and {second} of the variance."
    )
    caption = f"The two directions hold {first} and {second} of the variance; images are filled "
    caption += "marks, captions crosses."
    labels = f"1st component, {first}", f"2nd component, {second}"
    return plot(title, caption, alt, *labels, paint, legend_columns=2 if order else 4)
