"""A trained model in a few calls: encode images, encode texts, score pairs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_lite_jax.checkpoints import Checkpoints, Meta
from clip_lite_jax.data import image_ops
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import BadImage, CheckpointError
from clip_lite_jax.evaluators.encoding import encode_captions, encode_images, stack_pictures
from clip_lite_jax.models import build_model
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_state import init_state
from clip_lite_jax.train_step import EncodeFns, make_encode_fns

Images = Sequence[str | Path | Image.Image] | np.ndarray
"""Paths, PIL images, or uint8 ``[N, H, W, 3]``."""


class DualEncoderModel:
    """A trained dual encoder with its tokenizer and preprocessing."""

    def __init__(
        self, fns: EncodeFns, tokenizer: Tokenizer, image_size: int, batch_size: int
    ) -> None:
        self.fns, self.tokenizer = fns, tokenizer
        self.image_size, self.batch_size = image_size, batch_size

    def encode_image(self, images: Images) -> np.ndarray:
        """Images → float32 ``[N, D]`` of unit length; `dot` ranks by their cosine.

        Raises:
          BadImage: an image that cannot be decoded; the message names the file.
        """
        return _unit(self.project_image(images))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts → float32 ``[N, D]`` of unit length."""
        return _unit(self.project_text(texts))

    def project_image(self, images: Images) -> np.ndarray:
        """Images → ``[N, D]`` as the critic takes them, for `fns.pairs` and `fns.matrix`."""
        pixels = [image_ops.resize_and_crop(_open(image), self.image_size) for image in images]
        return encode_images(self.fns, stack_pictures(pixels, self.image_size), self.batch_size)

    def project_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts → ``[N, D]`` as the critic takes them."""
        return encode_captions(self.fns, self.tokenizer, list(texts), self.batch_size)

    def score(self, images: Images, texts: Sequence[str]) -> np.ndarray:
        """Critic score T of image i with text i, in nats, float32 ``[N]``.

        Above 0 means likelier a pair than chance, for a critic trained with plain negatives.

        Raises:
          ValueError: not as many texts as images.
        """
        if len(images) != len(texts):
            raise ValueError(
                f"score needs one text per image: {len(images)} images, {len(texts)} texts"
            )
        scores = self.fns.pairs(self.project_image(images), self.project_text(texts))
        return np.asarray(scores, np.float32)


def load(path: str | Path, batch_size: int = 64) -> DualEncoderModel:
    """The model of the newest checkpoint in a run's workdir.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    workdir = Path(path)
    with Checkpoints.open(workdir) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise CheckpointError(f"{workdir} holds no finished checkpoint yet")
        return _restore(checkpoints.meta(step), checkpoints, step, batch_size)


def _restore(meta: Meta, checkpoints: Checkpoints, step: int, batch_size: int) -> DualEncoderModel:
    config = meta.config
    tokenizer = Tokenizer(meta.tokenizer, config.data.max_tokens)
    size = config.data.image_size
    model = build_model(
        config.model, size, tokenizer.vocab_size, config.data.max_tokens, config.objective
    )
    mesh = build_mesh()
    state, _ = init_state(
        model,
        lambda params: build_optimizer(config.optim, config.steps, params),
        config.seed,
        config.optim.ema_decay > 0,
        mesh,
    )
    state = checkpoints.restore(step, state, weights_only=True)
    fns = make_encode_fns(model, mesh)(state.eval_params, state.model_state)
    return DualEncoderModel(fns, tokenizer, size, batch_size)


def _open(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image_ops.to_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image array is uint8 [H, W, 3], not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    try:
        return image_ops.decode(Path(image).read_bytes())
    except BadImage as error:
        raise BadImage(f"{image}: {error}") from error


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = embeddings.astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)
