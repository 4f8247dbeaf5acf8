"""Weights of other projects: read, written, and checked on the way."""

from clip_lite_jax.pretrained import clip_lite
from clip_lite_jax.pretrained.clip_lite import load_clip_lite

__all__ = ["clip_lite", "load_clip_lite"]
