"""Image encoders compute what those of other projects do, however they are run."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_references import (
    REFERENCE,
    SMALL_VIT,
    assert_close,
    evaluate,
    generate,
    naming_of,
    noise,
    shapes,
)

from clip_lite_jax.config import EncoderConfig, ModelConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models import build_model
from clip_lite_jax.models.efficientnet import EfficientNetLite
from clip_lite_jax.models.layers import attention
from clip_lite_jax.models.resnet import ClipResNet, ResNet
from clip_lite_jax.models.vit import ViT, drop_patches
from clip_lite_jax.pretrained.names import read, write

CLIP: dict[str, Any] = {"pre_norm": True, "layer_norm_epsilon": 1e-5, "head_width": 16}


def train(module: nn.Module, variables: Any, images: Any, **more: Any) -> Any:
    """Features and new running statistics."""

    def step(variables: Any, images: Any, more: Any) -> Any:
        return module.apply(variables, images, train=True, mutable=["batch_stats"], **more)

    return jax.jit(step)(variables, images, more)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_residual_networks_equal_torchvision(block: Any) -> None:
    module = ResNet(block=block, layers=(2, 1, 1, 1))
    variables = generate(module, 64, "torchvision")
    features = evaluate(module, variables, noise(4, 64))
    assert_close(features[:, ::8], REFERENCE[f"resnet/{block}/eval"])
    features, updated = train(module, variables, noise(4, 64))
    assert_close(features[:, ::8], REFERENCE[f"resnet/{block}/train"])
    after = write(naming_of(module, "torchvision"), variables | updated)
    running = np.stack([after[name][:8] for name in sorted(after) if "running" in name])
    assert_close(running, REFERENCE[f"resnet/{block}/running"])


def test_clip_residual_networks_equal_open_clip() -> None:
    module = ClipResNet(layers=(2, 1, 1, 1), width=8, heads=4, head_width=24)
    variables = generate(module, 64, "CLIP")
    assert_close(evaluate(module, variables, noise(4, 64)), REFERENCE["clip_resnet/eval"])
    assert_close(train(module, variables, noise(4, 64))[0], REFERENCE["clip_resnet/train"])
    with pytest.raises(ConfigError, match="data.image_size=48: .* multiples of 32"):
        shapes(module, 48)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/class", {}),
        ("timm/mean", {"pooling": "mean"}),
        ("timm/attention_class", {"pooling": "attention"}),
        (
            "timm/attention",
            {"pooling": "attention", "class_token": False, "activation": "gelu_tanh"},
        ),
        ("torchvision/vit", {"mlp_width": 40}),
        ("CLIP/gelu", CLIP),
        ("CLIP/quick_gelu", CLIP | {"activation": "quick_gelu"}),
    ],
)
def test_vision_transformers_equal_their_sources(name: str, options: dict[str, Any]) -> None:
    module = ViT(**SMALL_VIT, **options)
    variables = generate(module, 32, name.split("/", maxsplit=1)[0])
    assert_close(evaluate(module, variables, noise(2, 32)), REFERENCE[name])


def test_efficientnet_equals_its_source() -> None:
    module = EfficientNetLite()
    variables = generate(module, 64, "efficientnet-lite-pytorch")
    features = evaluate(module, variables, noise(2, 64))
    assert_close(features[:, ::8], REFERENCE["efficientnet/eval"])


def test_layers_in_a_scan_are_the_same_function() -> None:
    """With and without remat, values and gradients; names are the same in files."""
    images, plain = noise(2, 32), ViT(**SMALL_VIT, pooling="attention")
    naming = naming_of(plain, "timm")
    variables = generate(plain, 32, "timm")
    weights = write(naming, variables)
    expected = value_and_grad(plain, variables, images)
    for options in ({}, {"remat": "full"}, {"remat": "dots"}):
        for scan in (False, True):
            module = plain.clone(scan=scan, **options)
            own = read([naming], weights, shapes(module, 32), "file")
            chex.assert_trees_all_equal(write(naming, own), weights)
            value, gradient = value_and_grad(module, own, images)
            chex.assert_trees_all_close(value, expected[0], rtol=1e-5)
            chex.assert_trees_all_close(
                write(naming, gradient), write(naming, expected[1]), rtol=1e-3, atol=1e-5
            )


def value_and_grad(module: nn.Module, variables: Any, images: Any) -> Any:
    def loss(variables: Any) -> Any:
        features = module.apply(variables, images, train=True, mutable=["batch_stats"])[0]
        return jnp.sum(jnp.sin(features))

    return jax.jit(jax.value_and_grad(loss))(variables)


@pytest.mark.parametrize(
    "module", [ResNet(layers=(2, 1), width=8), ClipResNet(layers=(2,), width=16, heads=2)]
)
def test_residual_blocks_computed_again_are_the_same(module: Any) -> None:
    variables = jax.jit(module.init)(jax.random.key(0), noise(2, 32))
    again = value_and_grad(module.clone(remat=True), variables, noise(2, 32))
    chex.assert_trees_all_close(
        again, value_and_grad(module, variables, noise(2, 32)), rtol=1e-4, atol=1e-5
    )


def test_blocks_can_start_as_the_identity() -> None:
    images = noise(2, 32)
    deep, shallow = (
        ResNet(block="basic", layers=(n,), width=8, zero_init_residual=True) for n in (3, 1)
    )
    variables = jax.jit(deep.init)(jax.random.key(0), images)
    chex.assert_trees_all_close(
        deep.apply(variables, images), shallow.apply(variables, images), rtol=1e-6
    )


def test_patch_dropout_leaves_out_other_patches_of_every_image() -> None:
    patches = np.broadcast_to(np.arange(20.0), (3, 20))[..., None]
    kept = drop_patches(patches, 0.75, jax.random.key(0))[..., 0]
    assert kept.shape == (3, 5)
    assert all(len(set(row)) == 5 for row in kept.tolist())
    assert len({tuple(sorted(row)) for row in kept.tolist()}) == 3
    assert drop_patches(patches, 0.99, jax.random.key(0)).shape == (3, 1, 1)


def test_patch_dropout_keeps_the_class_token_and_is_for_training() -> None:
    images, module = noise(2, 32), ViT(**SMALL_VIT | {"layers": 0}, patch_dropout=0.5)
    variables = generate(module, 32, "timm")
    keys = [{"dropout": jax.random.key(n)} for n in (0, 1)]
    # With no layers the class token has seen no patch.
    first = module.apply(variables, images, train=True, rngs=keys[0])
    chex.assert_trees_all_close(first, module.apply(variables, images), rtol=1e-6)
    mean = module.clone(pooling="mean")
    one, other = (mean.apply(variables, images, train=True, rngs=key) for key in keys)
    assert not np.allclose(one, other)
    whole = mean.clone(patch_dropout=0.0).apply(variables, images)
    chex.assert_trees_all_equal(mean.apply(variables, images), whole)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet18", {"layers": [1, 1], "width": 16}, 32),
        ("clip_resnet50", {"layers": [1, 1, 1, 1], "width": 16, "heads": 4, "head_width": 32}, 32),
        ("clip_vit_b32", {"patch": 8, "width": 48, "layers": 2, "heads": 4, "head_width": 32}, 32),
        ("siglip_vit_b16", {"patch": 8, "width": 48, "layers": 2, "heads": 4, "scan": True}, 32),
        ("efficientnet_lite0", {}, 64),
    ],
)
def test_bfloat16_is_close_to_float32(name: str, options: dict[str, Any], size: int) -> None:
    models = [
        build_model(
            ModelConfig(image=EncoderConfig(name=name, options=options), dtype=dtype), size, 40, 8
        )
        for dtype in ("float32", "bfloat16")
    ]
    exact, half = (model.module.image_encoder for model in models)
    variables = jax.jit(exact.init)(jax.random.key(0), noise(1, size))
    chex.assert_trees_all_equal_dtypes(variables, shapes(half, size))
    a, b = (evaluate(module, variables, noise(3, size)) for module in (exact, half))
    chex.assert_type([a, b], [jnp.float32, jnp.bfloat16])
    b = b.astype(jnp.float32)
    cosine = jnp.sum(a * b, 1) / jnp.linalg.norm(a, axis=1) / jnp.linalg.norm(b, axis=1)
    assert jnp.all(cosine > 0.999)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 5e-6), ("float32", 5e-6), ("bfloat16", 0.04)]
)
def test_attention_is_that_of_jax(dtype: str, tolerance: float, causal: bool) -> None:
    rng = np.random.default_rng(0)
    single = jnp.asarray(rng.normal(size=(3, 2, 5, 3, 4)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(1, 3, 5, 5)), jnp.float32)
    mask = jnp.asarray(np.arange(5) < [[5], [2]])[:, None, None]
    for some, added in ((None, None), (mask, None), (mask, bias)):

        def ours(qkv: Any, some: Any = some, added: Any = added) -> Any:
            return attention(*qkv, some, causal, added)

        def theirs(qkv: Any, some: Any = some, added: Any = added) -> Any:
            return jax.nn.dot_product_attention(*qkv, added, some, is_causal=causal)

        expected = theirs(single), jax.grad(lambda x, f=theirs: jnp.sum(f(x) ** 2))(single)
        with jax.enable_x64(True):
            qkv = single.astype(dtype)
            found = ours(qkv), jax.grad(lambda x, f=ours: jnp.sum(f(x) ** 2))(qkv)
            chex.assert_type(found, jnp.dtype(dtype))
            found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
        chex.assert_trees_all_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_b32", {}, "data.image_size=48 does not divide into patches of 32 pixels"),
        ("vit_b16", {"heads": 5}, "width=768 does not divide into heads=5"),
        ("vit_b16", {"class_token": False}, "pooling='class' needs class_token=True"),
        ("vit_b16", {"remat": "some"}, "options.remat='some': Input should be 'none', 'full'"),
        ("resnet50", {"batch_norm": "local"}, "options.batch_norm='local': Input should be 'gl"),
        ("resnet50", {"depth": 3}, "options.depth: resnet50 takes batch_groups, batch_norm, block"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    config = ModelConfig(image=EncoderConfig(name=name, options=options))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(build_model(config, 48, 40, 8).init, jax.random.key(0))
