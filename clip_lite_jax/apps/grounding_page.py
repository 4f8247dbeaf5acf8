"""Heat maps as a page: pictures with what speaks for a phrase, its box, and hit or miss."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clip_lite_jax.apps.report_pages import environment
from clip_lite_jax.data.image_ops import Box, view_box
from clip_lite_jax.evaluators.grounding import Found, Grounding
from clip_lite_jax.evaluators.tasks import Outcome
from clip_lite_jax.train_step import EncodeFns

SIDE = 480
"""Larger pictures are scaled down to so many pixels."""
POINTS = 20
"""Of a tie, so many are drawn."""


@dataclass(frozen=True)
class Item:
    """A phrase as it is shown; boxes and points are CSS in per cent of the picture."""

    phrase: str
    picture: str
    heat: str
    width: int
    height: int
    box: str
    around: list[str]
    points: list[str]
    hit: bool
    iou: float
    chosen: bool | None
    empty: bool


def page(
    grounding: Grounding,
    fns: EncodeFns,
    outcome: Outcome,
    title: str = "Grounding",
    count: int = 24,
) -> str:
    """HTML that loads nothing, with what was measured, and `count` phrases."""
    config = grounding.pixels.config
    items = []
    for found in grounding.examples(fns, count):
        view = view_box(found.picture.size, config.image_size, config.resize)
        items.append(_item(found, view))
    metrics = outcome.metrics
    rows = [
        (name, value, metrics[f"{name}_low"], metrics[f"{name}_high"])
        for name, value in metrics.items()
        if f"{name}_low" in metrics
    ]
    context = {"title": title, "protocol": grounding.protocol, "metrics": rows, "items": items}
    return environment().get_template("grounding.html.j2").render(context)


def overlay(heat: np.ndarray, view: Box) -> np.ndarray:
    """Red where a map ``[H, W]`` is hot, grey outside the view: uint8 ``[H, W, 4]`` with alpha."""
    height, width = heat.shape
    top = float(heat.max()) if heat.size else 0.0
    share = heat / top if top > 0 else np.zeros_like(heat)
    rgba = np.zeros((height, width, 4), np.uint8)
    rgba[..., 0], rgba[..., 1] = 230, (200 * (1 - share)).astype(np.uint8)
    rgba[..., 3] = (190 * share).astype(np.uint8)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    outside = np.add.outer((y < view[1]) | (y > view[3]), (x < view[0]) | (x > view[2]))
    rgba[outside] = (128, 128, 128, 170)
    return rgba


def _item(found: Found, view: Box) -> Item:
    width, height = found.picture.size
    scale = min(1.0, SIDE / max(width, height))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = found.picture.decoded().resize(small, Image.Resampling.BICUBIC)
    heat = Image.fromarray(overlay(found.heat, view)).resize(small, Image.Resampling.BILINEAR)
    values = found.values

    def css(box: Box) -> str:
        left, upper = 100 * box[0] / width, 100 * box[1] / height
        wide, high = 100 * (box[2] - box[0]) / width, 100 * (box[3] - box[1]) / height
        return f"left:{left:.2f}%;top:{upper:.2f}%;width:{wide:.2f}%;height:{high:.2f}%"

    return Item(
        found.phrase.text,
        _uri(picture, "JPEG", quality=85),
        _uri(heat, "PNG"),
        *small,
        css(found.phrase.box),
        [css(box) for box in found.around],
        [
            f"left:{100 * x / width:.2f}%;top:{100 * y / height:.2f}%"
            for x, y in found.points[:POINTS]
        ],
        bool(values["pointing_game"]),
        values["box_iou"],
        bool(values["candidate_accuracy"]) if "candidate_accuracy" in values else None,
        not len(found.points),
    )


def _uri(image: Image.Image, format: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
