"""Encoders, critics and the dual encoder.  Flax Linen does not leave this folder."""

from clip_lite_jax.models.dual_encoder import (
    CRITICS,
    IMAGE_ENCODERS,
    TEXT_ENCODERS,
    DualEncoder,
    Embedded,
    Inputs,
    Model,
    build_model,
)

__all__ = [
    "CRITICS",
    "IMAGE_ENCODERS",
    "TEXT_ENCODERS",
    "DualEncoder",
    "Embedded",
    "Inputs",
    "Model",
    "build_model",
]
