"""Names that other projects give to the weights of vision transformers."""

from dataclasses import dataclass, replace
from functools import partial
from math import isqrt

import jax
import jax.numpy as jnp
import numpy as np

from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.models.vit import ViT
from clip_lite_jax.pretrained.names import (
    CONVOLUTION,
    LINEAR,
    SAME,
    Layout,
    Link,
    Naming,
    linear_links,
    norm_links,
)

BATCHED = Layout(lambda x: x[0], lambda x: x[None])
"""``[1, L, D]`` there, ``[L, D]`` here."""
TOKEN = Layout(lambda x: x[0, 0], lambda x: x[None, None])
"""``[1, 1, D]`` there, ``[D]`` here."""


def resize_position(position: np.ndarray, shape: tuple[int, ...], extra: int = 0) -> np.ndarray:
    """Position embeddings ``[L, D]`` for another number of patches: `shape` is ``[M, D]``.

    Bicubic, and smoothed where the grid gets smaller, as timm and open_clip do it.

    Args:
      extra: how many positions at the front, of a class token, belong to no patch.

    Raises:
      CheckpointError: patches that make no square; another width.
    """
    old, new = isqrt(len(position) - extra), isqrt(shape[0] - extra)
    squares = (old**2 + extra, new**2 + extra) == (len(position), shape[0])
    if position.shape[1:] != shape[1:] or not squares:
        raise CheckpointError(
            f"position embeddings of shape {position.shape} cannot be resized to {shape}: widths "
            "must be equal, and only square grids of patches are resized"
        )
    position = position.astype(np.float32)  # files of CLIP hold float16
    grid = jnp.asarray(position[extra:]).reshape(old, old, -1)
    resized = jax.image.resize(grid, (new, new, shape[1]), "cubic")
    return np.concatenate([position[:extra], np.asarray(resized).reshape(-1, shape[1])])


@dataclass(frozen=True)
class BlockNames:
    """What a project calls the parts of a pre-norm block."""

    norm1: str
    qkv: str  # up to "weight" and "bias"
    out: str
    norm2: str
    fc1: str
    fc2: str


TIMM = BlockNames("norm1", "attn.qkv.", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
CLIP = BlockNames("ln_1", "attn.in_proj_", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
TORCHVISION = BlockNames(
    "ln_1", "self_attention.in_proj_", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3"
)
# The files that torchvision publishes; it renames their weights when it loads them.
TORCHVISION_FILES = replace(TORCHVISION, fc1="mlp.linear_1", fc2="mlp.linear_2")


def block_links(layers: int, block: str, names: BlockNames) -> list[Link]:
    """Of `models.layers.Block`, ``blocks_0`` and so on; `block` is ``"blocks.{}"`` or the like."""
    links = []
    for n in range(layers):
        ours, theirs = f"blocks_{n}", block.format(n)
        links += norm_links(f"{ours}/norm1", f"{theirs}.{names.norm1}")
        qkv = f"{theirs}.{names.qkv}"
        links.append(Link(f"params/{ours}/qkv/kernel", f"{qkv}weight", LINEAR))
        links.append(Link(f"params/{ours}/qkv/bias", f"{qkv}bias"))
        links += linear_links(f"{ours}/out", f"{theirs}.{names.out}")
        links += norm_links(f"{ours}/norm2", f"{theirs}.{names.norm2}")
        links += linear_links(f"{ours}/fc1", f"{theirs}.{names.fc1}")
        links += linear_links(f"{ours}/fc2", f"{theirs}.{names.fc2}")
    return links


def vit_namings(module: ViT) -> tuple[Naming, ...]:
    """Of timm, torchvision and CLIP, as far as each has such a vision transformer."""
    namings = []
    if module.head_width is None:
        namings.append(_timm(module))
        if module.pooling == "class" and not module.pre_norm:
            blocks = "encoder.layers.encoder_layer_{}"
            for name, names in (
                ("torchvision", TORCHVISION),
                ("torchvision's files", TORCHVISION_FILES),
            ):
                links = _ends(module, "conv_proj", "encoder.pos_embedding", BATCHED, "encoder.ln")
                links.append(Link("params/class_token", "class_token", TOKEN))
                links += block_links(module.layers, blocks, names)
                namings.append(Naming(name, tuple(links), r"^heads\."))
    if module.pooling != "attention" and module.class_token and module.pre_norm:
        namings.append(_clip(module))
    return tuple(namings)


def _timm(module: ViT) -> Naming:
    links = _ends(module, "patch_embed.proj", "pos_embed", BATCHED, "norm")
    if module.class_token:
        links.append(Link("params/class_token", "cls_token", TOKEN))
    if module.pre_norm:
        links += norm_links("norm_pre", "norm_pre")
    links += block_links(module.layers, "blocks.{}", TIMM)
    if module.pooling == "attention":
        links.append(Link("params/pool/query", "attn_pool.latent", TOKEN))
        for part in ("q", "kv"):
            links += linear_links(f"pool/{part}", f"attn_pool.{part}")
        links += linear_links("pool/out", "attn_pool.proj")
        links += norm_links("pool/norm", "attn_pool.norm")
        for part in ("fc1", "fc2"):
            links += linear_links(f"pool/{part}", f"attn_pool.mlp.{part}")
    return Naming("timm", tuple(links), r"^head\.")


def _clip(module: ViT) -> Naming:
    links = _ends(module, "conv1", "positional_embedding", SAME, "ln_post")
    links.append(Link("params/class_token", "class_embedding"))
    links += norm_links("norm_pre", "ln_pre")
    links += block_links(module.layers, "transformer.resblocks.{}", CLIP)
    if module.head_width is None:
        return Naming("CLIP", tuple(links), "^proj$")
    links.append(Link("params/proj/kernel", "proj"))
    return Naming("CLIP", tuple(links))


def _ends(module: ViT, patches: str, position: str, layout: Layout, norm: str) -> list[Link]:
    """What stands before and after the blocks in every project."""
    resize = partial(resize_position, extra=int(module.class_token))
    return [
        *linear_links("patches", patches, CONVOLUTION, bias=not module.pre_norm),
        Link("params/position", position, layout, resize),
        *norm_links("norm", norm),
    ]
