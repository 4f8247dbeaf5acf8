"""What the demo shows, as plain values: texts that were typed, numbers, and pictures to draw."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clip_lite_jax.config import Config
from clip_lite_jax.errors import ConfigError

MAX_LINES = 200
"""Captions or labels at once; each costs a pass through the text encoder."""
MAX_LETTERS = 1000
"""Of a text; encoders read the first some dozen tokens."""
TEMPLATE = "a photo of a {}."
HOTTEST = 200
"""Of 255: how much a heat map covers where it is hottest."""


def lines(text: str | None, what: str) -> list[str]:
    """The lines that say something, each once.

    Raises:
      ConfigError: too many, or one that is too long.
    """
    found = list(dict.fromkeys(filter(None, map(str.strip, (text or "").splitlines()))))
    if len(found) > MAX_LINES:
        raise ConfigError(f"{len(found)} {what}: give at most {MAX_LINES}, one on each line")
    for line in found:
        one_text(line, what)
    return found


def one_text(text: str | None, what: str) -> str:
    """A text without the space around it; raises `ConfigError` where it is too long."""
    text = (text or "").strip()
    if len(text) > MAX_LETTERS:
        raise ConfigError(f"{what}: {len(text)} letters, give at most {MAX_LETTERS}")
    return text


def prompts(labels: Sequence[str], template: str | None) -> list[str]:
    """The template with each label in place of ``{}``.

    Raises:
      ConfigError: the template has no ``{}``.
    """
    template = one_text(template, "the prompt") or "{}"
    if "{}" not in template:
        raise ConfigError(f"the prompt {template!r} has no {{}} for the label")
    # Not str.format: a template of strangers could ask for attributes.
    return [template.replace("{}", label) for label in labels]


def weight(value: object) -> float:
    """A number that was typed; raises `ConfigError` where it is none."""
    if isinstance(value, (int, float)) and np.isfinite(value):
        return float(value)
    raise ConfigError(f"a weight is a number, not {value!r}")


def signed(number: float, digits: int = 2) -> str:
    """With a minus that is as wide as a digit, and no sign of what rounds to 0."""
    return f"{number:z.{digits}f}".replace("-", "−")


def sigmoid(score: float) -> float:
    """σ(T)."""
    return float(1 / (1 + np.exp(-np.clip(score, -700, 700))))


def softmax(scores: np.ndarray) -> np.ndarray:
    """``exp(T) / Σ exp(T)``, float64 ``[N]``.

    With T = log p(x, y) / p(x) p(y) this is the probability of each label, given the picture, that
    exactly one of the labels is true and each is as likely as the other beforehand.
    """
    powers = np.exp(scores.astype(np.float64) - np.max(scores))
    return powers / powers.sum()


def ranks(scores: np.ndarray) -> list[int]:
    """The rank of each of ``[N]``, 1 for the highest; of equal ones the worst."""
    return [int((scores >= score).sum()) for score in scores]


@dataclass(frozen=True)
class Fact:
    """Of the model: a name and a value."""

    name: str
    value: str


def facts(config: Config, path: str, step: int | None, fingerprint: str) -> list[Fact]:
    """What the line on top says."""
    negatives = config.negatives
    found = [
        Fact("model", path),
        Fact("step", "" if step is None else f"{step:,}"),
        Fact("critic", config.model.critic.name),
        Fact("objective", f"{config.objective.name}, negatives {negatives.name}"),
        Fact("data", ", ".join(config.data.sources) + f" {fingerprint[:12]}".rstrip()),
    ]
    return [fact for fact in found if fact.value]


def data_url(picture: Image.Image) -> str:
    """A picture as an address that loads nothing: JPEG, or PNG where it has transparency."""
    buffer = io.BytesIO()
    kind = "png" if picture.mode == "RGBA" else "jpeg"
    picture.save(buffer, kind, **({} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels wide and high."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def heat_layer(heat: np.ndarray) -> Image.Image:
    """A map ``[H, W]``, none below 0, as a layer to lay over the picture: the hotter, the more red
    and the less transparent."""
    top = float(heat.max()) if heat.size else 0.0
    share = heat / top if top > 0 else np.zeros_like(heat)
    rgba = np.zeros((*heat.shape, 4), np.uint8)
    rgba[..., 0], rgba[..., 1] = 230, (200 * (1 - share)).astype(np.uint8)
    rgba[..., 3] = (HOTTEST * share).astype(np.uint8)
    return Image.fromarray(rgba)
