"""Encoders that start from weights of others: `init_from` of `model.image` and `model.text`."""

from collections.abc import Mapping
from typing import Any

from clip_lite_jax.config import Config, ModelConfig
from clip_lite_jax.models import Model


def resolve(config: Config) -> Config:
    return config


def load_towers(model: Model, config: ModelConfig) -> Mapping[str, Any]:
    return {}
