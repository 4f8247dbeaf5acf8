"""One compiled step: what it updates and logs, and what crosses the network in it."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from test_parity import make_batch

from clip_lite_jax.batch import Batch
from clip_lite_jax.config import NegativesConfig, ObjectiveConfig, OptimConfig
from clip_lite_jax.learner import build_learner
from clip_lite_jax.models import Model, build_model
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh, put_batch
from clip_lite_jax.train_state import TrainState, init_state
from clip_lite_jax.train_step import TrainStep, make_encode_fns, make_train_step

WIDTH = 16  # of the embeddings of `tiny_model`


def build(
    devices: int, negatives: str = "shuffle", dtype: str = "float32", ema_decay: float = 0.0
) -> tuple[TrainStep, TrainState, Model, Batch]:
    """A compiled step, a state for it, the model and a batch on the devices."""
    mesh = build_mesh(jax.devices()[:devices])
    model = build_model(tiny_model(dtype), image_size=16, vocab_size=40, max_tokens=8)
    batch = make_batch(0)
    learner = build_learner(
        model,
        ObjectiveConfig(),
        NegativesConfig(name=negatives, sides="both"),
        len(batch.valid),
        mesh,
        seed=0,
    )
    optim = OptimConfig(warmup_steps=0, learning_rate=1e-2)
    state, optimizer = init_state(
        model, lambda p: build_optimizer(optim, 10, p), 0, ema_decay > 0, mesh
    )
    step = make_train_step(learner, optimizer, mesh, ema_decay)
    return step, state, model, put_batch(mesh, batch)


@pytest.mark.parametrize("negatives", ["roll", "shuffle", "hard"])
def test_eight_devices_gather_no_embeddings(negatives: str) -> None:
    step, state, _, batch = build(8, negatives)
    program = step.lower(state, batch).compile().as_text()  # type: ignore[attr-defined]
    gathered = re.findall(r"= (.+?) all-gather(?:-start)?\(", program)
    assert gathered == []
    assert "all-reduce" in program  # of gradients: the program is split over devices at all


def test_it_logs_what_a_person_watches() -> None:
    step, state, _, batch = build(1)
    before = jax.device_get(state.params)
    state, metrics = step(state, batch)
    assert {
        "loss",
        "score_positive",
        "score_negative",
        "critic_accuracy",
        "temperature",
        "gradient_norm",
        "parameter_norm",
    } <= metrics.keys()
    assert all(np.isfinite(value) for value in jax.device_get(metrics).values())
    assert metrics["temperature"] == pytest.approx(0.07)
    assert metrics["bad_examples"] == np.sum(~jax.device_get(batch.valid))
    # Behind a convolution that starts at zero nothing moves in the first step.
    state, _ = step(state, batch)
    assert state.step == 2
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
    ]
    assert all(changed)


def test_the_average_is_short_at_first() -> None:
    step, state, _, batch = build(1, ema_decay=0.999)
    expected: Any = jax.device_get(state.params)
    for number in range(3):
        state, _ = step(state, batch)
        keep = (number + 1) / (number + 10)
        new = jax.device_get(state.params)
        expected = jax.tree.map(lambda e, p, k=keep: k * e + (1 - k) * p, expected, new)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_trains_float32_parameters() -> None:
    step, state, _, batch = build(1, dtype="bfloat16")
    for _ in range(3):
        state, metrics = step(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert np.isfinite(metrics["loss"])


def test_a_bad_example_changes_nothing() -> None:
    """Whatever stands in an invalid slot, the updated parameters are the same."""
    results = []
    for seed in (1, 2):
        step, state, _, batch = build(1)
        broken = np.zeros(len(batch.valid), bool)
        broken[[3, 40]] = True
        noise = np.random.default_rng(seed).integers(0, 256, batch.image.shape, np.uint8)
        image = np.where(broken[:, None, None, None], noise, np.asarray(batch.image))
        batch = replace(batch, image=image, valid=np.asarray(batch.valid) & ~broken)
        results.append(jax.device_get(step(state, batch)[0].params))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("valid", [True, False])
def test_an_example_without_a_token_is_harmless(valid: bool) -> None:
    """Its text is projected to exactly 0 as long as biases are, and a norm has no slope there."""
    step, state, _, batch = build(1)
    mask, is_valid = np.array(batch.mask), np.array(batch.valid)
    mask[3], is_valid[3] = False, valid
    state, metrics = step(state, replace(batch, mask=mask, valid=is_valid))
    assert np.isfinite(metrics["gradient_norm"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_any_number_of_rows_is_encoded_on_eight_devices() -> None:
    model = build_model(tiny_model(), image_size=16, vocab_size=40, max_tokens=8)
    params, model_state = model.init(jax.random.key(0))
    images = make_batch(0).image
    one, eight = (
        make_encode_fns(model, build_mesh(jax.devices()[:n]))(params, model_state) for n in (1, 8)
    )
    for rows in (1, 8, 11):
        assert eight.image(images[:rows]).shape == (rows, WIDTH)
        np.testing.assert_allclose(eight.image(images[:rows]), one.image(images[:rows]), atol=1e-5)
