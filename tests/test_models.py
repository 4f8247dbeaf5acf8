"""Shapes, masks, critics and options of the models."""

from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from clip_lite_jax.config import CriticConfig, EncoderConfig, ModelConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models import CRITICS, Inputs, Model, build_model
from clip_lite_jax.models.critics import ConcatCritic, _clamp, _noisy_identity


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, Any, Any]:
    model = build_model(tiny_model(), image_size=16, vocab_size=40, max_tokens=8)
    return model, *jax.jit(model.init)(jax.random.key(0))


def make_inputs(n: int = 3) -> Inputs:
    rng = np.random.default_rng(0)
    mask = np.arange(8) < np.array([8, 3, 1] * n)[:n, None]
    image = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
    return Inputs(image, rng.integers(0, 40, (n, 8), np.int32), mask)


def test_embeddings_are_unit_vectors(tiny: tuple[Model, Any, Any]) -> None:
    model, params, state = tiny
    inputs = make_inputs()
    image = model.encode_image(params, state, inputs.image)
    text = model.encode_text(params, state, inputs.tokens, inputs.mask)
    chex.assert_shape([image, text], (3, 16))
    chex.assert_type([image, text], jnp.float32)
    chex.assert_trees_all_close(jnp.linalg.norm(image, axis=1), jnp.ones(3), rtol=1e-5)
    chex.assert_trees_all_close(jnp.linalg.norm(text, axis=1), jnp.ones(3), rtol=1e-5)


def test_padding_does_not_matter(tiny: tuple[Model, Any, Any]) -> None:
    model, params, state = tiny
    inputs = make_inputs()
    other = np.where(inputs.mask, inputs.tokens, 7)
    a = model.encode_text(params, state, inputs.tokens, inputs.mask)
    b = model.encode_text(params, state, other, inputs.mask)
    chex.assert_trees_all_close(a, b, rtol=1e-6)


def test_an_empty_caption_is_finite(tiny: tuple[Model, Any, Any]) -> None:
    model, params, state = tiny
    inputs = make_inputs()
    nothing = np.zeros_like(inputs.mask)
    chex.assert_tree_all_finite(model.encode_text(params, state, inputs.tokens, nothing))


def test_matrix_holds_the_pairs(tiny: tuple[Model, Any, Any]) -> None:
    model, params, state = tiny
    inputs = make_inputs()
    image = model.encode_image(params, state, inputs.image)
    text = model.encode_text(params, state, inputs.tokens, inputs.mask)
    critic = model.critic(params)
    matrix = critic.matrix(image, text)
    chex.assert_shape(matrix, (3, 3))
    chex.assert_trees_all_close(jnp.diagonal(matrix), critic.pairs(image, text), rtol=1e-5)
    expected = image @ text.T / 0.07 + params["critic"]["score_bias"]
    chex.assert_trees_all_close(matrix, expected, rtol=1e-4)
    chex.assert_trees_all_close(model.watched(params)["temperature"], 0.07, rtol=1e-5)


@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_scores_pairs_as_its_matrix_does(name: str) -> None:
    config = replace(tiny_model(), critic=CriticConfig(name=name))
    model = build_model(config, 16, 40, 8)
    params, state = jax.jit(model.init)(jax.random.key(0))
    inputs = make_inputs(9)
    image = model.encode_image(params, state, inputs.image)
    text = model.encode_text(params, state, inputs.tokens, inputs.mask)
    critic = model.critic(params)
    matrix = critic.matrix(image, text)
    chex.assert_shape(matrix, (9, 9))
    every = critic.pairs(image[:, None], text[None])
    chex.assert_trees_all_close(matrix, every, rtol=1e-4, atol=1e-5)
    lanes = critic.matrix(image.reshape(3, 3, -1), text.reshape(3, 3, -1))
    chex.assert_trees_all_close(lanes[1], matrix[3:6, 3:6], rtol=1e-4, atol=1e-5)


def test_concat_works_through_its_matrix_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that do not divide it, forward and backward."""
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 7, 5)).astype(np.float32)
    module = ConcatCritic(hidden=6)
    variables = module.init(jax.random.key(0), image, text, method=_concat_scores)

    def total(variables: Any, image: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(module.apply(variables, image, text, method=_concat_scores)))

    expected = jax.value_and_grad(total, (0, 1))(variables, image)
    monkeypatch.setattr("clip_lite_jax.models.critics._MAX_HIDDEN", 7 * 6 * 2)
    chex.assert_trees_all_close(
        jax.value_and_grad(total, (0, 1))(variables, image), expected, rtol=1e-5, atol=1e-6
    )


def _concat_scores(critic: ConcatCritic, image: jax.Array, text: jax.Array) -> jax.Array:
    return critic.matrix(critic.project_image(image), critic.project_text(text))


def test_batch_statistics_leave_out_what_is_not_valid() -> None:
    """Whatever stands in the slot of an unusable example."""
    config = replace(tiny_model(), critic=CriticConfig(options={"norm": "batch", "width": 16}))
    model = build_model(config, 16, 40, 8)
    params, state = jax.jit(model.init)(jax.random.key(0))
    valid = np.arange(9) != 4
    results = []
    for filling in (0, 255):
        inputs = replace(make_inputs(9), valid=valid)
        image = np.where(valid[:, None, None, None], inputs.image, filling)
        embedded, new = model.embed(params, state, replace(inputs, image=image), jax.random.key(0))
        results.append((embedded.image[valid], new))
    chex.assert_trees_all_close(*results, rtol=1e-5)
    assert not np.array_equal(*(jax.tree.leaves(tree)[0] for tree in (state, results[0][1])))


def test_the_shortcut_starts_as_a_noisy_identity() -> None:
    kernel = _noisy_identity(jax.random.key(0), (3, 5))
    chex.assert_trees_all_close(jnp.diagonal(kernel), jnp.ones(3))
    off = kernel[~np.eye(3, 5, dtype=bool)]
    assert 0 < jnp.max(jnp.abs(off)) <= 0.01


def test_dropout_only_in_training(tiny: tuple[Model, Any, Any]) -> None:
    model, params, state = tiny
    inputs = make_inputs()
    texts = [model.embed(params, state, inputs, jax.random.key(k))[0].text for k in (0, 0, 1)]
    chex.assert_trees_all_equal(texts[0], texts[1])
    assert not np.allclose(texts[0], texts[2])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(tiny: tuple[Model, Any, Any]) -> None:
    model, params, state = tiny
    half = build_model(tiny_model("bfloat16"), 16, 40, 8)
    half_params, _ = jax.jit(half.init)(jax.random.key(0))
    chex.assert_trees_all_equal_dtypes(params, half_params)
    images = make_inputs().image
    a, b = (m.encode_image(params, state, images) for m in (model, half))
    chex.assert_type(b, jnp.float32)  # scores and losses are computed in full precision
    cosine = jnp.sum(a * b, axis=1)
    assert jnp.all(cosine > 0.99)
    assert not jnp.allclose(a, b, atol=1e-6)


def test_temperature_comes_back_from_its_clamp() -> None:
    grad = jax.grad(_clamp)
    low, high = jnp.array(-1.0), jnp.array(1.0)
    assert grad(0.5, low, high) == 1
    # Descent on +x pulls x back from above, descent on -x would push it further out.
    assert grad(3.0, low, high) == 1
    assert jax.grad(lambda x: -_clamp(x, low, high))(3.0) == 0
    assert grad(-3.0, low, high) == 0
    assert jax.grad(lambda x: -_clamp(x, low, high))(-3.0) == -1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig(image=EncoderConfig(name="resnet999")),
            "model.image.name='resnet999': choose",
        ),
        (
            ModelConfig(text=EncoderConfig(name="transformer", options={"depth": 3})),
            "model.text.options.depth: transformer takes activation, dropout, heads, layers, remat",
        ),
        (
            ModelConfig(text=EncoderConfig(name="transformer", options={"layers": "two"})),
            "model.text.options.layers='two': Input should be a valid integer",
        ),
        (ModelConfig(dtype="float64"), "JAX_ENABLE_X64"),
    ],
)
def test_unknown_choices_list_the_valid_ones(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config, 16, 40, 8)


def test_sizes_of_the_convnet_are_checked() -> None:
    uneven = ModelConfig(image=EncoderConfig(name="convnet", options={"widths": [8, 16]}))
    for config, size, message in [
        (uneven, 32, r"2 widths \(8, 16\) need as many depths"),
        (ModelConfig(), 12, "data.image_size=12 leaves no pixel for 3 stages: use 16 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(build_model(config, size, 40, 8).init, jax.random.key(0))
