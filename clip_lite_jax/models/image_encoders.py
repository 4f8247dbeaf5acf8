"""The image encoders that `model.image.name` can be."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn

from clip_lite_jax.models.convnet import ConvNet
from clip_lite_jax.models.efficientnet import EfficientNetLite
from clip_lite_jax.models.resnet import ClipResNet, ResNet
from clip_lite_jax.models.vit import ViT

# Width, layers and heads: DeiT (arXiv 2012.12877), table 1, and ViT (arXiv 2010.11929), table 1.
_VIT_SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def _vit(size: str, patch: int) -> partial[ViT]:
    width, layers, heads = _VIT_SIZES[size]
    return partial(ViT, patch=patch, width=width, layers=layers, heads=heads)


def _clip_vit(size: str, patch: int, head_width: int) -> partial[ViT]:
    return partial(
        _vit(size, patch),
        activation="quick_gelu",
        pre_norm=True,
        head_width=head_width,
        layer_norm_epsilon=1e-5,
    )


def _siglip_vit(size: str, patch: int) -> partial[ViT]:
    return partial(
        _vit(size, patch), activation="gelu_tanh", class_token=False, pooling="attention"
    )


IMAGE_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "efficientnet_lite0": EfficientNetLite,
    "resnet18": partial(ResNet, block="basic", layers=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block="basic", layers=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, layers=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, layers=(3, 4, 23, 3)),
    "resnet152": partial(ResNet, layers=(3, 8, 36, 3)),
    # Source of all named clip: CLIP (arXiv 2103.00020), tables 19 and 20.
    "clip_resnet50": partial(ClipResNet, layers=(3, 4, 6, 3)),
    "clip_resnet101": partial(ClipResNet, layers=(3, 4, 23, 3), head_width=512),
    "clip_resnet50x4": partial(
        ClipResNet, layers=(4, 6, 10, 6), width=80, heads=40, head_width=640
    ),
    "clip_resnet50x16": partial(
        ClipResNet, layers=(6, 8, 18, 8), width=96, heads=48, head_width=768
    ),
    "clip_resnet50x64": partial(
        ClipResNet, layers=(3, 15, 36, 10), width=128, heads=64, head_width=1024
    ),
    "clip_vit_b32": _clip_vit("b", 32, 512),
    "clip_vit_b16": _clip_vit("b", 16, 512),
    "clip_vit_l14": _clip_vit("l", 14, 768),
    # SigLIP (arXiv 2303.15343), section 4.1.
    "siglip_vit_b16": _siglip_vit("b", 16),
    "siglip_vit_l16": _siglip_vit("l", 16),
    **{f"vit_{size}{patch}": _vit(size, patch) for size in _VIT_SIZES for patch in (14, 16, 32)},
}
"""Preset name → a module of it; `model.image.options` overrides its fields."""
