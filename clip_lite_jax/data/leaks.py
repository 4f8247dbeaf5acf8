"""Pictures that are in training and in what training is judged by.

COCO's pictures bear one number through all its releases, so files need not be read to see that
``train2017`` holds pictures of Karpathy's validation and test splits: those come from ``val2014``,
most of which became part of ``train2017``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.data.pairs import FileImages, Pairs, RemoteImages
from clip_lite_jax.data.rows import TEXT, array

COCO_NUMBER = r"(?:^|[/_])(?P<number>\d{12})\.jpg$"
"""``COCO_val2014_000000391895.jpg`` and ``train2017/000000391895.jpg`` are one picture."""
SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """Pictures of one split that are in another."""

    split: str
    other: str
    count: int
    of: int
    """Pictures of `split`."""
    first: Sequence[str]
    """Ids of some, in `split`."""

    def __str__(self) -> str:
        return (
            f"{self.count:,} of the {self.of:,} pictures of {self.split} are in {self.other} "
            f"({', '.join(self.first)}{', …' * (self.count > len(self.first))})"
        )


def leaks_into_training(sources: Mapping[str, object]) -> list[Leak]:
    """What the split ``train`` shares with each other split."""
    train = sources.get("train")
    return [
        leak
        for split, source in sorted(sources.items())
        if split != "train" and (leak := leak_between(split, source, "train", train)) is not None
    ]


def leak_between(split: str, source: object, other: str, known: object) -> Leak | None:
    """The pictures of `source` that are also in `known`; see `keys_of`."""
    shared = np.flatnonzero(np.asarray(pc.is_in(keys_of(source), keys_of(known), skip_nulls=True)))
    if not len(shared):
        return None
    every = pa.concat_arrays(
        [part.rows.ids.take(pa.array(part.indices)) for part in _parts(source)]
    )
    first = every.take(pa.array(shared[:SHOWN])).to_pylist()
    return Leak(split, other, len(shared), len(every), first)


def keys_of(source: object) -> pa.Array:
    """What tells the pictures of a source apart wherever they are, in its order.

    COCO's numbers, or the paths of files; null for other pictures, and nothing for sources that are
    neither `Pairs` nor mixtures of them.
    """
    return pa.concat_arrays([array([], TEXT), *map(_keys, _parts(source))])


def _parts(source: object) -> Iterator[Pairs]:
    if isinstance(source, Pairs):
        yield source
    for part in getattr(source, "parts", {}).values():
        yield from _parts(part)


def _keys(pairs: Pairs) -> pa.Array:
    chosen = pa.array(pairs.indices)
    ids = pairs.rows.ids.take(chosen)
    number = pc.extract_regex(ids, COCO_NUMBER).field("number")
    numbered = pc.greater(pc.fill_null(pc.binary_length(number), 0), 0)
    paths = pa.nulls(len(ids), TEXT)
    if isinstance(pairs.images, (FileImages, RemoteImages)):
        # Equal names in two folders are two pictures.
        root = pa.scalar(str(pairs.images.root.resolve()), TEXT)
        names = pairs.images.paths.take(chosen)
        paths = pc.binary_join_element_wise(root, names, pa.scalar("/", TEXT))
    return pc.if_else(numbered, number, paths)
