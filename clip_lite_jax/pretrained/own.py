"""A folder that says what it is: a whole model's weights, tokenizer, and ``clip_lite_jax.json``.

The JSON states everything that decides what the weights mean, twice: as the configuration and as
plain fields for those who do not use this package.  Both must agree with the weights.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_lite_jax._version import __version__
from clip_lite_jax.config import Config, EncoderConfig, from_dict, to_dict
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.files import read_json, write_atomic
from clip_lite_jax.models import Model, build_model
from clip_lite_jax.pretrained.files import read_weights, write_safetensors

OWN_FILE = "clip_lite_jax.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
"""Raised when readers of before would misread a folder."""

FIXED_ACTIVATIONS = {
    "ClipResNet": "relu",
    "ConvNet": "gelu_tanh",
    "EfficientNetLite": "relu6",
    "ResNet": "relu",
}
"""Of encoders, by class, that have no such option."""

UNTOLD = {"parent", "name", "dtype", "param_dtype", "remat"}
"""Fields of a module that do not change what it computes, or not beyond rounding."""


@dataclass(frozen=True)
class Own:
    """What such a folder holds."""

    config: Config
    model: Model
    params: Any
    model_state: Any
    tokenizer: Tokenizer | None
    data_fingerprint: str


def write_own(folder: Path, own: Own) -> None:
    """Writes weights, tokenizer and JSON; equal models make equal bytes.

    Weights are called ``{part}/{collection}/{path}``: "image_encoder/params/conv1/kernel".
    """
    collections = {"params": own.params, **own.model_state}
    weights = {}
    for collection, parts in collections.items():
        for part, tree in parts.items():
            for path, array in flatten_dict(tree, sep="/").items():
                weights[f"{part}/{collection}/{path}"] = np.asarray(array)
    write_safetensors(folder / WEIGHTS_FILE, weights, {"format": "clip_lite_jax"})
    if own.tokenizer is not None:
        write_atomic(folder / own.tokenizer.file_name, own.tokenizer.model)
    config = portable(own.config)
    stated = {
        "format": FORMAT,
        "version": __version__,
        "data_fingerprint": own.data_fingerprint,
        **facts(config, own.model, own.tokenizer),
        "weights": {"file": WEIGHTS_FILE, "sha256": sha256(folder / WEIGHTS_FILE)},
        "config": to_dict(config),
    }
    write_atomic(folder / OWN_FILE, json.dumps(stated, indent=2) + "\n")


def read_own(folder: Path) -> Own:
    """The model of a folder that `write_own` wrote.

    Raises:
      CheckpointError: its parts contradict each other; both values are named.
    """
    described = _described(folder)
    variables = _read_variables(folder, described.model)
    return replace(described, params=variables.pop("params"), model_state=variables)


def read_config(folder: Path) -> Config:
    """The configuration of such a folder; its parts are checked, except for the weights' shapes.

    Raises:
      CheckpointError: as `read_own`.
    """
    return _described(folder).config


def _described(folder: Path) -> Own:
    """What the JSON describes, without weights; they and the tokenizer are those it states."""
    file = folder / OWN_FILE
    stated = read_json(file)
    given = stated.get("format") if isinstance(stated, dict) else stated
    if given != FORMAT:
        raise CheckpointError(
            f"{file}: format={given!r}, and version {__version__} reads {FORMAT}: the folder is "
            "of another version of clip_lite_jax, or damaged"
        )
    try:
        words = stated["text"]["vocab_size"]
        _check_file(folder, "weights", WEIGHTS_FILE, stated["weights"]["sha256"])
        config = from_dict(Config, stated["config"])
        tokenizer = _read_tokenizer(folder, stated["tokenizer"], config)
        data = config.data
        model = build_model(config.model, data.image_size, words, data.max_tokens, config.objective)
        fingerprint = stated["data_fingerprint"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} lacks {error}: the folder is damaged") from error
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if tokenizer is not None and tokenizer.vocab_size > words:
        raise CheckpointError(
            f"{folder}: {tokenizer.file_name} has {tokenizer.vocab_size} tokens, but {OWN_FILE} "
            f"states text.vocab_size={words}: they do not belong together"
        )
    told = json.loads(json.dumps(facts(config, model, tokenizer)))
    _check_equal(file, {key: stated.get(key) for key in told}, told)
    return Own(config, model, {}, {}, tokenizer, fingerprint)


def facts(config: Config, model: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides the meaning of the weights, as plain data."""
    module = model.module
    return {
        "preprocessing": preprocessing(config),
        "image": _tower(config.model.image.name, module.image_encoder),
        "text": {
            **_tower(config.model.text.name, module.text_encoder),
            "caption_normalization": config.data.caption_normalization,
        },
        "critic": {"name": config.model.critic.name, **_fields(module.critic)},
        "tokenizer": None
        if tokenizer is None
        else {
            "file": tokenizer.file_name,
            "vocab_size": tokenizer.vocab_size,
            "max_tokens": tokenizer.max_tokens,
            "normalization": tokenizer.normalization,
            "sha256": hashlib.sha256(tokenizer.model).hexdigest(),
        },
    }


def preprocessing(config: Config) -> dict[str, Any]:
    """How a picture becomes the numbers that the image encoder reads."""
    return {
        "color": "RGB, upright by EXIF, transparency over white",
        "resize_shorter_side": config.data.resize or config.data.image_size,
        "center_crop": config.data.image_size,
        "interpolation": "bicubic",
        "divide_by": 255,
        "mean": config.model.pixel_mean or (0.5, 0.5, 0.5),
        "std": config.model.pixel_std or (0.5, 0.5, 0.5),
    }


def portable(config: Config) -> Config:
    """The configuration without what only held on the machine of the run."""

    def tower(encoder: EncoderConfig) -> EncoderConfig:
        return replace(encoder, init_from=None, cache=False)

    model = replace(config.model, image=tower(config.model.image), text=tower(config.model.text))
    data = replace(config.data, tokenizer=None, feature_cache=None)
    return replace(config, model=model, data=data)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _tower(name: str, module: nn.Module) -> dict[str, Any]:
    own = _fields(module)
    own.setdefault("activation", FIXED_ACTIVATIONS.get(type(module).__name__))
    return {"name": name, **own}


def _fields(module: nn.Module) -> dict[str, Any]:
    fields = module.__dataclass_fields__
    return {field: getattr(module, field) for field in fields if field not in UNTOLD}


def _read_tokenizer(folder: Path, told: Any, config: Config) -> Tokenizer | None:
    if told is None:
        return None
    _check_file(folder, "tokenizer", told["file"], told["sha256"])
    data, file = config.data, folder / told["file"]
    try:
        return Tokenizer(file.read_bytes(), data.max_tokens, data.caption_normalization)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_file(folder: Path, field: str, name: str, expected: str) -> None:
    """That a file beside the JSON is the one it states."""
    if Path(name).name != name:  # a file elsewhere is none of this folder's
        raise CheckpointError(f"{folder / OWN_FILE}: {field}.file={name!r} is not a file's name")
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / OWN_FILE} states {field}.file={name!r}: it is not there")
    found = sha256(folder / name)
    if found != expected:
        raise CheckpointError(
            f"{folder / name} has sha256 {found}, but {OWN_FILE} states {expected}: the file was "
            "changed, or copied incompletely"
        )


def _check_equal(file: Path, stated: dict[str, Any], told: dict[str, Any]) -> None:
    left, right = (flatten_dict(tree, sep=".") for tree in (stated, told))
    for field in sorted(left.keys() | right.keys()):
        there, here = left.get(field, "missing"), right.get(field, "missing")
        if there != here:
            raise CheckpointError(
                f"{file} states {field}={there!r}, but its config and files give {here!r}"
            )


def _read_variables(folder: Path, model: Model) -> dict[str, Any]:
    """``{"params": {part: ...}, "batch_stats": ...}``, of exactly the model's shapes."""
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    wanted = {}
    for collection, parts in {"params": params, **model_state}.items():
        for path, like in flatten_dict(parts, sep="/").items():
            part, _, rest = path.partition("/")
            wanted[f"{part}/{collection}/{rest}"] = (f"{collection}/{path}", like)
    weights = read_weights(folder / WEIGHTS_FILE)
    for name in sorted(wanted.keys() | weights.keys()):
        there = _kind(weights[name]) if name in weights else "missing"
        here = _kind(wanted[name][1]) if name in wanted else "no part of it"
        if there != here:
            raise CheckpointError(
                f"{folder}: {name} is {there} in {WEIGHTS_FILE}, and {here} in the model that "
                f"{OWN_FILE} describes"
            )
    found = {path: weights[name] for name, (path, _) in wanted.items()}
    variables: dict[str, Any] = unflatten_dict(found, sep="/")
    return {"params": {}, **{name: {} for name in model_state}, **variables}


def _kind(array: Any) -> str:
    return f"{array.dtype} {array.shape}"
