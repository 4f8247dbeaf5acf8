"""From examples to batches: deterministic in (seed, step), whatever the threads and processes.

Order of operations: shuffle → drop the epoch's remainder → repeat → random map → batch; of a
mixture: shuffle and repeat each part → mix → random map → batch.  Step s of process p then reads
the contiguous rows ``[s B + p B / n, s B + (p + 1) B / n)``, or such pieces for each of its devices
where these are no neighbours in the mesh, so any number of processes n sees the same ordered global
batches, and the position is a function of the step alone.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from clip_lite_jax.batch import Batch
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import caption_ops
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import check_resampling
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sharing import Shared
from clip_lite_jax.data.sources import IndependentPairs, Mixture, Source
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.models import Inputs
from clip_lite_jax.processes import end_with_parent


class TrainTransform(grain.transforms.RandomMap):
    """Source index → one row of a training `Batch`.

    An example that cannot be used keeps its slot with ``valid = False``: dropping it would shift
    all later examples and so change every batch after it.
    """

    def __init__(
        self,
        source: Source,
        inputs: TowerInputs,
        config: DataConfig,
        bad: BadExamples,
        second: bool = False,
    ) -> None:
        """With `second` a row holds another view and another caption, for self-supervision.

        Raises `ConfigError` where `config` asks for what is not installed.
        """
        check_resampling(config.augment)
        self.source, self.inputs, self.config, self.bad = source, inputs, config, bad
        self.second = second
        self._shared: Shared | None = Shared(source)
        self.mask_equal_captions = not isinstance(source, IndependentPairs)

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        example = self.source.metadata(element)
        try:
            opened = self.inputs.image.open(self.source, element)
            views = [self._view(opened, example.captions, rng) for _ in range(1 + self.second)]
            valid = True
        except BadImage:  # its reason is found again where it is listed: `report`
            views = [(self.inputs.image.blank, [""], self.inputs.image.changes(rng))]
            views, valid = views * (1 + self.second), False
        inputs = [Inputs(image, *self._text(captions)) for image, captions, _ in views]
        changes = [change for _, _, change in views if change is not None]
        alike = (
            caption_ops.join(views[0][1]).casefold() if self.mask_equal_captions else example.group
        )
        group = np.array([stable_hash(example.group), stable_hash(alike)], np.int32)
        first = inputs[0]
        return Batch(
            first.image,
            first.tokens,
            first.mask,
            group,
            np.bool_(valid),
            np.int32(element),
            inputs[1] if self.second else None,
            np.stack(changes) if changes else None,
        )

    def report(self, index: int) -> None:
        """Lists an example that could not be used; raises as `BadExamples.add` does.

        The example may have been read in another process: it is read again, to see what is wrong.
        """
        id = self.source.metadata(index).id
        if id in self.bad:
            return
        try:
            self.inputs.image.view(self.inputs.image.open(self.source, index))
            reason = "could not be read when it was needed"
        except BadImage as error:
            reason = str(error)
        self.bad.add(id, reason)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that decode: the list of bad examples stays where it is."""
        return self.__dict__ | {"bad": None, "source": self._shared}

    def _view(
        self, opened: Any, captions: Sequence[str], rng: np.random.Generator
    ) -> tuple[np.ndarray, Sequence[str], np.ndarray | None]:
        """A random view, captions that are true of it (one, or all to be averaged), and changes."""
        image, flipped = self.inputs.image.random_view(opened, rng)
        changes = self.inputs.image.changes(rng)
        chosen = caption_ops.choose(captions, self.config.captions)
        if self.config.captions == "averaged":
            return image, chosen, changes
        caption = chosen[int(rng.integers(len(chosen)))]
        caption = caption_ops.drop_from_list(caption, self.config.augment.tag_dropout, rng)
        caption = caption_ops.swap_left_right(caption) if flipped else caption
        return image, [caption], changes

    def _text(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = self.inputs.text(captions)
        return tokens[0] if len(captions) == 1 else mean_direction(tokens), mask[0]


def mean_direction(features: np.ndarray) -> np.ndarray:
    """``[N, F]`` → ``[F]``: the mean of the features scaled to length 1, itself of length 1."""
    units = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    mean = units.mean(axis=0)
    return mean / np.linalg.norm(mean).clip(1e-12)


def stable_hash(text: str) -> int:
    """A signed 32-bit hash that is the same in every process and version."""
    return zlib.crc32(text.encode()) - 2**31


def train_batches(
    transform: TrainTransform,
    batch_size: int,
    seed: int,
    start_step: int,
    pieces: Sequence[int] = (0,),
    of: int = 1,
    parts: int = 1,
) -> Iterator[Batch]:
    """Some rows of the batches from `start_step` on: `pieces` of each, which has `of` equal ones.

    The rows of ``n`` pieces are ``[n · batch_size / of, ...]``.  In `parts` a batch is
    ``[parts, n · batch_size / parts / of, ...]``, its parts one after another in the order of the
    global batch.

    Raises:
      DataError: fewer examples than a batch holds.
    """
    count = len(transform.source)
    if count < batch_size:
        raise DataError(
            f"batch_size={batch_size} is more than the {count} training examples; lower batch_size"
        )
    all_pieces = (
        _order(transform.source, batch_size, seed)
        .seed(seed)
        .random_map(transform)
        .batch(batch_size // parts // of, drop_remainder=True, batch_fn=stack)
    )
    read = [all_pieces.slice(slice(start_step * parts * of + n, None, of)) for n in pieces]
    batches = read[0]
    if len(read) > 1:
        batches = grain.experimental.ZipMapDataset(read).map(_concatenated)
    if parts > 1:
        batches = batches.batch(parts, batch_fn=stack)
    config = transform.config
    options = grain.ReadOptions(
        num_threads=config.threads, prefetch_buffer_size=config.prefetch if config.threads else 0
    )
    ready = batches.to_iter_dataset(options)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # grain's processes read theirs; we have none of absl's
            flags.FLAGS.mark_as_parsed()
        # Batches come back through shared memory, in the order of the steps.
        ready = ready.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.workers,
                per_worker_buffer_size=max(1, config.prefetch // config.workers),
            ),
            # They would wait for ever for a trainer that was killed.
            worker_init_fn=_begin_worker,
        )
    return _reporting(iter(ready), transform)


def _begin_worker(number: int, count: int) -> None:
    del number, count
    end_with_parent()


def _reporting(batches: Iterator[Batch], transform: TrainTransform) -> Iterator[Batch]:
    for batch in batches:
        for index in batch.index[~batch.valid]:
            transform.report(int(index))
        yield batch


def _order(source: Source, batch_size: int, seed: int) -> grain.MapDataset:
    """Indices of examples, without end: epochs in an order of their own, or a mixture's parts."""
    if not isinstance(source, Mixture):
        count = len(source)
        order = grain.MapDataset.range(count).shuffle(seed)
        return order.slice(slice(count - count % batch_size)).repeat()
    # Parts take turns by their shares exactly; epochs of one end anywhere in those of another.
    spans = zip(source.starts[:-1].tolist(), source.starts[1:].tolist(), strict=True)
    parts = [
        grain.MapDataset.range(start, stop).shuffle(seed + number).repeat()
        for number, (start, stop) in enumerate(spans)
    ]
    return grain.MapDataset.mix(parts, source.shares)


def stack(rows: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *values: np.stack(values), *rows)


def _concatenated(pieces: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *values: np.concatenate(values), *pieces)
