"""Accumulation equals the whole batch; the other terms of the loss; what goes together."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_model
from test_parity import TERMS, make_batch

from clip_lite_jax.batch import Batch
from clip_lite_jax.combinations import check_combination, draws_within_parts
from clip_lite_jax.config import (
    CriticConfig,
    EncoderConfig,
    ModelConfig,
    NegativesConfig,
    ObjectiveConfig,
)
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.learner import build_learner, make_gradient
from clip_lite_jax.models import Model, build_model
from clip_lite_jax.negatives import NEGATIVES
from clip_lite_jax.objectives import OBJECTIVES, prior_matching
from clip_lite_jax.sharding import build_mesh, put_batch
from clip_lite_jax.train_state import init_state

PARTS, ROWS = 4, 16


def without_dropout(dtype: str = "float64") -> ModelConfig:
    tiny = tiny_model(dtype, temperature=0.5)
    text = EncoderConfig(name="transformer", options=tiny.text.options | {"dropout": 0.0})
    return replace(tiny, text=text)


def gradient_of(
    negatives: NegativesConfig, objective: ObjectiveConfig, batch: Batch, parts: int
) -> Any:
    """``((loss, metrics), gradient)`` of one batch of `PARTS` times `ROWS` rows."""
    mesh = build_mesh(jax.devices()[:2])
    model = build_model(without_dropout(), 16, 40, 8, objective)
    learner = build_learner(model, objective, negatives, PARTS * ROWS, mesh, 0, parts)
    state, _ = init_state(model, lambda _: optax.sgd(1.0), 0, False, mesh)
    (loss, learned), grads = jax.jit(make_gradient(learner))(
        state, put_batch(mesh, batch, parts > 1)
    )
    return jax.device_get(((loss, learned.metrics), grads))


def in_parts(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x.reshape(PARTS, ROWS, *x.shape[1:]), batch)


def interleaved(batch: Batch) -> Batch:
    """Row i · parts + m of the result is row i of part m, as `_in_two_passes` orders them."""

    def turn(x: np.ndarray) -> np.ndarray:
        return x.reshape(PARTS, ROWS, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return jax.tree.map(turn, batch)


def assert_close(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), one, other)


@pytest.mark.parametrize("name", ["roll", "shuffle", "hard", "importance", "k"])
def test_one_pass_equals_the_batch_with_the_same_blocks(name: str) -> None:
    """Negatives masked unevenly over the parts, so that means of means would be wrong."""
    negatives = NegativesConfig(name=name, sides="both", block=ROWS, lanes=2, k=1 + (name == "k"))
    batch = make_batch(0)
    batch = replace(batch, group=np.where(np.arange(64)[:, None] < 20, 7, batch.group))
    with jax.enable_x64(True):
        whole = gradient_of(negatives, ObjectiveConfig(), batch, 1)
        parts = gradient_of(negatives, ObjectiveConfig(), in_parts(batch), PARTS)
    assert whole[0][1]["valid_negatives"] < 0.9
    assert_close(parts, whole)


def test_one_pass_counts_every_draw_of_the_self_supervised_terms() -> None:
    """Each term draws for itself, and what is masked differs from draw to draw."""
    objective = ObjectiveConfig(visual_weight=1.0, textual_weight=1.0)
    negatives = NegativesConfig(name="shuffle", sides="both", block=ROWS, lanes=2)
    batch = make_batch(0, second=True)
    batch = replace(batch, group=np.where(np.arange(64)[:, None] % 3 == 0, 7, batch.group))
    with jax.enable_x64(True):
        whole = gradient_of(negatives, objective, batch, 1)
        parts = gradient_of(negatives, objective, in_parts(batch), PARTS)
    assert_close(parts, whole)


@pytest.mark.parametrize(
    ("objective", "negatives"),
    [
        (ObjectiveConfig(name="infonce"), NegativesConfig(name="all", sides="both")),
        (ObjectiveConfig(name="dv"), NegativesConfig(name="shuffle", lanes=2)),
    ],
)
def test_two_passes_equal_the_whole_batch(
    objective: ObjectiveConfig, negatives: NegativesConfig
) -> None:
    batch = make_batch(0)
    with jax.enable_x64(True):
        whole = gradient_of(negatives, objective, interleaved(batch), 1)
        parts = gradient_of(negatives, objective, in_parts(batch), PARTS)
    assert_close(parts, whole)


def test_terms_add_up_and_are_logged() -> None:
    objective = ObjectiveConfig(**TERMS)
    batch = make_batch(0, second=True)
    with jax.enable_x64(True):
        (loss, metrics), grads = gradient_of(NegativesConfig(lanes=2), objective, batch, 1)
    bound = metrics["bound_loss"] + metrics["visual_loss"] + metrics["textual_loss"]
    np.testing.assert_allclose(loss, 0.9 * bound + 0.1 * metrics["prior_loss"], rtol=1e-9)
    for name in ("visual_critic", "textual_critic", "image_prior"):
        assert any(np.any(leaf) for leaf in jax.tree.leaves(grads[name])), name


# --- Prior matching -------------------------------------------------------------------------------


def linear(params: jax.Array, features: jax.Array) -> jax.Array:
    return features @ params


def test_the_encoder_works_against_the_discriminator_of_the_prior() -> None:
    rng = np.random.default_rng(0)
    params, features = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(5, 3)) + 2)
    valid = np.array([1, 1, 0, 1, 1], bool)
    key = jax.random.key(0)
    drawn = jax.random.uniform(key, features.shape, features.dtype)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    real, made = np.asarray(drawn @ params)[valid], np.asarray(features @ params)[valid]
    seen = np.asarray(features)[valid]
    d_params = -(sigmoid(-real) @ np.asarray(drawn)[valid] - sigmoid(made) @ seen) / 4
    value = np.logaddexp(0, -real).mean() + np.logaddexp(0, made).mean()

    for mode, sign in (("adversarial", -1), ("published", 1)):
        (got, (g_params, g_features)) = jax.value_and_grad(
            lambda p, f, mode=mode: prior_matching(linear, p, f, valid, key, mode), (0, 1)
        )(params, features)
        slope = sigmoid(made) if sign > 0 else sigmoid(-made)
        expected = np.zeros((5, 3))
        expected[valid] = sign * slope[:, None] * np.asarray(params) / 4
        np.testing.assert_allclose(g_params, d_params, rtol=1e-4)
        np.testing.assert_allclose(g_features, expected, rtol=1e-4, atol=1e-6)
        passing = 0 if mode == "published" else np.logaddexp(0, -made).mean()
        np.testing.assert_allclose(got, value + passing, rtol=1e-5)


# --- What goes together ---------------------------------------------------------------------------


def allowed(objective: str, negatives: NegativesConfig) -> bool:
    """The table, written a second time."""
    if negatives.implementation != "dense" and objective in ("dv", "smile"):
        return False
    if negatives.reembed and (negatives.name, negatives.pool) != ("importance", "memory"):
        return False
    if negatives.name != "importance" or objective in ("jsd", "nwj", "sigmoid"):
        return True
    whole_sum = negatives.proposal == "exp" and negatives.pool != "lane"
    return objective == "infonce" and whole_sum


def every_combination() -> list[tuple[str, NegativesConfig]]:
    kinds = [NegativesConfig(name=name) for name in NEGATIVES]
    kinds += [NegativesConfig(name="all", implementation=i) for i in ("gather", "ring")]
    kinds += [NegativesConfig(name=n, pool=p) for n in ("k", "hard") for p in ("block", "memory")]
    for pool, proposal in itertools.product(("lane", "block"), ("sigma", "exp")):
        kinds += [NegativesConfig(name="importance", pool=pool, proposal=proposal)]
    kinds += [NegativesConfig(name="importance", pool="memory", proposal="exp", reembed=True)]
    kinds += [NegativesConfig(name="shuffle", pool="memory", reembed=True)]
    kinds += [NegativesConfig(name="hard", pool="block", reembed=True)]
    return list(itertools.product(OBJECTIVES, kinds))


@pytest.mark.parametrize(("objective", "negatives"), every_combination())
def test_the_table_of_what_goes_together(objective: str, negatives: NegativesConfig) -> None:
    """Without compiling: what is allowed builds, what is not says what to use instead."""
    mesh = build_mesh(jax.devices()[:2])
    chosen = ObjectiveConfig(name=objective)
    if allowed(objective, negatives):
        for parts in (1,) if negatives.reembed else (1, 2):
            learner = build_learner(_model(), chosen, negatives, 64, mesh, 0, parts)
            assert learner.within_parts == (parts == 2 and draws_within_parts(chosen, negatives))
        return
    instead = r"set it to dense|use the negatives all or hard|set the pool to memory and the name"
    with pytest.raises(ConfigError, match=instead):
        check_combination(chosen, negatives, 64)


def _model() -> Model:
    return build_model(tiny_model(), 16, 40, 8)


def test_parts_are_checked() -> None:
    chosen = ObjectiveConfig()
    with pytest.raises(ConfigError, match="batch_size=64 does not divide into accumulate=3 parts"):
        check_combination(chosen, NegativesConfig(), 64, 3)
    again = NegativesConfig(name="hard", pool="memory", reembed=True)
    with pytest.raises(ConfigError, match=r"reembed=true with accumulate=2: .* accumulate=1"):
        check_combination(chosen, again, 64, 2)
    with pytest.raises(ConfigError, match=r"block=64: with accumulate=2 .* parts of 32 rows"):
        check_combination(chosen, NegativesConfig(block=64), 64, 2)


@pytest.mark.parametrize(("name", "across", "within"), [("condot", 0, 1), ("dotcon", 1, 0)])
def test_the_mixed_critics_of_the_published_code(name: str, across: int, within: int) -> None:
    """``condot``: concat across, dot within a modality; ``dotcon``: the other way round."""
    marks = ("kernel_0", "log_temperature")  # of concat, of dot
    settings = replace(tiny_model(), critic=CriticConfig(name=name))
    model = build_model(settings, 16, 40, 8, ObjectiveConfig(visual_weight=1.0))
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert marks[across] in params["critic"]
    assert marks[within] in params["visual_critic"]
    assert "textual_critic" not in params
