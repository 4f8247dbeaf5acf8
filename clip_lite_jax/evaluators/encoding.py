"""Encoding held-out images and captions in batches of one fixed size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from clip_lite_jax.data import image_ops
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import BadExamples, Source
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import BadImage
from clip_lite_jax.train_step import EncodeFns


def load_images(
    source: Source, indices: Sequence[int], size: int, bad: BadExamples
) -> tuple[list[Example], np.ndarray]:
    """The usable examples among `indices` and their pictures, uint8 ``[N, size, size, 3]``."""
    kept, images = [], []
    for index in indices:
        example = source[index]
        try:
            images.append(image_ops.resize_and_crop(image_ops.decode(example.image), size))
            kept.append(example)
        except BadImage as error:
            bad.add(example.id, str(error))
    return kept, stack_pictures(images, size)


def stack_pictures(pictures: Sequence[np.ndarray], size: int) -> np.ndarray:
    """``N`` pictures, uint8 ``[size, size, 3]`` each → ``[N, size, size, 3]``; N may be 0."""
    return np.stack(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)


def encode_images(fns: EncodeFns, images: np.ndarray, batch_size: int) -> np.ndarray:
    """``[N, H, W, 3]`` uint8 → ``[N, D]``."""
    return _in_batches(fns.image, (images,), batch_size)


def encode_captions(
    fns: EncodeFns, tokenizer: Tokenizer, captions: Sequence[str], batch_size: int
) -> np.ndarray:
    """``N`` captions → ``[N, D]``."""
    return _in_batches(fns.text, tokenizer(captions), batch_size)


def _in_batches(
    encode: Callable[..., Any], arrays: tuple[np.ndarray, ...], batch_size: int
) -> np.ndarray:
    """Applies `encode` to batches of exactly `batch_size`, the last one padded by its last row."""
    count = len(arrays[0])
    if count == 0:
        one_batch = [np.zeros((batch_size, *a.shape[1:]), a.dtype) for a in arrays]
        result = jax.eval_shape(encode, *one_batch)
        return np.zeros((0, *result.shape[1:]), result.dtype)
    results = []
    for start in range(0, count, batch_size):
        parts = [array[start : start + batch_size] for array in arrays]
        missing = batch_size - len(parts[0])
        padded = [np.concatenate([p, np.repeat(p[-1:], missing, axis=0)]) for p in parts]
        results.append(np.asarray(encode(*padded))[: len(parts[0])])
    return np.concatenate(results)
