"""Names that other projects give to the weights of residual networks."""

from collections.abc import Sequence
from functools import partial

from clip_lite_jax.models.resnet import ClipResNet, ResNet
from clip_lite_jax.pretrained.names import CONVOLUTION, Link, Naming, linear_links, norm_links
from clip_lite_jax.pretrained.vit import resize_position

_convolution = partial(linear_links, layout=CONVOLUTION, bias=False)
_norm = partial(norm_links, running=True)
_COUNTER = r"\.num_batches_tracked$"


def resnet_namings(module: ResNet) -> tuple[Naming, ...]:
    """torchvision's names, which are timm's too, and Detectron2's."""
    convolutions, projected = (2, False) if module.block == "basic" else (3, True)
    torchvision = [*_convolution("conv1", "conv1"), *_norm("bn1", "bn1")]
    torchvision += _torchvision_blocks(module.layers, convolutions, projected)
    detectron2 = [*_convolution("conv1", "stem.conv1"), *_norm("bn1", "stem.conv1.norm")]
    detectron2 += _blocks(
        module.layers, convolutions, projected, "res", 2, "conv{}.norm", "shortcut", "shortcut.norm"
    )
    return (
        Naming("torchvision", tuple(torchvision), rf"^fc\.|{_COUNTER}"),
        Naming("detectron2", tuple(detectron2), rf"^stem\.fc\.|{_COUNTER}"),
    )


def clip_resnet_namings(module: ClipResNet) -> tuple[Naming, ...]:
    """Of OpenAI's CLIP and of open_clip."""
    links = []
    for n in (1, 2, 3):
        links += [*_convolution(f"conv{n}", f"conv{n}"), *_norm(f"bn{n}", f"bn{n}")]
    links += _torchvision_blocks(module.layers, 3, True)
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "c_proj")):
        links += linear_links(f"attnpool/{ours}", f"attnpool.{theirs}")
    position = "attnpool.positional_embedding"
    resize = partial(resize_position, extra=1)
    links.append(Link("params/attnpool/position", position, resize=resize))
    return (Naming("CLIP", tuple(links), _COUNTER),)


def _torchvision_blocks(layers: Sequence[int], convolutions: int, projected: bool) -> list[Link]:
    return _blocks(
        layers, convolutions, projected, "layer", 1, "bn{}", "downsample.0", "downsample.1"
    )


def _blocks(
    layers: Sequence[int],
    convolutions: int,
    projected: bool,
    stage_name: str,
    first: int,
    norm: str,
    shortcut: str,
    shortcut_norm: str,
) -> list[Link]:
    """Of the blocks of all stages.

    Args:
      projected: the shortcut of the first stage is a convolution, as in all later stages.
      stage_name, first: stages are called ``layer1``, ``layer2``, ... or ``res2``, ``res3``, ...
      norm: what the normalisation of a block's n-th convolution is called.
    """
    links = []
    for stage, depth in enumerate(layers):
        for block in range(depth):
            ours, theirs = f"layer{stage + 1}_{block}", f"{stage_name}{stage + first}.{block}"
            for n in range(1, convolutions + 1):
                links += _convolution(f"{ours}/conv{n}", f"{theirs}.conv{n}")
                links += _norm(f"{ours}/bn{n}", f"{theirs}.{norm.format(n)}")
            if block == 0 and (stage > 0 or projected):
                links += _convolution(f"{ours}/downsample_conv", f"{theirs}.{shortcut}")
                links += _norm(f"{ours}/downsample_bn", f"{theirs}.{shortcut_norm}")
    return links
