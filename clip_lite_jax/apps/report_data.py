"""The health of a run's data, from what is known of them without their pictures.

``clip-lite data check`` reads every picture as well; a report does not.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import caption_ops
from clip_lite_jax.data.leaks import keys_of, leaks_into_training
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.rows import in_chunks
from clip_lite_jax.data.sources import IndependentPairs, Source
from clip_lite_jax.data.tokenizer import LONGEST, Tokenizer

LOOKED_AT = 200_000
"""Examples of a split that are looked at, evenly spread."""
TOKENIZED = 20_000
"""Captions of a split that are put into tokens, evenly spread."""


@dataclass(frozen=True)
class Split:
    """Counts of one split, of those `looked_at`."""

    name: str
    images: int
    looked_at: int
    captions: int
    most_captions: int
    """Of one image."""
    groups: int
    repeated: float
    """Share of captions that another image has as well, word for word."""
    ambiguous: float
    """Share of captions that an image of another group has as well."""
    cut: float
    """Share of the texts a model reads that are longer than `data.max_tokens`."""
    unknown: float | None
    """Share of tokens that stand for what the vocabulary does not have; None where there are none
    such."""
    in_training: float | None
    """Share of captions that training has, too; None for training itself."""
    groups_in_training: int
    same_pictures: int
    """Images that another entry of the split has as well, by path or COCO's number."""

    @property
    def each(self) -> float:
        """Captions of an image, on average."""
        return self.captions / max(1, self.looked_at)


@dataclass(frozen=True)
class Health:
    splits: list[Split]
    sampled: bool
    max_tokens: int
    holds_all: int | None
    """Tokens that would hold 99 % of the training captions whole, if some are cut."""
    vocabulary: int
    used: int
    """Tokens of the vocabulary that occur in the training captions looked at."""
    tokenized: int
    leaks: list[str]
    leaks_checked: bool
    """Whether there is anything to tell pictures of two splits apart by."""
    drawn: bool
    """Whether pairs are drawn to order, so that equal captions are no sign of anything."""


def data_health(sources: Mapping[str, Source], tokenizer: Tokenizer, data: DataConfig) -> Health:
    """What is in each split, training first, and what is odd about it."""
    names = sorted(sources, key=lambda name: (name != "train", name))
    names = [name for name in names if len(sources[name])]
    whole = Tokenizer(tokenizer.model, LONGEST, data.caption_normalization)
    train: _Seen | None = None
    splits, used, tokenized, holds = [], np.zeros(0, bool), 0, None
    for name in names:
        seen = _look(name, sources[name], whole, data)
        same = _same_pictures(sources[name])
        splits.append(_split(name, len(sources[name]), seen, train, data.max_tokens, same))
        if name == "train":
            train, used, tokenized = seen, seen.used, len(seen.lengths)
            if splits[-1].cut:
                holds = int(np.quantile(seen.lengths, 0.99, method="higher"))
    return Health(
        splits=splits,
        sampled=any(split.looked_at < split.images for split in splits),
        max_tokens=data.max_tokens,
        holds_all=holds,
        vocabulary=tokenizer.vocab_size,
        used=int(used.sum()),
        tokenized=tokenized,
        leaks=[str(leak) for leak in leaks_into_training(sources)],
        leaks_checked=_can_tell(sources),
        drawn=isinstance(sources["train"], IndependentPairs),
    )


@dataclass(frozen=True)
class _Seen:
    """What is kept of a split while others are compared with it."""

    captions: list[str]
    image: list[int]
    """The image of each caption."""
    per_image: list[int]
    group: list[str]
    """Of each image."""
    lengths: np.ndarray
    used: np.ndarray
    unknown: float | None


def _look(name: str, source: Source, whole: Tokenizer, data: DataConfig) -> _Seen:
    examples = [source.metadata(i) for i in _spread(len(source), LOOKED_AT)]
    captions = [caption for example in examples for caption in example.captions]
    per_image = [len(example.captions) for example in examples]
    read = [_read(example, data) for example in examples]
    texts = [text for some in read for text in some]
    lengths, counts = [], np.zeros(whole.vocab_size, np.int64)
    for chunk in in_chunks([texts[i] for i in _spread(len(texts), TOKENIZED)], 2048):
        tokens, mask = whole(chunk)
        lengths.append(mask.sum(axis=1))
        counts += np.bincount(tokens[mask], minlength=len(counts))
    unknown = None
    if whole.unknown is not None:
        unknown = float(counts[whole.unknown] / max(1, counts.sum()))
    return _Seen(
        captions,
        np.repeat(np.arange(len(examples)), per_image).tolist(),
        per_image,
        [example.group for example in examples],
        np.concatenate(lengths) if lengths else np.zeros(0, int),
        counts > 0,
        unknown,
    )


def _read(example: Example, data: DataConfig) -> list[str]:
    """The texts that the text tower reads of an example in training."""
    return list(caption_ops.choose(example.captions, data.captions))


def _split(
    name: str, images: int, seen: _Seen, train: _Seen | None, max_tokens: int, same: int
) -> Split:
    images_with = Counter(text for text, _ in set(zip(seen.captions, seen.image, strict=True)))
    groups = [seen.group[image] for image in seen.image]
    groups_with = Counter(text for text, _ in set(zip(seen.captions, groups, strict=True)))
    count = max(1, len(seen.captions))
    in_training, shared = None, 0
    if train is not None:
        known = set(train.captions)
        in_training = sum(text in known for text in seen.captions) / count
        shared = len(set(seen.group) & set(train.group))
    return Split(
        name=name,
        images=images,
        looked_at=len(seen.per_image),
        captions=len(seen.captions),
        most_captions=max(seen.per_image, default=0),
        groups=len(set(seen.group)),
        repeated=sum(images_with[text] > 1 for text in seen.captions) / count,
        ambiguous=sum(groups_with[text] > 1 for text in seen.captions) / count,
        cut=float(np.mean(seen.lengths > max_tokens)) if len(seen.lengths) else 0.0,
        unknown=seen.unknown,
        in_training=in_training,
        groups_in_training=shared,
        same_pictures=same,
    )


def _same_pictures(source: Source) -> int:
    counts = pc.value_counts(keys_of(source).drop_null()).field("counts").to_numpy()
    return int(counts[counts > 1].sum())


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` indices, evenly spread."""
    if count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


def _can_tell(sources: Mapping[str, Source]) -> bool:
    others = [source for name, source in sources.items() if name != "train" and len(source)]
    if not others or not len(sources["train"]):
        return False
    return all(
        len(keys := keys_of(source)) and keys.null_count < len(keys)
        for source in (sources["train"], *others)
    )
