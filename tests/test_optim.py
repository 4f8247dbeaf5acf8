"""Schedules, weight-decay masks, per-path factors, Lookahead."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_model

from clip_lite_jax.config import OptimConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models import build_model
from clip_lite_jax.optim import build_optimizer, build_schedule, frozen_towers, path_tree


def test_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = build_schedule(OptimConfig(learning_rate=0.1, warmup_steps=10), 100)
    values = [float(schedule(step)) for step in range(101)]
    assert 0 < values[0] < values[5] < values[10]
    np.testing.assert_allclose(values[10], 0.1, rtol=1e-6)
    np.testing.assert_allclose(values[100], 0, atol=1e-9)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_norms_biases_embeddings_and_temperature_do_not_decay() -> None:
    model = build_model(tiny_model(), 16, 40, 8)
    params = jax.eval_shape(model.init, jax.random.key(0))[0]
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    ones = jax.tree.map(lambda p: jnp.ones(p.shape), params)
    optimizer = build_optimizer(OptimConfig(warmup_steps=0, weight_decay=0.5), 10, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(ones), ones)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    for path, decayed in zip(
        jax.tree.leaves(path_tree(params)), jax.tree.leaves(moved), strict=True
    ):
        assert decayed == path.endswith("kernel"), path


def test_first_matching_factor_wins() -> None:
    params = {"image": {"kernel": jnp.ones(2)}, "text": {"kernel": jnp.ones(2)}}
    config = OptimConfig(
        name="sgd",
        learning_rate=1.0,
        warmup_steps=0,
        weight_decay=0,
        clip_norm=None,
        multipliers={"^image/": 0.0, "kernel$": 0.5},
    )
    optimizer = build_optimizer(config, 1000, params)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["image"]["kernel"], 0)
    np.testing.assert_allclose(updates["text"]["kernel"], -0.5)


def test_gradients_are_clipped() -> None:
    params = {"w": jnp.zeros(4)}
    config = OptimConfig(
        name="sgd", learning_rate=1.0, warmup_steps=0, momentum=0, weight_decay=0, clip_norm=1.0
    )
    optimizer = build_optimizer(config, 1000, params)
    updates, _ = optimizer.update({"w": jnp.full(4, 100.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["w"]), 1, rtol=1e-5)


def test_lookahead_returns_part_of_the_way_every_k_steps() -> None:
    config = OptimConfig(
        name="sgd",
        learning_rate=0.1,
        warmup_steps=0,
        momentum=0,
        weight_decay=0,
        clip_norm=None,
        lookahead_steps=3,
        lookahead_alpha=0.5,
    )
    params = {"w": jnp.array(1.0)}
    optimizer = build_optimizer(config, 10**9, params)
    state = optimizer.init(params)
    fast = slow = 1.0
    for step in range(1, 8):
        grad = 2 * fast
        updates, state = optimizer.update({"w": jnp.array(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        fast -= 0.1 * grad
        if step % 3 == 0:
            slow += 0.5 * (fast - slow)
            fast = slow
        np.testing.assert_allclose(params["w"], fast, rtol=1e-6)


def test_patterns_are_checked() -> None:
    params = {"image": {"kernel": jnp.ones(2)}}
    with pytest.raises(ConfigError, match=r"optim.multipliers: '\^txt' matches no parameter"):
        build_optimizer(OptimConfig(multipliers={"^txt": 0.1}), 10, params)
    with pytest.raises(ConfigError, match="optim.no_decay='\\(' is not a regular expression"):
        build_optimizer(OptimConfig(no_decay="("), 10, params)


def test_frozen_parameters_rest_and_have_no_state() -> None:
    params = {"image": {"kernel": jnp.ones(3)}, "text": {"kernel": jnp.ones(2)}}
    config = OptimConfig(warmup_steps=0, frozen={"^image/": (0, None)})
    optimizer = build_optimizer(config, 10, params)
    state = optimizer.init(params)
    assert all(leaf.shape in ((), (2,)) for leaf in jax.tree.leaves(state))
    gradient = {"image": {"kernel": jnp.full(3, 100.0)}, "text": {"kernel": jnp.full(2, 0.1)}}
    updates, _ = jax.jit(optimizer.update)(gradient, state, params)
    np.testing.assert_array_equal(updates["image"]["kernel"], 0)
    alone = {"kernel": params["text"]["kernel"]}
    other = build_optimizer(OptimConfig(warmup_steps=0), 10, alone)
    expected, _ = other.update({"kernel": jnp.full(2, 0.1)}, other.init(alone), alone)
    # Also: a frozen gradient takes no part in the clipped norm.
    np.testing.assert_allclose(updates["text"]["kernel"], expected["kernel"])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_parameters_are_frozen_and_thawed_by_step(name: str) -> None:
    params = {"image": jnp.ones(3), "text": jnp.ones(2), "critic": jnp.ones(1)}
    config = OptimConfig(
        name=name,  # type: ignore[arg-type]
        warmup_steps=0,
        frozen={"^image": (0, 3), "^text": (2, 4)},
    )
    optimizer = build_optimizer(config, 100, params)
    state, moved = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(6):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        moved.append({key: bool(jnp.all(value != 0)) for key, value in updates.items()})
        params = optax.apply_updates(params, updates)
    assert [m["image"] for m in moved] == [False, False, False, True, True, True]
    assert [m["text"] for m in moved] == [True, True, False, False, True, True]
    assert all(m["critic"] for m in moved)


def test_towers_that_are_never_trained_are_found() -> None:
    params = {name: {"a": 0, "b": 0} for name in ("image_encoder", "text_encoder", "critic")}
    for frozen, towers in (
        ({"^image_encoder/": (0, None)}, ("image",)),
        ({"encoder/a$": (0, None)}, ()),
        ({"encoder/": (0, 20)}, ("image", "text")),
        ({"encoder/": (0, 19)}, ()),
        ({"encoder/": (1, None)}, ()),
    ):
        config = OptimConfig(frozen=frozen)
        assert frozen_towers(config, 20, params) == towers


def test_wrong_spans_are_refused() -> None:
    params = {"image": jnp.ones(3)}
    for frozen, message in (
        ({"^text": (0, None)}, "optim.frozen: '\\^text' matches no parameter"),
        ({"^image": (5, 5)}, "frozen from 5 to 5"),
        ({"(": (0, None)}, "not a regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_optimizer(OptimConfig(frozen=frozen), 10, params)
