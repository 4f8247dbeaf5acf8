"""Convolutions and pooling on CPUs equal XLA's own, which other backends get."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from clip_lite_jax.models.convolution import convolve, max_pool
from clip_lite_jax.sharding import batch_sharding, build_mesh, replicated

CASES: dict[str, dict[str, Any]] = {
    "one pixel": {"kernel": (1, 1, 6, 4)},
    "one pixel, strided": {"kernel": (1, 1, 6, 4), "strides": (2, 2)},
    "one pixel, padded": {"kernel": (1, 1, 6, 4), "padding": ((1, 0), (0, 2))},
    "depthwise": {"kernel": (3, 3, 1, 6), "groups": 6, "padding": "SAME"},
    "depthwise, strided": {
        "kernel": (5, 3, 1, 6),
        "groups": 6,
        "strides": (2, 1),
        "padding": ((1, 2), (1, 1)),
    },
    "square": {"kernel": (3, 3, 6, 4), "padding": ((1, 1), (1, 1))},
    "oblong": {"kernel": (2, 5, 6, 4), "padding": ((0, 2), (3, 1))},
    "valid": {"kernel": (3, 3, 6, 4)},
    "strided": {"kernel": (3, 3, 6, 4), "strides": (2, 2), "padding": "SAME"},
    "strided, oblong": {
        "kernel": (4, 3, 6, 4),
        "strides": (3, 2),
        "padding": ((1, 0), (2, 1)),
    },
    "patches": {"kernel": (3, 5, 6, 4), "strides": (3, 5)},
    "groups": {"kernel": (3, 3, 3, 4), "groups": 2, "padding": "SAME"},
}

FORMULAS = ("one pixel", "depthwise", "square", "strided")
"""A case of each of ours."""


def inputs(shape: tuple[int, ...], dtype: Any = jnp.float64) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(8, 9, 10, 6)), dtype), jnp.asarray(
        rng.normal(size=shape), dtype
    )


def both(case: dict[str, Any]) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Ours and XLA's, of a case."""
    strides, padding = case.get("strides", (1, 1)), case.get("padding", "VALID")
    groups = case.get("groups", 1)

    def general(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return lambda x, kernel: convolve(x, kernel, strides, padding, groups), general


def with_gradient(function: Callable[..., Array]) -> Callable[..., Any]:
    """Value, and gradients of a sum in which every place has another weight."""

    def weighted(*arrays: Array) -> tuple[Array, Array]:
        y = function(*arrays)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y * weights.astype(y.dtype)), y

    def run(*arrays: Array) -> Any:
        return jax.value_and_grad(weighted, tuple(range(len(arrays))), has_aux=True)(*arrays)

    return jax.jit(run)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_xla(name: str) -> None:
    ours, general = both(CASES[name])
    with jax.enable_x64():
        given = inputs(CASES[name]["kernel"])
        found, expected = with_gradient(ours)(*given), with_gradient(general)(*given)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_stays_bfloat16(name: str) -> None:
    ours, general = both(CASES[name])
    given = inputs(CASES[name]["kernel"], jnp.bfloat16)
    found, expected = with_gradient(ours)(*given), with_gradient(general)(*given)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == theirs.dtype == jnp.bfloat16
        exact = np.asarray(theirs, np.float32)
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), exact, atol=0.03 * np.abs(exact).max()
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_a_batch_on_eight_devices_is_the_same_batch(name: str) -> None:
    ours, _ = both(CASES[name])
    given = inputs(CASES[name]["kernel"], jnp.float32)
    mesh = build_mesh(jax.devices()[:8])
    spread = jax.device_put(given, (batch_sharding(mesh), replicated(mesh)))
    found, expected = with_gradient(ours)(*spread), with_gradient(ours)(*given)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_other_backends_get_convolutions(name: str) -> None:
    """On CPUs larger kernels have two, forward and for the image; elsewhere each product is one."""
    ours, general = both(CASES[name])
    given = inputs(CASES[name]["kernel"], jnp.float32)

    def convolutions(function: Callable[..., Array], platform: str) -> int:
        traced = with_gradient(function).trace(*given)  # type: ignore[attr-defined]
        return str(traced.lower(lowering_platforms=(platform,)).as_text()).count(
            "stablehlo.convolution"
        )

    assert convolutions(ours, "cpu") == (2 if name in ("square", "strided") else 0)
    for platform in ("tpu", "cuda"):
        assert convolutions(ours, platform) == convolutions(general, platform) == 3


def test_the_gradient_of_one_pixel_transposes_no_image() -> None:
    """XLA took three times as long where the product had the four dimensions of the image."""
    ours, _ = both(CASES["one pixel"])
    compiled = with_gradient(ours).lower(  # type: ignore[attr-defined]
        *inputs(CASES["one pixel"]["kernel"], jnp.float32)
    )
    text = compiled.compile().as_text()
    pixels = 8 * 9 * 10
    assert f"f32[{pixels},4]" in text
    assert f"f32[4,{pixels}]" not in text


@pytest.mark.parametrize("size", [(8, 6), (7, 8)])
def test_max_pool_is_that_of_xla(size: tuple[int, int]) -> None:
    """With many ties too, as a ReLU makes them: the first maximum has the gradient."""

    def general(x: Array) -> Array:
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    with jax.enable_x64():
        x = np.random.default_rng(0).normal(size=(2, *size, 3))
        for given in (x, np.maximum(x, 0), np.round(x), np.full_like(x, -np.inf)):
            found, expected = with_gradient(max_pool)(given), with_gradient(general)(given)
            for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-12)
