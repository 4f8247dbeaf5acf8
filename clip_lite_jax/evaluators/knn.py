"""Weighted nearest neighbours on frozen features, as DINO and instance discrimination measure."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax import Array, lax

from clip_lite_jax.config.types import STRICT, NonNegativeInt, PositiveFloat, PositiveInt
from clip_lite_jax.evaluators import classification
from clip_lite_jax.evaluators.labelled_features import (
    Features,
    check_unseen,
    classes_in,
    drawn_with,
    encoded,
    held_out_split,
    labelled,
    unlearnable,
)
from clip_lite_jax.evaluators.prompts import shown
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns
from clip_lite_jax.vectors import unit

QUERIES, KEYS = 512, 16_384
"""Pictures that are compared at once: 32 MiB of similarities."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class KNNOptions:
    train: str = "train"
    split: str = ""
    """By default ``test``, or ``validation`` where there is none."""
    k: PositiveInt = 20
    temperature: PositiveFloat = 0.07
    features: Features = "features"
    max_train: NonNegativeInt = 0
    """Training pictures to take, drawn at random; 0 takes all."""
    max_images: NonNegativeInt = 0
    seed: NonNegativeInt = 0


class KNN(TaskEvaluator):
    """A training picture among the k nearest votes for its class with exp(cosine / temperature).

    Source: Wu et al. (arXiv 1805.01978), section 3.4; k = 20 as in DINO (arXiv 2104.14294).
    """

    def __init__(self, data: TaskData, options: KNNOptions) -> None:
        self.data, self.options = data, options
        split = held_out_split(data, options.split)
        check_unseen(data, split, train=options.train)
        self.classes = classes_in(data, (options.train, split))
        self.train = labelled(data, options.train, self.classes, options.max_train, options.seed)
        self.test = labelled(data, split, self.classes, options.max_images, options.seed)
        self.protocol = (
            f"{len(self.test)} pictures of {split!r} by {min(options.k, len(self.train))} nearest "
            f"of {len(self.train)} of {options.train!r}, {len(self.classes)} classes; cosine of "
            f"the {options.features}, weight exp(cosine / {options.temperature}); of equally near "
            "ones the first count, classes with equal votes count as wrong"
            + drawn_with(options.seed, self.train, self.test)
            + unlearnable(self.train, self.test)
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        train = encoded(fns, self.data, self.train, self.options.features)
        test = encoded(fns, self.data, self.test, self.options.features)
        near, cosines = nearest(unit(train.features), unit(test.features), self.options.k)
        parts = []
        for start in range(0, len(near), QUERIES):
            some = slice(start, start + QUERIES)
            scores = votes(
                train.codes[near[some]],
                cosines[some],
                self.options.temperature,
                len(self.classes),
            )
            parts.append(classification.predictions(scores, test.codes[some]))
        found = classification.Predictions.joined(parts)
        result = classification.outcome(found, test.codes, shown(self.classes))
        result.metrics["train_images"] = float(len(train.codes))
        result.metrics["left_out"] = float(self.train.left_out + self.test.left_out)
        return result


def nearest(train: np.ndarray, test: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `train` ``[N, D]`` that are nearest to each of `test` ``[M, D]``, both of unit
    length: places int64 ``[M, k]`` and cosines float32, best first; of equals the first.

    Fewer than k where there are fewer.
    """
    count = min(k, len(train))
    keys = min(KEYS, len(train))
    queries = [
        jnp.asarray(_padded(test[start : start + QUERIES], QUERIES))
        for start in range(0, len(test), QUERIES)
    ]
    found = [
        (jnp.zeros((QUERIES, count), jnp.int32), jnp.full((QUERIES, count), -jnp.inf))
        for _ in queries
    ]
    # Queries stay on the device, and each block of keys, of which there are more, comes once.
    for first in range(0, len(train), keys):
        block = train[first : first + keys]
        padded = jnp.asarray(_padded(block, keys))
        found = [
            _merge(some, padded, first, len(block), *before)
            for some, before in zip(queries, found, strict=True)
        ]
    places, cosines = (
        np.concatenate([np.asarray(a) for a in part]) for part in zip(*found, strict=True)
    )
    return places[: len(test)].astype(np.int64), cosines[: len(test)]


@partial(jax.jit, donate_argnums=(4, 5))
def _merge(
    queries: Array, block: Array, first: int, real: int, places: Array, cosines: Array
) -> tuple[Array, Array]:
    """The nearest so far ``[Q, k]`` and those of a block ``[K, D]``, padding from row `real` on."""
    found = jnp.matmul(queries, block.T, precision=lax.Precision.HIGHEST)
    number = jnp.arange(len(block))
    found = jnp.where(number < real, found, -jnp.inf)
    # What was found before stands first: of equals `top_k` takes the first.
    best, chosen = lax.top_k(jnp.concatenate([cosines, found], 1), cosines.shape[1])
    everywhere = jnp.broadcast_to(number + first, found.shape)
    return jnp.take_along_axis(jnp.concatenate([places, everywhere], 1), chosen, 1), best


def votes(classes: np.ndarray, cosines: np.ndarray, temperature: float, count: int) -> np.ndarray:
    """Classes and cosines of the neighbours ``[M, k]`` → votes float64 ``[M, count]``.

    Each row is divided by the largest vote that it can have, which changes no order.
    """
    cosines = cosines.astype(np.float64)
    weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / temperature)
    found = np.zeros((len(classes), count))
    np.add.at(found, (np.arange(len(classes))[:, None], classes), weights)
    return found


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))
