"""Eight devices compute what one computes: loss, gradients, parameters, drawn negatives."""

from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_model

from clip_lite_jax.config import NegativesConfig, OptimConfig
from clip_lite_jax.models import build_model
from clip_lite_jax.negatives import NEGATIVES, build_sampler
from clip_lite_jax.objectives import build_objective
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh, put_batch
from clip_lite_jax.train_state import init_state
from clip_lite_jax.train_step import Batch, make_loss, make_train_step

BATCH, STEPS = 64, 3
ADAMW = OptimConfig(name="adamw", learning_rate=1e-3, warmup_steps=0, ema_decay=0.9)
SGD = OptimConfig(name="sgd", learning_rate=1e-2, warmup_steps=0, lookahead_steps=2)


def make_batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    return Batch(
        image=rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
        tokens=rng.integers(0, 40, (BATCH, 8), np.int32),
        mask=np.arange(8) < rng.integers(1, 9, (BATCH, 1)),
        group=rng.integers(0, 60, (BATCH, 2), np.int32),
        valid=rng.random(BATCH) < 0.95,
        index=np.arange(BATCH, dtype=np.int32),
    )


def train(devices: int, negatives: str, optim: OptimConfig, dtype: str) -> dict[str, Any]:
    """A few steps; what they computed, on the host."""
    mesh = build_mesh(jax.devices()[:devices])
    # A mild temperature keeps gradients of order one, so that 1e-6 means something in float32.
    model = build_model(tiny_model(dtype, temperature=0.5), 16, vocab_size=40, max_tokens=8)
    objective = build_objective("infonce" if negatives == "all" else "jsd")
    sampler = build_sampler(NegativesConfig(name=negatives, sides="both"), BATCH, mesh)
    state, optimizer = init_state(
        model, lambda p: build_optimizer(optim, 10, p), 0, optim.ema_decay > 0, mesh
    )
    step = make_train_step(model, objective, sampler, optimizer, mesh, 0, optim.ema_decay)
    gradient = jax.jit(jax.value_and_grad(make_loss(model, objective, sampler, 0), has_aux=True))
    first = put_batch(mesh, make_batch(0))
    (_, (_, _, drawn)), grads = gradient(state.params, state.model_state, state.step, first)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, put_batch(mesh, make_batch(number)))
        losses.append(metrics["loss"])
    floats = {"losses": losses, "grads": grads, "params": state.params, "ema": state.ema}
    return jax.device_get({"floats": floats, "index": drawn.index, "valid": drawn.scores.valid})


def assert_equal(one: dict[str, Any], eight: dict[str, Any], tolerance: float) -> None:
    np.testing.assert_array_equal(one["index"], eight["index"])
    np.testing.assert_array_equal(one["valid"], eight["valid"])

    def compare(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, one["floats"], eight["floats"])


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_float64_adamw(negatives: str) -> None:
    with jax.enable_x64(True):
        one, eight = (train(n, negatives, ADAMW, "float64") for n in (1, 8))
    assert one["floats"]["params"]["critic"]["score_bias"].dtype == np.float64
    assert_equal(one, eight, 1e-9)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_float32_sgd(negatives: str) -> None:
    one, eight = (train(n, negatives, SGD, "float32") for n in (1, 8))
    assert_equal(one, eight, 1e-6)
