"""Zero-shot classification: the class whose prompts the critic scores highest with a picture."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pydantic

from clip_lite_jax.config.types import STRICT, NonNegativeInt
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators import classification
from clip_lite_jax.evaluators.encoding import encode_captions, encode_images
from clip_lite_jax.evaluators.labelled_features import (
    classes_in,
    drawn_with,
    encoded,
    held_out_split,
    labelled,
)
from clip_lite_jax.evaluators.prompts import (
    names_from_file,
    names_of,
    published,
    shown,
    templates,
    with_digest,
)
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns
from clip_lite_jax.vectors import unit

MAX_TEXTS = 4096
"""Prompts that are scored with a batch of pictures at once where scores are averaged."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ZeroShotOptions:
    split: str = ""
    """By default ``test``, or ``validation`` where there is none."""
    prompts: str | int = "80"
    """OpenAI's ``80`` of ImageNet, their best ``7``, CIFAR's ``18``, ``1`` ("a photo of a {}."), or
    a file with one on each line."""
    classes: str = ""
    """A file of classes to choose from, ``class=name`` or ``name`` on each line; by default all of
    the source, by OpenAI's names for ImageNet's and else their own."""
    max_images: NonNegativeInt = 0
    """Pictures to measure on, drawn at random; 0 takes all."""
    seed: NonNegativeInt = 0


class ZeroShot(TaskEvaluator):
    """Source: CLIP (arXiv 2103.00020), section 3.1.4, and its notebook on prompts for ImageNet.

    The embeddings of a class's prompts are normalised, averaged and normalised again.  Critics that
    do not compare by cosine have no such mean: of theirs the scores T of the prompts are averaged.

    Of OpenAI's names of ImageNet's classes "missile" and "sunglasses" stand for two each.  No score
    tells those apart, so the four count as wrong, which costs top-1 0.2 points at most beside a
    measurement that takes one of the two.
    """

    def __init__(self, data: TaskData, options: ZeroShotOptions) -> None:
        self.data, self.options = data, options
        self.templates = templates(str(options.prompts))
        self.split = held_out_split(data, options.split)
        if options.classes:
            names = names_from_file(options.classes)
        else:
            splits = [name for name, source in data.splits.items() if len(source)]
            data.split(self.split)  # says so if it is not there
            names = names_of(classes_in(data, splits))
        if len(names) < 2:
            raise ConfigError(f"zero_shot needs two classes to choose from, not {len(names)}")
        self.classes, self.names = tuple(names), list(names.values())
        self.pictures = labelled(data, self.split, self.classes, options.max_images, options.seed)
        self.protocol = self._protocol("normalised, averaged, normalised")

    def _protocol(self, ensemble: str, alike: Sequence[str] = ()) -> str:
        prompts, classes = str(self.options.prompts), f"{len(self.classes)} classes"
        if prompts not in published()["templates"]:
            prompts = with_digest(prompts, self.templates)
        if self.options.classes:
            pairs = zip(self.classes, self.names, strict=True)
            lines = [f"{label}={name}" for label, names in pairs for name in names]
            classes += f" ({with_digest(self.options.classes, lines)})"
        text = (
            f"{len(self.pictures)} pictures of {self.split!r}, {classes}; {len(self.templates)} "
            f"prompts ({prompts}) a name, {ensemble}; ties count as wrong"
        )
        if alike:
            text += (
                f", so {len(alike)} classes are never right: their prompts read as those of others "
                f"do, by equal names or cut at data.max_tokens ({', '.join(alike[:4])})"
            )
        return text + drawn_with(self.options.seed, self.pictures)

    def outcome(self, fns: EncodeFns) -> Outcome:
        texts = [[t.replace("{}", n) for n in some for t in self.templates] for some in self.names]
        prompts = encode_captions(
            fns, self.data.inputs.text, list(chain.from_iterable(texts)), self.data.batch_size
        ).astype(np.float32)
        counts = np.array([len(some) for some in texts])
        how = "scores averaged"
        alike = indistinct(prompts, counts)
        if is_unit(prompts):
            how = "normalised, averaged, normalised"
            prompts, counts = ensemble(prompts, counts), np.ones(len(counts), int)
        self.protocol = self._protocol(how, [shown(self.classes)[code] for code in alike])
        found = encoded(fns, self.data, self.pictures)
        parts = []
        size = self.data.batch_size
        for start in range(0, len(found.codes), size):
            embedded = encode_images(fns, found.features[start : start + size], size)
            scores = class_scores(fns, embedded, prompts, counts)
            parts.append(
                classification.predictions(scores, found.codes[start : start + len(embedded)])
            )
        result = classification.outcome(
            classification.Predictions.joined(parts), found.codes, shown(self.classes)
        )
        result.metrics["left_out"] = float(self.pictures.left_out)
        return replace(result, metrics=result.metrics | {"prompts": float(len(self.templates))})


def is_unit(embeddings: np.ndarray) -> bool:
    """Whether rows have unit length, as those of a critic that compares by cosine have."""
    return bool(np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-2))


def indistinct(prompts: np.ndarray, counts: np.ndarray) -> list[int]:
    """The classes whose prompts ``[P, D]`` are the same as those of another class."""
    ends = np.cumsum(counts)
    contents = [p.tobytes() for p in np.split(prompts, ends[:-1])]
    often = Counter(contents)
    return [code for code, content in enumerate(contents) if often[content] > 1]


def ensemble(prompts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Embeddings ``[P, D]``, `counts` ``[C]`` of each class → unit vectors ``[C, D]``."""
    starts = np.cumsum(counts) - counts
    return unit(np.add.reduceat(unit(prompts), starts, axis=0) / counts[:, None])


def class_scores(
    fns: EncodeFns, images: np.ndarray, prompts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """The mean T of images ``[B, D]`` with the prompts ``[P, D]`` of each class: ``[B, C]``."""
    parts = []
    for first, last in _pieces(counts):
        some = counts[first:last]
        start = int(counts[:first].sum())
        scores = np.asarray(fns.matrix(images, prompts[start : start + int(some.sum())]))
        starts = np.cumsum(some) - some
        parts.append(np.add.reduceat(scores.astype(np.float64), starts, axis=1) / some)
    return np.concatenate(parts, axis=1)


def _pieces(counts: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of classes that have `MAX_TEXTS` prompts together, or one class that has more."""
    first, total = 0, 0
    for number, count in enumerate(counts):
        if number > first and total + count > MAX_TEXTS:
            yield first, number
            first, total = number, 0
        total += int(count)
    yield first, len(counts)
