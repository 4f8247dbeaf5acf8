"""Fixed inputs, and what a model makes of them: how an export is compared with the live model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.models import DualEncoder

CAPTIONS = ("a photo of two dogs", "Red circle, left of a blue one!", "x", "word " * 100)
"""Short, with capitals and marks, one letter, and longer than any limit."""

Outputs = Mapping[str, np.ndarray]
"""``image_features``, ``text_features`` ``[B, F]``, ``image``, ``text`` ``[B, D]`` as the critic
projects them, and ``scores`` ``[B]``."""


@dataclass(frozen=True)
class Probe:
    images: np.ndarray  # [B, H, W, 3] uint8
    tokens: np.ndarray  # [B, L] int32
    mask: np.ndarray  # [B, L] bool
    captions: tuple[str, ...] = CAPTIONS

    def first(self, count: int) -> "Probe":
        """Its first rows."""
        return Probe(
            self.images[:count], self.tokens[:count], self.mask[:count], self.captions[:count]
        )


def build_probe(model: DualEncoderModel) -> Probe:
    """Pseudo-random pixels, and `CAPTIONS`, or, without a tokenizer, pseudo-random ids."""
    rng = np.random.default_rng(0)
    count, size, length = len(CAPTIONS), model.model.image_size, model.model.max_tokens
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    if model.has_tokenizer:
        return Probe(images, *model.tokenizer(CAPTIONS))
    words = model.model.module.text_encoder.vocab_size
    tokens = rng.integers(0, words, (count, length), np.int32)
    return Probe(images, tokens, np.arange(length) < rng.integers(1, length + 1, (count, 1)))


def outputs(model: DualEncoderModel, probe: Probe) -> Outputs:
    """All outputs of a model."""
    variables = {"params": model.params, **model.model_state}
    found = _outputs(model.model.module, variables, probe.images, probe.tokens, probe.mask)
    return {name: np.asarray(array) for name, array in found.items()}


@partial(jax.jit, static_argnums=0)
def _outputs(module: DualEncoder, variables: Any, images: Any, tokens: Any, mask: Any) -> Any:
    apply = partial(module.apply, variables)
    image = apply(images, method="encode_image")
    text = apply(tokens, mask, method="encode_text")
    return {
        "image_features": apply(images, method="image_features"),
        "text_features": apply(tokens, mask, method="text_features"),
        "image": image,
        "text": text,
        "scores": apply(image, text, method="pairs"),
    }
