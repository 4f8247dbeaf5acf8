"""Batch statistics: of all, of parts, frozen, over devices, without examples that do not count."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.normalization import BatchNorm
from clip_lite_jax.models.resnet import ResNet
from clip_lite_jax.sharding import batch_sharding, build_mesh, replicated


def batch(rows: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (rows, 4, 4, 5)).astype(np.float32)


def normalise(norm: BatchNorm, variables: Any, x: Any, valid: Any = None) -> Any:
    """Normalised rows and new running statistics."""
    return norm.apply(variables, x, True, valid, mutable=["batch_stats"])


@pytest.fixture(scope="module")
def variables() -> Any:
    variables = BatchNorm().init(jax.random.key(0), batch())
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: v + rng.uniform(0, 1, v.shape).astype(np.float32), variables)


def test_grouped_statistics_are_those_of_each_part(variables: Any) -> None:
    x = batch()
    y, updated = normalise(BatchNorm("grouped", groups=8), variables, x)
    parts = [normalise(BatchNorm(), variables, part) for part in np.split(x, 8)]
    chex.assert_trees_all_close(y, jnp.concatenate([part for part, _ in parts]), atol=1e-5)
    mean = jax.tree.map(lambda *stats: sum(stats) / 8, *(stats for _, stats in parts))
    chex.assert_trees_all_close(updated, mean, rtol=1e-5)
    assert not np.allclose(y, normalise(BatchNorm(), variables, x)[0], atol=1e-2)
    with pytest.raises(ConfigError, match="a batch of 12 does not divide into 8 groups"):
        normalise(BatchNorm("grouped", groups=8), variables, x[:12])


@pytest.mark.parametrize("norm", [BatchNorm(), BatchNorm("grouped", groups=4)])
def test_examples_that_are_not_valid_do_not_count(norm: BatchNorm, variables: Any) -> None:
    x, valid = batch(), np.arange(16) % 4 != 1
    ones = [normalise(norm, variables, np.where(shaped(valid), x, f), valid) for f in (0.0, 1e3)]
    (y, updated), (other, again) = ones
    chex.assert_trees_all_equal(y[valid], other[valid])
    chex.assert_trees_all_equal(updated, again)
    without = normalise(norm, variables, x[valid])
    chex.assert_trees_all_close((y[valid], updated), without, rtol=1e-4, atol=1e-5)


def shaped(valid: np.ndarray) -> np.ndarray:
    return valid[:, None, None, None]


def test_a_part_with_no_valid_example_changes_nothing(variables: Any) -> None:
    x, valid = batch(), np.arange(16) >= 4
    norm = BatchNorm("grouped", groups=4)
    y, updated = normalise(norm, variables, x, valid)
    three = BatchNorm("grouped", groups=3)
    chex.assert_trees_all_close(updated, normalise(three, variables, x[4:])[1], rtol=1e-5)
    assert jnp.max(jnp.abs(y[:4])) < 100  # of no use, but it must not grow from layer to layer
    nothing = normalise(norm, variables, x, np.zeros(16, bool))[1]
    chex.assert_trees_all_equal(nothing["batch_stats"], variables["batch_stats"])


def test_frozen_statistics_are_used_and_kept_in_training(variables: Any) -> None:
    norm = BatchNorm("frozen")
    y, updated = normalise(norm, variables, batch())
    chex.assert_trees_all_equal(y, norm.apply(variables, batch()))
    chex.assert_trees_all_equal(updated["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("statistics", ["global", "grouped"])
def test_eight_devices_compute_what_one_does(statistics: Any) -> None:
    """Features, gradients and running statistics of a small residual network.

    In float64: of float32 some gradients are differences of which few digits are left.
    """
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    module = ResNet("basic", (1, 1), width=8, batch_norm=statistics, batch_groups=8, **types)
    images = np.random.default_rng(0).normal(size=(16, 16, 16, 3))
    valid = np.arange(16) != 3

    def loss(variables: Any, images: Any, valid: Any) -> Any:
        more = {"train": True, "valid": valid, "mutable": ["batch_stats"]}
        features, updated = module.apply(variables, images, **more)
        return jnp.sum(jnp.sin(features) * valid[:, None]), (features, updated)

    results = []
    with jax.enable_x64(True):
        variables = jax.jit(module.init)(jax.random.key(0), images)
        for devices in (1, 8):
            mesh = build_mesh(jax.devices()[:devices])
            rows, whole = batch_sharding(mesh), replicated(mesh)
            step = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=(whole, rows, rows))
            results.append(jax.device_get(step(variables, images, valid)))
    assert results[0][0][0].dtype == np.float64
    chex.assert_trees_all_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_statistics_far_from_zero_keep_their_digits(far: float) -> None:
    """Moments are taken about the running mean: float32 squares of 1e4 would lose a variance of 4.

    Values and gradients are those of the definition, in two passes in float64.
    """
    rng = np.random.default_rng(0)
    x, g = rng.normal(far, 2, (16, 4, 4, 5)), rng.normal(size=(16, 4, 4, 5))
    valid = np.arange(16) != 3
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x.astype(np.float32))
    variables["batch_stats"]["mean"] += far + 1  # where training has brought it

    def ours(x: Any) -> Any:
        y, _ = normalise(norm, variables, x.astype(np.float32), valid)
        return jnp.sum(y * g * shaped(valid))

    def defined(x: Any) -> Any:
        mean = jnp.mean(x[valid], axis=(0, 1, 2))
        var = jnp.mean((x[valid] - mean) ** 2, axis=(0, 1, 2))
        y = (x - mean) / jnp.sqrt(var + norm.epsilon)
        return jnp.sum(y * g * shaped(valid))

    with jax.enable_x64(True):
        near = x.astype(np.float32).astype(np.float64)  # what both see
        expected = jax.grad(defined)(near)
        found = jax.grad(ours)(near)
    chex.assert_trees_all_close(found, expected, atol=1e-5)
