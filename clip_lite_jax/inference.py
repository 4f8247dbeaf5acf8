"""A trained model in a few calls: encode images, encode texts, score pairs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import Config
from clip_lite_jax.data.image_ops import Opened, view_box
from clip_lite_jax.data.inputs import Pixels
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import BadImage, CheckpointError, ConfigError
from clip_lite_jax.evaluators.encoding import (
    encode_captions,
    encode_images,
    heat_maps,
    stack_or_empty,
)
from clip_lite_jax.evaluators.places import on_picture
from clip_lite_jax.mirror import local_copy
from clip_lite_jax.models import DualEncoder, Model, build_model
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_state import init_state
from clip_lite_jax.train_step import make_encode_fns
from clip_lite_jax.vectors import unit

Images = Sequence[str | Path | Image.Image] | np.ndarray
"""Paths, PIL images, or uint8 ``[N, H, W, 3]``."""


class DualEncoderModel:
    """A trained dual encoder with its tokenizer and preprocessing."""

    def __init__(
        self,
        config: Config,
        model: Model,
        params: Any,
        model_state: Any,
        tokenizer: Tokenizer | None,
        batch_size: int = 64,
        data_fingerprint: str = "",
        step: int | None = None,
    ) -> None:
        """Without a `tokenizer` texts can only be given as ids.

        `data_fingerprint` says which data the model learned from, where that is known, and `step`
        after how many steps of training.
        """
        self.config, self.model = config, model
        self.params, self.model_state = params, model_state
        self.pixels, self.batch_size = Pixels(config.data), batch_size
        self.fns = make_encode_fns(model, build_mesh())(params, model_state)
        self._tokenizer, self.data_fingerprint, self.step = tokenizer, data_fingerprint, step

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `ConfigError` where the weights came without one."""
        if self._tokenizer is None:
            raise ConfigError("these weights came without a tokenizer: give config key 'tokenizer'")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def encode_image(self, images: Images) -> np.ndarray:
        """Images → float32 ``[N, D]`` of unit length; `dot` ranks by their cosine.

        Raises:
          BadImage: an image that cannot be decoded; the message names the file.
        """
        return unit(self.project_image(images), np.float32)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts → float32 ``[N, D]`` of unit length."""
        return unit(self.project_text(texts), np.float32)

    def project_image(self, images: Images) -> np.ndarray:
        """Images → ``[N, D]`` as the critic takes them, for `fns.pairs` and `fns.matrix`."""
        pixels = [self._view(image) for image in images]
        stacked = stack_or_empty(pixels, self.pixels.blank)
        return encode_images(self.fns, stacked, self.batch_size)

    def _view(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        with _named(image):
            return self.pixels.view(_open(image))

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

    def heat_map(self, images: Images, texts: Sequence[str]) -> list[np.ndarray]:
        """Which places of image i speak for text i: float32 ``[H, W]``, as large as the picture.

        None is below 0; what the centre crop of preprocessing cuts off is 0.  See
        `models.heat_maps`.

        Raises:
          BadImage: an image that cannot be decoded; the message names the file.
          ValueError: not as many texts as images.
        """
        if len(images) != len(texts):
            raise ValueError(
                f"heat_map needs one text per image: {len(images)} images, {len(texts)} texts"
            )
        data, views, sizes = self.config.data, [], []
        for image in images:
            with _named(image):
                opened = _open(image)
                views.append(self.pixels.view(opened))
                sizes.append(opened.size)
        stacked = stack_or_empty(views, self.pixels.blank)
        maps = heat_maps(self.fns, self.tokenizer, stacked, list(texts), self.batch_size)
        return [
            on_picture(one, size, view_box(size, data.image_size, data.resize))
            for one, size in zip(maps, sizes, strict=True)
        ]

    def encode_features(self, images: np.ndarray) -> np.ndarray:
        """Normalised images ``[N, H, W, 3]`` → the encoder's features, float32 ``[N, F]``."""
        return self._apply("normalised_image_features", images)

    def encode_text_features(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Ids and mask ``[N, L]`` → the encoder's features, float32 ``[N, F]``."""
        return self._apply("text_features", np.asarray(ids, np.int32), np.asarray(mask, bool))

    def critic_scores(self, image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
        """Features ``[N, F]`` of N pairs → the critic's scores T, float32 ``[N]``."""
        return self._apply("feature_scores", image_features, text_features)

    def _apply(self, method: str, *arrays: np.ndarray) -> np.ndarray:
        variables = {"params": self.params, **self.model_state}
        return np.asarray(_apply(self.model.module, method, variables, *arrays), np.float32)


def load(path: str | Path, batch_size: int = 64) -> DualEncoderModel:
    """The model of an exported folder, or of the newest checkpoint in a run's workdir.

    A run may lie in a bucket, an exported folder may not.

    Raises:
      CheckpointError: there is no checkpoint, or the folder's parts contradict each other.
    """
    from clip_lite_jax.pretrained.own import OWN_FILE, read_own  # pretrained uses this module

    workdir = local_copy(path)
    if (workdir / OWN_FILE).is_file():
        own = read_own(workdir)
        return DualEncoderModel(
            own.config,
            own.model,
            own.params,
            own.model_state,
            own.tokenizer,
            batch_size,
            own.data_fingerprint,
        )
    with Checkpoints.open(workdir) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise CheckpointError(f"{workdir} holds no finished checkpoint yet")
        meta = checkpoints.meta(step)
        config = meta.config
        tokenizer = Tokenizer(
            meta.tokenizer, config.data.max_tokens, config.data.caption_normalization
        )
        model = build_model(
            config.model,
            config.data.image_size,
            tokenizer.vocab_size,
            config.data.max_tokens,
            config.objective,
        )
        shapes, _ = init_state(
            model,
            lambda params: build_optimizer(config.optim, config.steps, params),
            config.seed,
            config.optim.ema_decay > 0,
            build_mesh(),
            shapes_only=True,
        )
        state = checkpoints.restore(step, shapes, weights_only=True)
    return DualEncoderModel(
        config,
        model,
        state.eval_params,
        state.model_state,
        tokenizer,
        batch_size,
        meta.data_fingerprint,
        step,
    )


@contextmanager
def _named(image: object) -> Iterator[None]:
    """What is wrong with an image is said together with which."""
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{image}: {error}") from error


def _open(image: str | Path | Image.Image | np.ndarray) -> Opened:
    if isinstance(image, Image.Image):
        return Opened.of(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image array is uint8 [H, W, 3], not {image.dtype} {image.shape}")
        return Opened.of(Image.fromarray(image))
    return Opened(Path(image).read_bytes())


@partial(jax.jit, static_argnums=(0, 1))
def _apply(module: DualEncoder, method: str, variables: Any, *arrays: Any) -> Any:
    return module.apply(variables, *arrays, method=method)
