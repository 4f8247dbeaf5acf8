"""A trained model as PyTorch users know it, for the tools that evaluate open_clip's models.

    model, preprocess, tokenizer = open_clip_model("runs/quickstart")

are what open_clip's ``create_model_and_transforms`` and ``get_tokenizer`` give, for scripts that
were written for open_clip and for LAION's clip_benchmark.  Its command, with this model among its
types, is

    python -m clip_lite_jax.apps.open_clip_model eval --model_type clip_lite_jax \\
        --model clip_lite --pretrained runs/quickstart --dataset …

PyTorch is only asked for here; weights stay in JAX, and nothing has a gradient.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.encoding import encode_captions, encode_images
from clip_lite_jax.inference import DualEncoderModel, load

MODEL_TYPE = "clip_lite_jax"
NO_TOKEN = -1
"""Stands where a text has no token: there is no other place for the mask."""


def open_clip_model(
    path: str | Path | DualEncoderModel, batch_size: int = 64
) -> tuple[Any, Callable[[Image.Image], Any], Callable[[str | Sequence[str]], Any]]:
    """A ``torch.nn.Module``, a transform of pictures, and a tokenizer.

    The module has ``encode_image`` of float ``[B, 3, H, W]`` in [0, 1] and ``encode_text`` of int64
    ``[B, L]``, both ``-> [B, D]`` of unit length on the CPU, and ``logit_scale`` and ``logit_bias``
    with which their products are the critic's T.

    Raises:
      ConfigError: PyTorch is not installed, or no product of embeddings ranks as the critic does.
    """
    model = path if isinstance(path, DualEncoderModel) else load(path, batch_size)
    if (name := model.config.model.critic.name) != "dot":
        raise ConfigError(
            f"the critic {name!r} is no cosine of embeddings, which open_clip's tools compare by: "
            "clip-lite eval measures it"
        )
    try:
        import torch
    except ImportError as error:
        raise ConfigError("open_clip's tools need PyTorch: pip install torch") from error

    def preprocess(image: Image.Image) -> Any:
        pixels = model.pixels.view(Opened.of(image))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255

    def tokenizer(texts: str | Sequence[str], context_length: int | None = None) -> Any:
        del context_length  # tokens are as many as in training
        ids, mask = model.tokenizer([texts] if isinstance(texts, str) else list(texts))
        return torch.from_numpy(np.where(mask, ids, NO_TOKEN).astype(np.int64))

    return _module(torch, model), preprocess, tokenizer


def _module(torch: Any, model: DualEncoderModel) -> Any:
    def _tensor(rows: np.ndarray) -> Any:
        return torch.from_numpy(np.array(rows, np.float32))  # of its own: jax's is read-only

    watched = model.model.watched(model.params)
    bias = float(model.params["critic"]["score_bias"])

    class ClipLite(torch.nn.Module):
        """As ``open_clip.CLIP``, as far as evaluation needs it."""

        def __init__(self) -> None:
            super().__init__()
            scale = math.log(1 / float(watched["temperature"]))
            self.logit_scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)
            self.logit_bias = torch.nn.Parameter(torch.tensor(bias), requires_grad=False)

        def encode_image(self, image: Any, normalize: bool = False) -> Any:
            del normalize  # they have unit length in any case
            pixels = (image.detach().float().cpu() * 255).round().clamp(0, 255)
            rows = pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
            return _tensor(encode_images(model.fns, rows, model.batch_size))

        def encode_text(self, text: Any, normalize: bool = False) -> Any:
            del normalize
            tokens = text.detach().cpu().numpy()
            mask = tokens != NO_TOKEN
            ids = np.where(mask, tokens, 0).astype(np.int32)
            found = encode_captions(
                model.fns, lambda _: (ids, mask), [""] * len(ids), model.batch_size
            )
            return _tensor(found)

        def forward(self, image: Any = None, text: Any = None) -> dict[str, Any]:
            return {
                "image_features": None if image is None else self.encode_image(image),
                "text_features": None if text is None else self.encode_text(text),
                "logit_scale": self.logit_scale.exp(),
                "logit_bias": self.logit_bias,
            }

    return ClipLite().eval()


def add_to_clip_benchmark() -> None:
    """Makes ``clip_lite_jax`` a type of model that clip_benchmark knows."""
    from clip_benchmark import models

    def load_model(model_name: str, pretrained: str, cache_dir: str, device: Any) -> Any:
        del model_name, cache_dir, device
        return open_clip_model(pretrained)

    models.TYPE2FUNC[MODEL_TYPE] = load_model
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def main() -> Any:
    """clip_benchmark's own command."""
    add_to_clip_benchmark()
    from clip_benchmark.cli import main as clip_benchmark

    return clip_benchmark()


if __name__ == "__main__":
    sys.exit(main())
