"""Which model made a file of embeddings: all that they depend on, as one hash."""

import hashlib
import os
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from pydantic.dataclasses import dataclass

from clip_lite_jax.config import to_dict
from clip_lite_jax.config.types import STRICT, NonNegativeInt, PositiveInt
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.places import is_remote

NOT_AFFINE = ("concat",)
"""Critics whose score is no function of the inner product of their projections."""
UNIT = ("dot",)
"""Critics whose projections have length 1."""


@dataclass(frozen=True, config=STRICT)
class Identity:
    """A model, as a file of its embeddings states it."""

    weights: str
    """A hash of weights, architecture, preprocessing and tokenizer, 32 hexadecimal digits."""
    critic: str
    """Its name in `models.CRITICS`."""
    width: PositiveInt
    """Of a projection."""
    scale: float | None = None
    """T = scale · <image, text> + bias for projections; None for a critic that is not so."""
    bias: float | None = None
    step: NonNegativeInt | None = None
    """Of training, where that is known."""
    path: str = ""
    """The folder of the run, or its URL."""

    @property
    def unit(self) -> bool:
        """Whether projections have length 1."""
        return self.critic in UNIT

    @property
    def affine(self) -> bool:
        """Whether T is a function of the inner product."""
        return self.scale is not None and self.bias is not None

    def told(self) -> str:
        """In a message."""
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.path or 'a model'} (weights {self.weights[:12]}{step})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def identity_of(model: DualEncoderModel, path: str = "") -> Identity:
    """The identity of a model, which was loaded from `path`."""
    name, width = model.config.model.critic.name, width_of(model)
    scale = bias = None
    if name not in NOT_AFFINE:  # two points of a line
        one = np.zeros((1, width), np.float32)
        one[0, 0] = 1
        above, below = (float(model.fns.matrix(one, sign * one)[0, 0]) for sign in (1, -1))
        scale, bias = (above - below) / 2, (above + below) / 2
    return Identity(weights_of(model), name, width, scale, bias, model.step, path)


def width_of(model: DualEncoderModel) -> int:
    """Of a projection."""
    # Of a text, which is traced sooner than a picture, and as a search traces it again.
    blank = np.zeros((1, min(8, model.config.data.max_tokens)), np.int32)
    return int(jax.eval_shape(model.fns.text, blank, blank.astype(bool)).shape[-1])


def whole_path(path: str) -> str:
    """A path that means the same from every working directory; a URL stays."""
    return os.path.abspath(path) if path and not is_remote(path) else path


def weights_of(model: DualEncoderModel) -> str:
    """A hash of all that a model's embeddings depend on: weights, sizes, pixels and tokens."""
    data, known = model.config.data, to_dict(model.config)["model"]
    for tower in ("image", "text"):  # where weights began, and whether training kept features
        for field in ("init_from", "cache"):
            known.get(tower, {}).pop(field, None)
    settings = [known, data.image_size, data.resize, data.max_tokens, data.caption_normalization]
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    if model.has_tokenizer:
        digest.update(model.tokenizer.model)
    for path, leaf in jax.tree_util.tree_leaves_with_path((model.params, model.model_state)):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def check_same(there: Identity, weights: str, path: str, folder: object) -> None:
    """Raises `ConfigError` where `folder` holds embeddings of another model than that of `path`."""
    if there.weights != weights:
        raise ConfigError(
            f"{folder} was made with {there.told()}, not with {path or 'this model'} (weights "
            f"{weights[:12]}): give that model, or choose another folder; where its run has "
            f"trained on since, delete {folder} and run clip-lite index again"
        )
