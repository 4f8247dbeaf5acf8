"""Weights generated from their names, and what other projects' image encoders make of them.

``data/image_encoders.npz`` was written by ``benchmarks/image_encoder_references.py``.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clip_lite_jax.models.efficientnet import EfficientNetLite
from clip_lite_jax.models.resnet import ClipResNet, ResNet
from clip_lite_jax.models.vit import ViT
from clip_lite_jax.pretrained.efficientnet import efficientnet_namings
from clip_lite_jax.pretrained.names import Naming, read, write
from clip_lite_jax.pretrained.resnet import clip_resnet_namings, resnet_namings
from clip_lite_jax.pretrained.vit import vit_namings

REFERENCE = np.load(Path(__file__).parent / "data" / "image_encoders.npz")
SMALL_VIT: dict[str, Any] = {"patch": 8, "width": 24, "layers": 2, "heads": 3}
NAMINGS: dict[type[nn.Module], Any] = {
    ResNet: resnet_namings,
    ClipResNet: clip_resnet_namings,
    ViT: vit_namings,
    EfficientNetLite: efficientnet_namings,
}


def generated(name: str, shape: Iterable[int]) -> np.ndarray:
    """The weight that stands for the one of this name, in the reference as well."""
    rng, shape = np.random.default_rng(zlib.crc32(name.encode())), tuple(shape)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return x / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    return 1 + np.float32(0.1) * x if name.endswith("weight") else np.float32(0.1) * x


def noise(batch: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, size, size, 3)).astype(np.float32)


def shapes(module: nn.Module, size: int) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def naming_of(module: nn.Module, name: str) -> Naming:
    return next(naming for naming in NAMINGS[type(module)](module) if naming.name == name)


def generate(module: nn.Module, size: int, name: str) -> Any:
    """Variables from generated weights under the names of the project `name`."""
    like = shapes(module, size)
    naming = naming_of(module, name)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    weights = {name: generated(name, value.shape) for name, value in write(naming, zeros).items()}
    return read([naming], weights, like, "generated")


def evaluate(module: nn.Module, variables: Any, images: np.ndarray) -> Any:
    return jax.jit(module.apply)(variables, images)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """To a part of the largest value."""
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs)) < tolerance * np.max(np.abs(theirs))
