"""Encoders of NumPy in place of a model, for tests of what is computed from embeddings."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.evaluators.tasks import TaskData
from clip_lite_jax.train_step import EncodeFns

SIZE = 16
WIDTH = 24


def text_embedding(caption: str) -> np.ndarray:
    """As good as random, and never of unit length."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest)).normal(size=WIDTH) + 0.2


def tokens(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of each caption."""
    ids = np.zeros((len(captions), 200), np.int32)
    for row, caption in zip(ids, captions, strict=True):
        content = np.frombuffer(caption.encode(), np.uint8)
        row[: len(content)] = content
    return ids, ids > 0


def _text(ids: Any, mask: Any) -> Any:
    del mask
    found = [text_embedding(bytes(row[row > 0].astype(np.uint8)).decode()) for row in ids]
    return np.array(found)


def image_features(images: Any) -> Any:
    """Mean colours of 16 fields ``[B, 48]``; features of features are they themselves."""
    images = np.asarray(images)
    if images.ndim == 2:
        return images
    fields = images.reshape(len(images), 4, SIZE // 4, 4, SIZE // 4, 3)
    return fields.mean(axis=(2, 4)).reshape(len(images), -1) / 255


def project(images: Any) -> Any:
    found = image_features(images)
    mixing = np.random.default_rng(0).normal(size=(found.shape[1], WIDTH))
    return found @ mixing


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _none(*arrays: Any) -> Any:
    raise NotImplementedError("no task of classification asks for this")


def encoders(**functions: Any) -> EncodeFns:
    """With these functions, and none of the others."""
    return EncodeFns(**{field.name: _none for field in fields(EncodeFns)} | functions)


COSINE = encoders(
    image=lambda images: unit(project(images)),
    text=lambda ids, mask: unit(_text(ids, mask)),
    pairs=lambda i, t: 7 * np.sum(i * t, axis=1),
    matrix=lambda i, t: 7 * i @ t.T,
    image_features=image_features,
)
"""As a critic that compares by cosine."""


def _concat(images: Any, texts: Any) -> Any:
    return np.sum(np.tanh(images[:, None] + texts[None]), axis=-1)


CONCAT = encoders(
    image=project,
    text=_text,
    pairs=lambda i, t: np.diagonal(_concat(i, t)),
    matrix=_concat,
    image_features=image_features,
)
"""As a critic that is not separable."""


def task_data(batch_size: int = 4, **source: Any) -> TaskData:
    """The splits of a source, as the fake encoders read them."""
    config = DataConfig(image_size=SIZE, **source)
    bad = BadExamples()
    splits = build_sources(config, bad, training=False)
    return TaskData(splits, TowerInputs(Pixels(config), tokens), batch_size, bad)
