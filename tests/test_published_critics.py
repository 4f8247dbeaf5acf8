"""Critics and loss against the published PyTorch code, on weights that names generate.

``data/published_critics.npz`` holds features, scores and losses that the authors' model
(github.com/4m4n5/CLIP-Lite, evaluation mode, float32) gave for weights drawn as `weight` does, so
that no weights need to travel.  The total is 0.9 times the cross-modal loss there.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.models.critics import ConcatCritic, DotCritic
from clip_lite_jax.negatives import Pairs, build_sampler
from clip_lite_jax.objectives import build_objective
from clip_lite_jax.sharding import build_mesh

FILE = Path(__file__).parent / "data" / "published_critics.npz"


def weight(name: str, *shape: int) -> np.ndarray:
    """The generated value of a parameter of the published model."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("temperature"):
        return np.float32(np.log(1 / 0.07))
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return x / np.sqrt(np.prod(shape[1:]))
    return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x


def block(prefix: str, features: int, units: int = 2048) -> tuple[Any, Any]:
    """Parameters and batch statistics of a projection block, from those of ``MILinearBlock``."""
    nonlinear, shortcut = f"{prefix}.feature_nonlinear", f"{prefix}.feature_shortcut"
    last = f"{prefix}.feature_block_ln"
    params = {
        "Dense_0": {"kernel": weight(f"{nonlinear}.0.weight", units, features).T},
        "BatchNorm_0": {
            "scale": weight(f"{nonlinear}.1.weight", units),
            "bias": weight(f"{nonlinear}.1.bias", units),
        },
        "Dense_1": {
            "kernel": weight(f"{nonlinear}.3.weight", units, units).T,
            # Our shortcut has no bias of its own: the two add up.
            "bias": weight(f"{nonlinear}.3.bias", units) + weight(f"{shortcut}.bias", units),
        },
        "Dense_2": {"kernel": weight(f"{shortcut}.weight", units, features).T},
        "LayerNorm_0": {
            "scale": weight(f"{last}.weight", units),
            "bias": weight(f"{last}.bias", units),
        },
    }
    statistics = {
        "mean": weight(f"{nonlinear}.1.running_mean", units),
        "var": weight(f"{nonlinear}.1.running_var", units),
    }
    return params, {"BatchNorm_0": statistics}


def published_dot(image: int, text: int) -> tuple[nn.Module, Any]:
    image_block, image_statistics = block("loss.global_d.img_block", image)
    text_block, text_statistics = block("loss.global_d.text_block", text)
    params = {
        "image_block": image_block,
        "text_block": text_block,
        "log_temperature": -weight("loss.global_d.temperature"),
        "score_bias": np.float32(0),
    }
    statistics = {"image_block": image_statistics, "text_block": text_statistics}
    critic = DotCritic(width=2048, hidden=2048, norm="batch", noisy_identity=True)
    return critic, {"params": params, "batch_stats": statistics}


def published_concat(image: int, text: int) -> tuple[nn.Module, Any]:
    name = "loss.global_d"
    first = weight(f"{name}.l0.weight", 512, image + text).T
    params = {
        "image_layer": {"kernel": first[:image], "bias": weight(f"{name}.l0.bias", 512)},
        "text_layer": {"kernel": first[image:]},
        "kernel_0": weight(f"{name}.l1.weight", 512, 512).T,
        "bias_0": weight(f"{name}.l1.bias", 512),
        "kernel_1": weight(f"{name}.l2.weight", 1, 512).T,
        "bias_1": weight(f"{name}.l2.bias", 1),
    }
    return ConcatCritic(hidden=512, layers=2), {"params": params}


@pytest.mark.parametrize(("kind", "build"), [("dot", published_dot), ("concat", published_concat)])
def test_scores_and_loss_are_those_published(
    kind: str, build: Callable[[int, int], tuple[nn.Module, Any]]
) -> None:
    with np.load(FILE) as stored:
        data = {name.split("/")[1]: stored[name] for name in stored if name.startswith(kind + "/")}
    image, text = data["image_features"], data["text_features"]
    module, variables = build(image.shape[1], text.shape[1])

    class Published:
        def pairs(self, image: Any, text: Any) -> Any:
            return module.apply(variables, image, text, method="pairs")

        def matrix(self, image: Any, text: Any) -> Any:
            return module.apply(variables, image, text, method="matrix")

    rows = np.arange(6, dtype=np.int32)
    pairs = Pairs(
        image=module.apply(variables, image, method="project_image"),
        text=module.apply(variables, text, method="project_text"),
        group=rows[:, None],
        valid=np.ones(6, bool),
    )
    sampler = build_sampler(NegativesConfig(name="roll"), 6, build_mesh(jax.devices()[:1]))
    drawn = sampler(jax.random.key(0), jnp.zeros((), int), pairs, Published())
    np.testing.assert_allclose(drawn.scores.positive, data["positive_scores"], atol=2e-4)
    np.testing.assert_allclose(drawn.scores.negative[0, :, 0], data["negative_scores"], atol=2e-4)
    loss, _ = build_objective("jsd")(drawn.scores)
    np.testing.assert_allclose(loss, data["losses"][1], rtol=1e-4)
