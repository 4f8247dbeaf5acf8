"""From examples to batches: deterministic in (seed, step), whatever the threads and processes.

Order of operations: shuffle → drop the epoch's remainder → repeat → random map → batch.  Step s of
process p then reads the contiguous rows ``[s B + p B / n, s B + (p + 1) B / n)``, so any number of
processes n sees the same ordered global batches, and the position is a function of the step alone.
"""

import zlib
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import caption_ops, image_ops
from clip_lite_jax.data.sources import BadExamples, IndependentPairs, Source
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.train_step import Batch


class TrainTransform(grain.transforms.RandomMap):
    """Source index → one row of a training `Batch`.

    An example that cannot be used keeps its slot with ``valid = False``: dropping it would shift
    all later examples and so change every batch after it.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, config: DataConfig, bad: BadExamples
    ) -> None:
        self.source, self.tokenizer, self.config, self.bad = source, tokenizer, config, bad
        self.mask_equal_captions = not isinstance(source, IndependentPairs)

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        size = self.config.image_size
        example = self.source[element]
        augment = self.config.augment
        try:
            picture = image_ops.decode(example.image)
            image, flipped = image_ops.augment(picture, size, augment, rng)
            captions = caption_ops.choose(example.captions, self.config.captions)
            caption = captions[int(rng.integers(len(captions)))]
            caption = caption_ops.drop_from_list(caption, augment.tag_dropout, rng)
            caption = caption_ops.swap_left_right(caption) if flipped else caption
            valid = True
        except BadImage as error:
            self.bad.add(example.id, str(error))
            image, caption, valid = np.zeros((size, size, 3), np.uint8), "", False
        tokens, mask = self.tokenizer([caption])
        alike = caption.casefold() if self.mask_equal_captions else example.group
        group = np.array([stable_hash(example.group), stable_hash(alike)], np.int32)
        return Batch(image, tokens[0], mask[0], group, np.bool_(valid), np.int32(element))


def stable_hash(text: str) -> int:
    """A signed 32-bit hash that is the same in every process and version."""
    return zlib.crc32(text.encode()) - 2**31


def train_batches(
    transform: TrainTransform,
    batch_size: int,
    seed: int,
    start_step: int,
    process: int,
    processes: int,
) -> Iterator[Batch]:
    """This process's rows ``[batch_size / processes, ...]`` of the batches from `start_step` on.

    Raises:
      DataError: fewer examples than a batch holds.
    """
    count = len(transform.source)
    if count < batch_size:
        raise DataError(
            f"batch_size={batch_size} is more than the {count} training examples; lower batch_size"
        )
    rows = batch_size // processes
    batches = (
        grain.MapDataset.range(count)
        .shuffle(seed)
        .slice(slice(count - count % batch_size))
        .repeat()
        .seed(seed)
        .random_map(transform)
        .batch(rows, drop_remainder=True, batch_fn=stack)
        .slice(slice(start_step * processes + process, None, processes))
    )
    threads = transform.config.threads
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=transform.config.prefetch if threads else 0
    )
    return iter(batches.to_iter_dataset(options))


def stack(rows: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *values: np.stack(values), *rows)
