"""Encoders that start from weights of others: `init_from` of `model.image` and `model.text`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from clip_lite_jax.config import Config, EncoderConfig, ModelConfig, Options
from clip_lite_jax.config.types import Triple
from clip_lite_jax.data.glove import read_glove
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.files import read_json
from clip_lite_jax.models import Model, build_model
from clip_lite_jax.models.bert import Bert
from clip_lite_jax.models.efficientnet import EfficientNetLite
from clip_lite_jax.models.resnet import ClipResNet, ResNet
from clip_lite_jax.models.transformer import ClipText
from clip_lite_jax.models.vit import ViT
from clip_lite_jax.models.word_vectors import WordVectors
from clip_lite_jax.pretrained.efficientnet import efficientnet_namings
from clip_lite_jax.pretrained.files import read_weights, resolve_path
from clip_lite_jax.pretrained.hf_config import hf_text_options
from clip_lite_jax.pretrained.names import Link, Naming, Weights, best, read
from clip_lite_jax.pretrained.own import OWN_FILE, read_config
from clip_lite_jax.pretrained.resnet import clip_resnet_namings, resnet_namings
from clip_lite_jax.pretrained.text import bert_namings, clip_text_namings
from clip_lite_jax.pretrained.vit import vit_namings

NAMINGS: dict[type[nn.Module], Callable[[Any], tuple[Naming, ...]]] = {
    Bert: bert_namings,
    ClipResNet: clip_resnet_namings,
    ClipText: clip_text_namings,
    EfficientNetLite: efficientnet_namings,
    ResNet: resnet_namings,
    ViT: vit_namings,
}
"""The foreign names of an encoder's weights, by its class."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

NORMALIZATION: dict[str, tuple[Triple, Triple]] = {
    "torchvision": IMAGENET,
    "detectron2": IMAGENET,
    "CLIP": CLIP,
    "efficientnet-lite-pytorch": ((127 / 255,) * 3, (128 / 255,) * 3),
}
"""Mean and standard deviation of pixels that all files of a naming were trained with."""


@dataclass(frozen=True)
class Facts:
    """What weights state about themselves, beyond their shapes."""

    names: tuple[str, ...] = ()  # of presets that they fit
    options: Options = field(default_factory=dict)
    pixels: tuple[Triple, Triple] | None = None  # mean and standard deviation
    tokenizer: str | None = None  # path


def resolve(config: Config) -> Config:
    """The configuration with what its `init_from` state filled in.

    Raises:
      ConfigError: it contradicts what they state; both values are named.
      CheckpointError: weights that cannot be read.
    """
    model, data = config.model, config.data
    if model.image.init_from:
        facts = image_facts(config)
        mean, std = facts.pixels or (model.pixel_mean, model.pixel_std)
        if mean is None or std is None:
            raise ConfigError(
                f"{model.image.init_from} does not say how pixels were normalised: set "
                "model.pixel_mean and model.pixel_std to what it was trained with"
            )
        source = model.image.init_from
        model = replace(
            model,
            image=_merged("model.image", model.image, facts),
            pixel_mean=_agreed("model.pixel_mean", model.pixel_mean, mean, source),
            pixel_std=_agreed("model.pixel_std", model.pixel_std, std, source),
        )
    if model.text.init_from:
        facts = text_facts(resolve_path(model.text.init_from))
        model = replace(model, text=_merged("model.text", model.text, facts))
        data = replace(data, tokenizer=data.tokenizer or facts.tokenizer)
    return replace(config, model=model, data=data)


def load_towers(model: Model, config: ModelConfig) -> dict[str, Any]:
    """Variables of the encoders that have an `init_from`, for `init_state`."""
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    towers = {}
    for tower, settings in (("image_encoder", config.image), ("text_encoder", config.text)):
        if settings.init_from:
            collections = {"params": params, **model_state}
            like = {name: tree[tower] for name, tree in collections.items() if tower in tree}
            module = getattr(model.module, tower)
            path = resolve_path(settings.init_from)
            if isinstance(module, WordVectors) and path.is_file():
                weights = {"params/words/embedding": read_glove(path)[1]}
            else:
                weights = read_weights(settings.init_from)
            towers[tower] = read_tower(module, weights, like, settings.init_from)
    return towers


def read_tower(module: nn.Module, weights: Weights, like: Any, source: str) -> Any:
    """The variables of an encoder, shaped `like`; raises `CheckpointError`, see `names.read`."""
    return read(_namings(module, like), weights, like, source)


def own_naming(variables: Any) -> Naming:
    """Our own names: collection and path."""
    paths = flatten_dict(variables, sep="/")
    return Naming("clip_lite_jax", tuple(Link(path, path) for path in paths))


def _namings(module: nn.Module, like: Any) -> tuple[Naming, ...]:
    foreign = NAMINGS.get(type(module))
    return (*(foreign(module) if foreign else ()), own_naming(like))


def image_facts(config: Config) -> Facts:
    """What the weights of the image encoder state."""
    source = str(config.model.image.init_from)
    folder = resolve_path(source)
    if own := own_config(folder):
        facts = own.model.image
        pixels = (own.model.pixel_mean or HALF[0], own.model.pixel_std or HALF[1])
        return Facts((facts.name,), facts.options, pixels)
    module = build_model(config.model, config.data.image_size, 1, 1).module.image_encoder
    if stated := _stated_pixels(folder):
        return Facts(pixels=stated)
    if not (foreign := NAMINGS.get(type(module))):
        return Facts()
    naming, _ = best(foreign(module), read_weights(source), source)
    return Facts(pixels=NORMALIZATION.get(naming.name))


def text_facts(folder: Path) -> Facts:
    """What the weights of a text encoder state."""
    if own := own_config(folder):
        stored = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
        tokenizer = next((str(file) for file in stored if file.is_file()), None)
        return Facts((own.model.text.name,), own.model.text.options, tokenizer=tokenizer)
    if not (folder / "config.json").is_file():
        return Facts(tokenizer=str(folder) if folder.suffix == ".txt" else None)
    names, options = hf_text_options(folder)
    return Facts(names, options, tokenizer=str(folder))


def own_config(folder: Path) -> Config | None:
    """The configuration of a folder that this project exported, or None."""
    return read_config(folder) if (folder / OWN_FILE).is_file() else None


def _stated_pixels(folder: Path) -> tuple[Triple, Triple] | None:
    """Of timm's ``config.json`` or open_clip's ``open_clip_config.json``."""
    for name, section in (
        ("config.json", "pretrained_cfg"),
        ("open_clip_config.json", "preprocess_cfg"),
    ):
        file = folder / name
        stated = read_json(file).get(section, {}) if file.is_file() else {}
        if {"mean", "std"} <= stated.keys():
            mean, std = (tuple(map(float, stated[key])) for key in ("mean", "std"))
            if len(mean) == len(std) == 3:
                return mean, std
    return None


def _merged(field: str, given: EncoderConfig, facts: Facts) -> EncoderConfig:
    """The encoder with the options its weights state; options that contradict them are refused."""
    if facts.names and given.name not in facts.names:
        stated = " or ".join(repr(name) for name in facts.names)
        raise ConfigError(
            f"{field}.name={given.name!r}, but {given.init_from} holds {stated}: use that name"
        )
    for option, value in facts.options.items():
        if option in given.options:
            path = f"{field}.options.{option}"
            _agreed(path, given.options[option], value, str(given.init_from))
    return replace(given, options={**facts.options, **given.options})


def _agreed(path: str, given: Any, stated: Any, source: str) -> Any:
    if given is not None and not _same(given, stated):
        raise ConfigError(f"{path}={given!r}, but {source} states {stated!r}: leave it out")
    return stated


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    both_numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return abs(one - other) < 1e-6 if both_numbers else one == other
