"""Heat maps against gradients that do not come from them, and what they must not change."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clip_lite_jax.config import CriticConfig, EncoderConfig, ModelConfig
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.inference import load
from clip_lite_jax.models import Model, build_model, convnet, resnet, vit
from clip_lite_jax.models.heat_maps import heat_maps
from clip_lite_jax.models.layers import Block
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_step import make_encode_fns

SIZE, TOKENS = 16, 4
VIT = {"patch": 4, "width": 8, "layers": 2, "heads": 2}


def built(
    image: str, options: dict[str, Any], critic: str = "dot", size: int = SIZE
) -> tuple[Model, Any, Any]:
    """A small model with random parameters, those that start at zero too.

    Not from `init`, which compiles; its shapes are all that is needed.
    """
    critic_options: dict[str, Any] = {"width": 8, "hidden": 8}
    config = ModelConfig(
        image=EncoderConfig(name=image, options=options),
        text=EncoderConfig(name="transformer", options={"width": 8, "layers": 1, "heads": 2}),
        critic=CriticConfig(name=critic, options=critic_options),
    )
    model = build_model(config, size, 20, TOKENS)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        around_one = path[-1].key in ("scale", "var")
        return (around_one + 0.3 * rng.uniform(-1, 1, leaf.shape)).astype(leaf.dtype)

    params, state = jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(model.init, jax.random.key(0))
    )
    return model, params, state


def maps_of(model: Model, *arguments: Any) -> np.ndarray:
    return np.asarray(jax.jit(partial(heat_maps, model))(*arguments))


def batch(count: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    tokens = rng.integers(0, 20, (count, TOKENS)).astype(np.int32)
    return images, tokens, np.ones((count, TOKENS), bool)


def cam(weights: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``[B, C]`` and ``[B, h, w, C]`` → ``[B, h, w]``, in loops."""
    out = np.zeros(places.shape[:3])
    for b, y, x in np.ndindex(*out.shape):
        total = sum(weights[b, c] * places[b, y, x, c] for c in range(places.shape[3]))
        out[b, y, x] = max(0.0, float(total))
    return out


def projected_and_caught(model: Model, params: Any, state: Any, module: Any) -> Any:
    """The projections of images, what the last module of a kind gave for them, and of texts."""
    size = model.image_size

    @jax.jit
    def run(params: Any, images: Any, tokens: Any, mask: Any) -> Any:
        caught: list[Any] = []

        def catch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result = next_fun(*args, **kwargs)
            if isinstance(context.module, module):
                caught.append(result)
            return result

        with nn.intercept_methods(catch):
            projected = model.encode_image(params, state, images)
        return projected, caught[-1], model.encode_text(params, state, tokens, mask)

    return run(params, *batch(2, size))


def test_convnet_equals_finite_differences_of_its_head_in_numpy() -> None:
    model, params, state = built("convnet", {"widths": [4, 6], "depths": [1, 1]})
    images, tokens, mask = batch(2)
    found = maps_of(model, params, state, images, tokens, mask)
    encoder, critic = params["image_encoder"], params["critic"]
    projected, caught, text = projected_and_caught(model, params, state, convnet.ResidualBlock)
    places, text = np.asarray(caught, np.float64), np.asarray(text, np.float64)

    def norm(x: np.ndarray, p: Any) -> np.ndarray:
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        return x * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)

    def dense(x: np.ndarray, p: Any) -> np.ndarray:
        y = x @ np.asarray(p["kernel"], np.float64)
        return y + np.asarray(p["bias"], np.float64) if "bias" in p else y

    block = critic["image_block"]
    (outer,) = [name for name in encoder if name.startswith("LayerNorm")][-1:]

    def score(row: int, activations: np.ndarray) -> float:
        x = norm(activations.mean(axis=(0, 1)), encoder[outer])
        h = np.maximum(norm(dense(x, block["Dense_0"]), block["LayerNorm_0"]), 0)
        y = norm(dense(h, block["Dense_1"]) + dense(x, block["Dense_2"]), block["LayerNorm_1"])
        temperature = np.clip(np.exp(float(critic["log_temperature"])), 0.01, 1.0)
        cosine = y @ text[row] / np.linalg.norm(y)
        return float(cosine / temperature + float(critic["score_bias"]))

    expected = np.asarray(model.critic(params).pairs(projected, text.astype(np.float32)))
    np.testing.assert_allclose([score(b, places[b]) for b in range(2)], expected, rtol=1e-4)
    gradient = np.zeros_like(places)
    for index in np.ndindex(*places.shape):
        up, down = places.copy(), places.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        gradient[index] = (score(index[0], up[index[0]]) - score(index[0], down[index[0]])) / 2e-5
    np.testing.assert_allclose(found, cam(gradient.mean((1, 2)), places), rtol=2e-3, atol=1e-5)
    assert found.max() > 0


def test_equals_cam_where_pooling_and_critic_are_linear() -> None:
    """CAM (arXiv 1512.04150): with a mean over places and a linear score, weights are known."""
    options = {"layers": [1, 1, 1, 1], "width": 4, "block": "basic"}
    model, params, state = built("resnet18", options, "bilinear", size=64)
    images, tokens, mask = batch(2, size=64)
    found = maps_of(model, params, state, images, tokens, mask)
    _, places, text = projected_and_caught(model, params, state, resnet.BasicBlock)
    kernel = np.asarray(params["critic"]["image_layers_0"]["kernel"])  # [C, D]
    weights = np.asarray(text) @ kernel.T / (2 * 2)
    np.testing.assert_allclose(found, cam(weights, np.asarray(places)), rtol=1e-3, atol=1e-5)
    assert found.shape == (2, 2, 2)
    assert found.max() > 0


def changed_input(
    model: Model, params: Any, state: Any, images: np.ndarray, of: Any, change: Any
) -> tuple[np.ndarray, Any]:
    """The projection when what enters a module is changed, and what entered it."""
    seen: list[Any] = []

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if of(context.module) and context.method_name == "__call__":
            seen.append(args[0])
            args = (change(args[0]), *args[1:])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return model.encode_image(params, state, images), seen[0]


CASES: dict[str, tuple[str, dict[str, Any], int, int, Any]] = {
    # Name, options, size, tokens before the patches, and the module that its places enter.
    "class token": ("vit_b16", VIT, 16, 1, lambda m: m.name == "blocks_1" and type(m) is Block),
    "attention pool": (
        "siglip_vit_b16",
        VIT,
        16,
        0,
        lambda m: m.name == "blocks_1" and type(m) is Block,
    ),
    "CLIP's ResNet": (
        "clip_resnet50",
        {"layers": [1, 1, 1, 1], "width": 4, "heads": 2, "head_width": 8},
        64,
        0,
        lambda m: isinstance(m, resnet.AttentionPool),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_differences_of_what_enters_it(case: str) -> None:
    """The mean over places of a gradient is how T moves when a channel rises everywhere."""
    name, options, size, before, module = CASES[case]
    text_layers = lambda m: module(m) and "image_encoder" in m.path  # noqa: E731
    model, params, state = built(name, options, size=size)
    images, tokens, mask = batch(2, size)
    found = maps_of(model, params, state, images, tokens, mask)

    def places_of(x: Any) -> Any:
        if x.ndim == 4:
            return x
        side = size // 4
        return x[:, before:].reshape(x.shape[0], side, side, -1)

    @jax.jit
    def scores(added: Any) -> tuple[Any, Any]:
        def change(x: Any) -> Any:
            return x + added if x.ndim == 4 else x.at[:, before:].add(added)

        image, entered = changed_input(model, params, state, images, text_layers, change)
        text = model.encode_text(params, state, tokens, mask)
        return model.critic(params).pairs(image, text), entered

    _, entered = scores(jnp.zeros(()))
    channels = entered.shape[-1]
    step = 1e-2
    slopes = []
    for channel in range(channels):
        one = jnp.zeros(channels).at[channel].set(step)
        slopes.append((scores(one)[0] - scores(-one)[0]) / (2 * step))
    places = np.asarray(places_of(entered), np.float64)
    weights = np.stack(slopes, axis=1) / (places.shape[1] * places.shape[2])
    expected = cam(weights, places)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.01 * expected.max())
    assert found.max() > 0


def test_scanned_blocks_give_the_same() -> None:
    model, params, state = built("vit_b16", VIT)
    scanned, _, _ = built("vit_b16", VIT | {"scan": True})
    inputs = batch(2)
    encoder = dict(params["image_encoder"])
    layers = [encoder.pop(f"blocks_{n}") for n in range(2)]
    encoder["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    scanned_params = params | {"image_encoder": encoder}
    both = (
        maps_of(model, params, state, *inputs),
        maps_of(scanned, scanned_params, state, *inputs),
    )
    np.testing.assert_allclose(both[0], both[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        (convnet, "convnet", {"widths": [4, 6], "depths": [1, 1]}),
        (vit, "vit_b16", VIT | {"patch_dropout": 0.5}),
    ],
)
def test_marks_leave_parameters_and_programs_as_they_were(
    module: Any, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything() -> tuple[Any, Any, str]:
        model, params, state = built(name, options)
        inputs = model.example_inputs(2)

        def loss(params: Any) -> Any:
            embedded, _ = model.embed(params, state, inputs, jax.random.key(1))
            return jnp.sum(model.critic(params).pairs(embedded.image, embedded.text))

        return params, state, jax.jit(jax.grad(loss)).lower(params).as_text()

    params, state, program = everything()
    assert not set(state) & {"perturbations", "intermediates"}
    monkeypatch.setattr(module, "mark_places", lambda _, x: x)
    if module is vit:
        monkeypatch.setattr(vit.ViT, "_marked", lambda self, x, grid: x)
    without, state_without, program_without = everything()
    assert jax.tree.structure((params, state)) == jax.tree.structure((without, state_without))
    assert program == program_without


def test_efficientnet_marks_its_last_cells() -> None:
    model, params, state = built("efficientnet_lite0", {}, size=64)
    maps = jax.eval_shape(partial(heat_maps, model), params, state, *batch(3, 64))
    assert (maps.shape, maps.dtype) == ((3, 2, 2), jnp.float32)


def test_frozen_towers_have_maps() -> None:
    model, params, state = built("convnet", {"widths": [4, 6], "depths": [1, 1]})
    inputs = batch(2)
    frozen = maps_of(model.freeze(("image", "text")), params, state, *inputs)
    np.testing.assert_array_equal(frozen, maps_of(model, params, state, *inputs))
    assert frozen.max() > 0


def test_features_have_no_places() -> None:
    model, params, state = built("convnet", {"widths": [4, 6], "depths": [1, 1]})
    with pytest.raises(ConfigError, match=r"not features of shape \[2, 6\]"):
        maps_of(model, params, state, np.zeros((2, 6), np.float32), *batch(2)[1:])
    none, params, state = built("vit_b16", VIT | {"layers": 0})
    with pytest.raises(ConfigError, match="no map of places"):
        maps_of(none, params, state, *batch(2))


def test_eight_devices_equal_one() -> None:
    model, params, state = built("convnet", {"widths": [4, 6], "depths": [1, 1]})
    inputs = batch(5)  # does not divide
    one, eight = (
        make_encode_fns(model, build_mesh(jax.devices()[:count]))(params, state).heat_maps(*inputs)
        for count in (1, 8)
    )
    assert eight.shape == (5, 2, 2)
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-7)


def test_maps_are_in_pixels_of_the_picture(finished_run: Path) -> None:
    model = load(finished_run, batch_size=8)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (high, wide, 3)).astype(np.uint8))
        for high, wide in ((40, 24), (24, 40), (20, 20))
    ]
    texts = ["a red circle", "ring in blue", "a bar"]
    maps = model.heat_map(pictures, texts)
    assert [one.shape for one in maps] == [(40, 24), (24, 40), (20, 20)]
    small = np.asarray(
        model.fns.heat_maps(
            np.stack([model.pixels.view(Opened.of(one)) for one in pictures]),
            *model.tokenizer(texts),
        )
    )
    for heat, cells, side in zip(maps, small, (24, 24, 20), strict=True):
        view = Image.fromarray(cells.astype(np.float32)).resize((side, side), Image.BILINEAR)
        high, wide = heat.shape
        top, left = (high - side) // 2, (wide - side) // 2
        inside = heat[top : top + side, left : left + side]
        np.testing.assert_allclose(inside, np.asarray(view), rtol=1e-4, atol=1e-6)
        assert heat.sum() == pytest.approx(inside.sum(), rel=1e-5)
    with pytest.raises(ValueError, match="one text per image"):
        model.heat_map(pictures, ["one"])
    assert model.heat_map([], []) == []
