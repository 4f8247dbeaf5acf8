"""Checkpoints of the published PyTorch CLIP-Lite (github.com/4m4n5/CLIP-Lite), as our models."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from clip_lite_jax.config import (
    Config,
    CriticConfig,
    DataConfig,
    EncoderConfig,
    ModelConfig,
    ObjectiveConfig,
    Options,
)
from clip_lite_jax.data.tokenizer import load_tokenizer
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.models import Model, build_model
from clip_lite_jax.models.critics import ConcatCritic, DotCritic, PriorDiscriminator
from clip_lite_jax.pretrained.files import read_weights
from clip_lite_jax.pretrained.names import (
    LINEAR,
    Layout,
    Link,
    Naming,
    Weights,
    linear_links,
    norm_links,
    read,
    write,
)
from clip_lite_jax.pretrained.towers import IMAGENET, NAMINGS, read_tower

IMAGE, TEXT = "image_encoder.img_encoder.", "text_encoder.strans."
CRITICS = {
    "critic": "loss.global_d.",
    "visual_critic": "loss.visual_d.",
    "textual_critic": "loss.textual_d.",
}
PRIORS = {"image_prior": "loss.prior_d.", "text_prior": "loss.text_prior_d."}

RESNETS: dict[tuple[int, tuple[int, ...]], str] = {
    (2, (2, 2, 2, 2)): "resnet18",
    (2, (3, 4, 6, 3)): "resnet34",
    (3, (3, 4, 6, 3)): "resnet50",
    (3, (3, 4, 23, 3)): "resnet101",
    (3, (3, 8, 36, 3)): "resnet152",
}
"""By convolutions of a block and blocks of a stage."""

# The published critics, in options of ours.
DOT: Options = {"width": 2048, "hidden": 2048, "norm": "batch", "noisy_identity": True}
CONCAT: Options = {"hidden": 512, "layers": 2}

NEGATED = Layout(np.negative, np.negative)
"""The logarithm of 1 / temperature there, of the temperature here."""


def load_clip_lite(path: str | Path, config: Mapping[str, Any] | None = None) -> DualEncoderModel:
    """The model in a checkpoint of the published code, a ``.pth`` file with its ``model`` inside.

    See `from_state_dict` for `config`; what it leaves out is read off the weights.
    """
    return from_state_dict(read_weights(path), config or {}, str(path))


def from_state_dict(
    weights: Weights, config: Mapping[str, Any], source: str = "the state dict"
) -> DualEncoderModel:
    """The model that a state dict of the published code holds.

    Args:
      config: any of ``image_encoder`` ("resnet50"), ``text_layers``, ``text_model`` (a name with
        "mpnet" in it, or BERT), ``critic`` ("dot", "concat", "condot", "dotcon"),
        ``feature_size``, ``visual_ssl``, ``text_ssl``, ``prior_weight``, ``image_prior``,
        ``text_prior``, ``tokenizer`` (a file or folder; without it texts are given as ids),
        ``image_size`` (224) and ``max_tokens`` (30).

    Raises:
      CheckpointError: the weights are no CLIP-Lite, or lack a tensor.
      ConfigError: `config` contradicts the weights; both values are named.
    """
    weights = {name.removeprefix("module."): array for name, array in weights.items()}
    found = _architecture(weights, source)
    others = {"prior_weight": 0.1, "tokenizer": None, "image_size": 224, "max_tokens": 30}
    for key, value in config.items():
        if key not in found and key not in others:
            known = ", ".join(sorted({*found, *others}))
            raise ConfigError(f"config key {key!r}: choose from {known}")
        stated = ("mpnet" if "mpnet" in str(value) else "bert") if key == "text_model" else value
        if key in found and stated != found[key]:
            raise ConfigError(f"config {key}={value!r}, but {source} holds {found[key]!r}")
    settings = {**others, **config, **found}
    full = _config(settings)
    tokenizer = None
    if settings["tokenizer"]:
        tokenizer = load_tokenizer(settings["tokenizer"], full.data)
    words = weights[f"{TEXT}embeddings.word_embeddings.weight"].shape[0]
    model = build_model(
        full.model, full.data.image_size, words, full.data.max_tokens, full.objective
    )
    params, model_state = _read_model(model, weights, source)
    return DualEncoderModel(full, model, params, model_state, tokenizer)


def to_state_dict(model: Model, params: Any, model_state: Any) -> dict[str, np.ndarray]:
    """The weights under the published names: the inverse of `from_state_dict`.

    Raises:
      CheckpointError: encoders or critics that the published code does not have.
    """
    result: dict[str, np.ndarray] = {}
    for prefix, tower in ((IMAGE, "image_encoder"), (TEXT, "text_encoder")):
        own = _tower(params, model_state, tower)
        module = getattr(model.module, tower)
        if type(module) not in NAMINGS:
            raise CheckpointError(f"the published code has no {type(module).__name__}")
        naming = NAMINGS[type(module)](module)[0]
        result |= {prefix + name: array for name, array in write(naming, own).items()}
    for name, prefix in {**CRITICS, **PRIORS}.items():
        module = getattr(model.module, name)
        if module is not None:
            plain = write(_naming(module, source=name), _tower(params, model_state, name))
            result |= {prefix + n: array for n, array in _joined(plain).items()}
    return result


def _architecture(weights: Weights, source: str) -> dict[str, Any]:
    """What the names and shapes say."""
    stages = tuple(_count(weights, rf"{re.escape(IMAGE)}layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    convolutions = 3 if f"{IMAGE}layer1.0.conv3.weight" in weights else 2
    text_layers = _count(weights, rf"{re.escape(TEXT)}encoder\.layer\.(\d+)\.")
    across, *within = (_kind(weights, prefix) for prefix in CRITICS.values())
    if (convolutions, stages) not in RESNETS or not text_layers or across is None:
        some = ", ".join(sorted(weights)[:3])
        raise CheckpointError(
            f"{source} is no checkpoint of CLIP-Lite: it needs a ResNet under {IMAGE}*, a BERT or "
            f"MPNet under {TEXT}* and a critic under {CRITICS['critic']}*; it has {some}, ..."
        )
    mixed = any(kind not in (None, across) for kind in within)
    mpnet = f"{TEXT}encoder.relative_attention_bias.weight" in weights
    return {
        "image_encoder": RESNETS[convolutions, stages],
        "feature_size": 512 if convolutions == 2 else 2048,
        "text_layers": text_layers,
        "text_model": "mpnet" if mpnet else "bert",
        "critic": {"dot": "dotcon", "concat": "condot"}[across] if mixed else across,
        "visual_ssl": within[0] is not None,
        "text_ssl": within[1] is not None,
        "image_prior": f"{PRIORS['image_prior']}l0.weight" in weights,
        "text_prior": f"{PRIORS['text_prior']}l0.weight" in weights,
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number in the names that match."""
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _kind(weights: Weights, prefix: str) -> str | None:
    if f"{prefix}temperature" in weights:
        return "dot"
    return "concat" if f"{prefix}l0.weight" in weights else None


def _config(settings: Mapping[str, Any]) -> Config:
    """The published model as a configuration of ours."""
    critics = {"dot": DOT, "dotcon": DOT, "concat": CONCAT, "condot": CONCAT}
    kind = settings["critic"]
    own = {"condot": "dot", "dotcon": "concat"}.get(kind, kind)
    names: tuple[Literal["image", "text"], ...] = ("image", "text")
    priors = tuple(name for name in names if settings[f"{name}_prior"])
    return Config(
        name="CLIP-Lite",
        steps=1,
        batch_size=1,
        data=DataConfig(
            image_size=settings["image_size"],
            max_tokens=settings["max_tokens"],
            caption_normalization="published",
        ),
        model=ModelConfig(
            image=EncoderConfig(name=settings["image_encoder"]),
            text=EncoderConfig(
                name=settings["text_model"],
                options={"layers": settings["text_layers"]},
            ),
            critic=CriticConfig(name=kind, options=critics[kind]),
            pixel_mean=IMAGENET[0],
            pixel_std=IMAGENET[1],
        ),
        objective=ObjectiveConfig(
            visual_weight=float(settings["visual_ssl"]),
            textual_weight=float(settings["text_ssl"]),
            self_critic=CriticConfig(name=own, options=critics[own]),
            prior_weight=settings["prior_weight"],
            prior_of=priors,
            prior="published",
        ),
    )


def _read_model(model: Model, weights: Weights, source: str) -> tuple[Any, Any]:
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    variables: dict[str, dict[str, Any]] = {"params": {}, **{name: {} for name in model_state}}
    for part in params:
        like = _tower(params, model_state, part)
        if part in ("image_encoder", "text_encoder"):
            prefix = IMAGE if part == "image_encoder" else TEXT
            own = {n: a for n, a in weights.items() if n.startswith(prefix)}
            values = read_tower(getattr(model.module, part), own, like, source)
        else:
            prefix = {**CRITICS, **PRIORS}[part]
            own = {n.removeprefix(prefix): a for n, a in weights.items() if n.startswith(prefix)}
            values = _read_critic(getattr(model.module, part), own, like, f"{source}, {prefix}*")
        for collection, tree in values.items():
            variables[collection][part] = tree
    return variables.pop("params"), variables


def _read_critic(module: nn.Module, weights: Weights, like: Any, source: str) -> Any:
    """A critic's variables; a bias of the score, which the published ones lack, is 0."""
    bias = like["params"].pop("score_bias", None)
    values = read([_naming(module, source)], _split(weights, module, like), like, source)
    if bias is not None:
        values["params"]["score_bias"] = np.zeros(bias.shape, bias.dtype)
    return values


def _split(weights: Weights, module: nn.Module, like: Any) -> dict[str, np.ndarray]:
    """Tensors that each are one weight of ours, from the published ones."""
    result = dict(weights)
    if isinstance(module, ConcatCritic) and "l0.weight" in result:
        first = result.pop("l0.weight")
        width = like["params"]["image_layer"]["kernel"].shape[0]
        result |= {"l0.image": first[:, :width], "l0.text": first[:, width:]}
    for side in ("img_block", "text_block"):
        shortcut = result.pop(f"{side}.feature_shortcut.bias", None)
        last = f"{side}.feature_nonlinear.3.bias"
        if shortcut is not None and last in result:  # the two are added up anyway
            result[last] = result[last] + shortcut
    return result


def _joined(weights: Weights) -> dict[str, np.ndarray]:
    """The inverse of `_split`."""
    result = dict(weights)
    if "l0.image" in result:
        result["l0.weight"] = np.concatenate(
            [result.pop("l0.image"), result.pop("l0.text")], axis=1
        )
    for side in ("img_block", "text_block"):
        if (last := result.get(f"{side}.feature_nonlinear.3.bias")) is not None:
            result[f"{side}.feature_shortcut.bias"] = np.zeros_like(last)
    return result


def _naming(module: nn.Module, source: str) -> Naming:
    """The published names of a critic or a prior's discriminator."""
    if isinstance(module, DotCritic):
        links = [Link("params/log_temperature", "temperature", NEGATED)]
        for ours, theirs in (("image_block", "img_block"), ("text_block", "text_block")):
            nonlinear = f"{theirs}.feature_nonlinear"
            links += linear_links(f"{ours}/Dense_0", f"{nonlinear}.0", bias=False)
            links += norm_links(f"{ours}/BatchNorm_0", f"{nonlinear}.1", running=True)
            links += linear_links(f"{ours}/Dense_1", f"{nonlinear}.3")
            links += linear_links(f"{ours}/Dense_2", f"{theirs}.feature_shortcut", bias=False)
            links += norm_links(f"{ours}/LayerNorm_0", f"{theirs}.feature_block_ln")
    elif isinstance(module, ConcatCritic):
        links = [
            Link("params/image_layer/kernel", "l0.image", LINEAR),
            Link("params/image_layer/bias", "l0.bias"),
            Link("params/text_layer/kernel", "l0.text", LINEAR),
        ]
        for number in range(module.layers):
            links.append(Link(f"params/kernel_{number}", f"l{number + 1}.weight", LINEAR))
            links.append(Link(f"params/bias_{number}", f"l{number + 1}.bias"))
    elif isinstance(module, PriorDiscriminator):
        links = [link for n in range(3) for link in linear_links(f"Dense_{n}", f"l{n}")]
    else:
        raise CheckpointError(f"{source}: the published code has no {type(module).__name__}")
    return Naming("CLIP-Lite", tuple(links), r"\.num_batches_tracked$")


def _tower(params: Any, model_state: Any, name: str) -> dict[str, Any]:
    """The variables of one part of the model, by collection."""
    collections = {"params": params, **model_state}
    return {key: dict(tree[name]) for key, tree in collections.items() if name in tree}
