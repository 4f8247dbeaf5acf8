"""Encoding held-out images and captions in batches of one fixed size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import ImageInput, TextInput
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import BadImage
from clip_lite_jax.train_step import EncodeFns


def load_images(
    source: Source, indices: Sequence[int], inputs: ImageInput, bad: BadExamples
) -> tuple[list[Example], np.ndarray]:
    """The usable examples among `indices` and what the image tower reads of them ``[N, ...]``."""
    kept, images = [], []
    for index in indices:
        try:
            images.append(inputs.view(inputs.open(source, index)))
            kept.append(source[index])
        except BadImage as error:
            bad.add(source.metadata(index).id, str(error))
    return kept, stack_or_empty(images, inputs.blank)


def stack_or_empty(arrays: Sequence[np.ndarray], like: np.ndarray) -> np.ndarray:
    """``N`` arrays of the shape of `like` → ``[N, ...]``; N may be 0."""
    return np.stack(arrays) if arrays else np.zeros((0, *like.shape), like.dtype)


def encode_images(fns: EncodeFns, images: np.ndarray, batch_size: int) -> np.ndarray:
    """``[N, H, W, 3]`` uint8, or features ``[N, F]`` → ``[N, D]``."""
    return _in_batches(fns.image, (images,), batch_size)


def encode_captions(
    fns: EncodeFns, inputs: TextInput, captions: Sequence[str], batch_size: int
) -> np.ndarray:
    """``N`` captions → ``[N, D]``."""
    return _in_batches(fns.text, inputs(captions), batch_size)


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
