"""The typed configuration tree: what it holds, how it is loaded, overridden and checked.

A file in ``configs/`` is a short Python file with ``get_config() -> Config``.  Each section checks
its own values when it is built; rules between fields and against the machine belong to `validate`
and to the modules that own them (`negatives.layout_of`, `sharding.build_mesh`).
"""

from clip_lite_jax.config.data import AugmentConfig, DataConfig, PartConfig, ShapesConfig
from clip_lite_jax.config.learning import NegativesConfig, ObjectiveConfig, OptimConfig
from clip_lite_jax.config.loading import (
    config_path,
    describe,
    explain,
    field_paths,
    from_dict,
    load_config,
    override,
    parse_overrides,
    to_dict,
)
from clip_lite_jax.config.model import CriticConfig, EncoderConfig, ModelConfig
from clip_lite_jax.config.run import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    MeshConfig,
    RetrievalConfig,
    TaskConfig,
    validate,
)
from clip_lite_jax.config.types import Captions, GalleryCaptions, Options

__all__ = [
    "AugmentConfig",
    "Captions",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EncoderConfig",
    "EvalConfig",
    "GalleryCaptions",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "NegativesConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Options",
    "PartConfig",
    "RetrievalConfig",
    "ShapesConfig",
    "TaskConfig",
    "config_path",
    "describe",
    "explain",
    "field_paths",
    "from_dict",
    "load_config",
    "override",
    "parse_overrides",
    "to_dict",
    "validate",
]
