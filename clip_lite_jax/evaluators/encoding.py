"""Encoding held-out images and captions in batches of one fixed size."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import ImageInput, TextInput
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import BadImage
from clip_lite_jax.train_step import EncodeFns

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def encode_views(
    encode: Callable[[np.ndarray], Any],
    view: Callable[[int], np.ndarray],
    blank: np.ndarray,
    indices: Iterable[int],
    batch_size: int,
    threads: int = 4,
) -> Iterator[np.ndarray | str]:
    """Of each example what `encode` makes of its view ``[D]``, or why there is none.

    `view` decodes a picture, or raises `BadImage`; it runs in threads while the device works on the
    batch before.  `blank` fills the last batch up.
    """

    def read(index: int) -> np.ndarray | str:
        try:
            return view(index)
        except BadImage as error:
            return str(error)

    def finished(batch: list[np.ndarray | str], result: Any) -> Iterator[np.ndarray | str]:
        rows = np.asarray(result, np.float32)
        yield from (x if isinstance(x, str) else row for x, row in zip(batch, rows, strict=False))

    with ThreadPoolExecutor(max(1, threads)) as pool:
        views = in_order(pool, read, indices, 3 * batch_size)
        before: tuple[list[np.ndarray | str], Any] | None = None
        while batch := list(islice(views, batch_size)):
            usable = [blank if isinstance(x, str) else x for x in batch]
            usable += [blank] * (batch_size - len(batch))  # one shape, one program
            result = encode(np.stack(usable))  # does not wait for the device
            if before:
                yield from finished(*before)
            before = batch, result
        if before:
            yield from finished(*before)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """``function(item)`` of all in their order, at most `ahead` of them waiting to be taken."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def encode_usable(
    encode: Callable[[np.ndarray], Any],
    inputs: ImageInput,
    source: Source,
    indices: Sequence[int],
    batch_size: int,
    bad: BadExamples,
    view: Callable[[Any, int], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which of `indices` are of usable examples, int64 ``[N]``, and what `encode` makes of their
    pictures ``[N, D]``; the others are added to `bad`.

    ``view(opened, index)`` makes what is encoded; by default it is the view of evaluation.
    """
    make = view or (lambda opened, _: inputs.view(opened))
    kept, rows = [], []
    found = encode_views(
        encode,
        lambda index: make(inputs.open(source, index), index),
        inputs.blank,
        indices,
        batch_size,
    )
    bar = tqdm(found, "encoding", len(indices), unit="pictures", disable=None)
    for number, row in enumerate(bar):
        if isinstance(row, str):
            bad.add(source.metadata(indices[number]).id, row)
        else:
            kept.append(number)
            rows.append(row)
    if rows:
        return np.array(kept, np.int64), np.stack(rows)
    like = np.asarray(encode(np.stack([inputs.blank] * batch_size)))
    return np.zeros(0, np.int64), np.zeros((0, *like.shape[1:]), np.float32)


def stack_or_empty(arrays: Sequence[np.ndarray], like: np.ndarray) -> np.ndarray:
    """``N`` arrays of the shape of `like` → ``[N, ...]``; N may be 0."""
    return np.stack(arrays) if arrays else np.zeros((0, *like.shape), like.dtype)


def encode_images(fns: EncodeFns, images: np.ndarray, batch_size: int) -> np.ndarray:
    """``[N, H, W, 3]`` uint8, or features ``[N, F]`` → ``[N, D]``."""
    return in_batches(fns.image, (images,), batch_size)


def encode_captions(
    fns: EncodeFns, inputs: TextInput, captions: Sequence[str], batch_size: int
) -> np.ndarray:
    """``N`` captions → ``[N, D]``."""
    return in_batches(fns.text, inputs(captions), batch_size)


def heat_maps(
    fns: EncodeFns,
    inputs: TextInput,
    images: np.ndarray,
    captions: Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """Images ``[N, H, W, 3]`` uint8 with a caption each → `models.heat_maps`, ``[N, h, w]``."""
    return in_batches(fns.heat_maps, (images, *inputs(captions)), batch_size)


def in_batches(
    encode: Callable[..., Any], arrays: tuple[np.ndarray, ...], batch_size: int
) -> np.ndarray:
    """Applies `encode` to batches of exactly `batch_size`, the last one padded by its last row.

    ``[N, ...]`` each → ``[N, ...]``; one shape, so one compilation.
    """
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
