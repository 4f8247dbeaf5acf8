"""Encoders and critic."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from clip_lite_jax.config.types import STRICT, Options, Triple


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderConfig:
    """One tower: its name in `models.IMAGE_ENCODERS` or `models.TEXT_ENCODERS` and its fields."""

    name: str
    options: Options = Field(default_factory=dict)
    """Fields of the encoder module that differ from the named preset, e.g. ``{"width": 192}``."""
    init_from: str | None = None
    """Weights to start from: a file or folder of another project or of ours, ``hf://owner/name``,
    or ``package:NAME/path`` in an installed package; see docs/checkpoints.md.  Options that the
    folder states are taken over."""
    cache: bool = False
    """Compute the features of every example once, keep them on disk and train on them.  The tower
    must be frozen for good (`optim.frozen`)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CriticConfig:
    """The critic T(image, text); see `models.critics`."""

    name: str = "dot"
    options: Options = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    image: EncoderConfig = EncoderConfig(name="convnet")
    text: EncoderConfig = EncoderConfig(name="transformer")
    critic: CriticConfig = CriticConfig()
    pixel_mean: Triple | None = None
    """Of red, green and blue in [0, 1]: images are normalised as ``(pixel - mean) / std``.  None is
    what `image.init_from` states, or else 0.5."""
    pixel_std: Triple | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of activations.  Parameters are float32 (float64 with ``float64``, which needs x64)."""
