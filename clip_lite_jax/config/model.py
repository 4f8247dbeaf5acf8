"""Encoders and critic."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from clip_lite_jax.config.types import STRICT, Options


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderConfig:
    """One tower: its name in `models.IMAGE_ENCODERS` or `models.TEXT_ENCODERS` and its fields."""

    name: str
    options: Options = Field(default_factory=dict)
    """Fields of the encoder module that differ from the named preset, e.g. ``{"width": 192}``."""


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
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of activations.  Parameters are float32 (float64 with ``float64``, which needs x64)."""
