"""Associations in a model's embeddings, before and after a concept is removed from them.

A concept is a direction: what the two texts of many pairs ("a photo of a man", "a photo of a
woman") differ by.  Two sets of things, X and Y, are compared by how much closer they lie to a set A
than to a set B.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass as checked_dataclass

from clip_lite_jax.config.types import STRICT, NonNegativeInt, PositiveInt
from clip_lite_jax.data.pairs import inside
from clip_lite_jax.data.records import Example
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.evaluators.bias_sets import BiasSets, Set, default_sets, read_sets
from clip_lite_jax.evaluators.encoding import encode_captions, encode_images, stack_or_empty
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns

MOST_PARTITIONS = 20_000
"""Up to so many ways to part X and Y all are tried; of more, as many as `permutations`."""


@dataclass(frozen=True)
class Concept:
    """What the texts of pairs differ by."""

    direction: np.ndarray
    """float64 ``[D]``, of length 1; it points at the first text of the pairs."""
    explained: float
    """Part of the variance within pairs that lies along it: near 1 the pairs agree."""


def concept(pairs: np.ndarray) -> Concept:
    """The first principal component of pairs ``[P, 2, D]``, each centred on its own mean.

    The sign, which principal components lack, is the one that puts the first embedding of the
    pairs on the positive side on average.

    Source: Bolukbasi et al. (arXiv 1607.06520), section 5, step 1.

    Raises:
      ValueError: no pair, or none whose embeddings differ.
    """
    pairs = np.asarray(pairs, np.float64)
    if pairs.ndim != 3 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs are [P, 2, D], not {list(pairs.shape)}")
    half = (pairs[:, 0] - pairs[:, 1]) / 2  # of a centred pair one is this, the other its negative
    _, sizes, axes = np.linalg.svd(half, full_matrices=False)
    if not sizes[0] > 0:
        raise ValueError("the two embeddings of every pair are equal")
    direction = axes[0]
    if np.mean(half @ direction) < 0:
        direction = -direction
    return Concept(direction, float(sizes[0] ** 2 / np.sum(sizes**2)))


def concept_direction(pairs: np.ndarray) -> np.ndarray:
    """The direction ``[D]`` of `concept`, from embeddings of pairs ``[P, 2, D]``."""
    return concept(pairs).direction


def remove(embeddings: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Embeddings ``[N, D]`` without what they have of a direction ``[D]``, of length 1 again.

    Source: Bolukbasi et al. (arXiv 1607.06520), section 5, step 2a, "neutralize".  An embedding
    that is nothing but the direction becomes 0.
    """
    embeddings = np.asarray(embeddings, np.float64)
    direction = np.asarray(direction, np.float64) / np.linalg.norm(direction)
    before = np.linalg.norm(embeddings, axis=1, keepdims=True)
    rest = embeddings - (embeddings @ direction)[:, None] * direction
    length = np.linalg.norm(rest, axis=1, keepdims=True)
    # Rounding leaves a direction of its own of what was nothing else.
    return np.where(length > 1e-6 * before, rest / np.maximum(length, 1e-300), 0.0)


def associations(targets: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``s(w, A, B)`` ``[N]``: mean cosine with A less mean cosine with B; rows have length 1."""
    return np.mean(targets @ a.T, axis=1) - np.mean(targets @ b.T, axis=1)


@dataclass(frozen=True)
class Effect:
    """How differently X and Y are associated with A and B.

    Positive: X lies closer to A (than to B) than Y does.  Negative: Y does.
    """

    d: float
    """Difference of the mean associations over their standard deviation in X and Y together."""
    p: float
    """One-sided: part of all ways to part X and Y anew whose difference is as large or larger."""
    p_two_sided: float
    """The same of the difference's absolute value."""
    mean_x: float
    mean_y: float
    partitions: int
    exact: bool


def effect(
    x: np.ndarray,
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    permutations: int = 10_000,
    seed: int = 0,
) -> Effect:
    """The effect of embeddings ``[N, D]`` of length 1.

    The standard deviation has N - 1 below, as in the code of iEAT.  Where there are more than
    `MOST_PARTITIONS` partitions, `permutations` random ones and the true one are counted.

    Source: Caliskan et al. (arXiv 1608.07187), "Word-Embedding Association Test"; for images Steed
    and Caliskan (arXiv 2010.15052), section 3.
    """
    s = np.concatenate([associations(x, a, b), associations(y, a, b)])
    count, total = len(x), len(s)
    mean_x, mean_y = float(s[:count].mean()), float(s[count:].mean())
    spread = float(np.std(s, ddof=1)) if total > 1 else 0.0
    exact = comb(total, count) <= MOST_PARTITIONS
    chosen = _partitions(total, count, exact, permutations, seed)
    sums = s[chosen].sum(axis=1)
    differences = sums / count - (s.sum() - sums) / (total - count)
    # Sums in another order differ by rounding: what is equal counts as large.
    observed, slack = mean_x - mean_y, 1e-12 + 1e-9 * float(np.abs(s).max())
    # A spread that is only rounding is none: all are associated alike.
    return Effect(
        observed / spread if spread > 1e-9 else 0.0,
        float(np.mean(differences >= observed - slack)),
        float(np.mean(np.abs(differences) >= abs(observed) - slack)),
        mean_x,
        mean_y,
        len(chosen),
        exact,
    )


def _partitions(total: int, count: int, exact: bool, permutations: int, seed: int) -> np.ndarray:
    """Members of X in each partition ``[R, count]``; the true one is among them."""
    if exact:
        return np.array(list(combinations(range(total), count)))
    rng = np.random.default_rng(seed)
    drawn = rng.permuted(np.tile(np.arange(total), (permutations, 1)), axis=1)[:, :count]
    return np.concatenate([np.arange(count)[None], drawn])


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class BiasOptions:
    """Which sets are compared."""

    sets: str | None = None
    """JSON file of pairs and tests (docs/evaluate.md); None takes `bias_sets.DEFAULT`."""
    permutations: PositiveInt = 10_000
    """Random partitions for the p-value of sets that are too large for all of them."""
    seed: NonNegativeInt = 0


class Bias(TaskEvaluator):
    """Effect sizes of the tests of a file, with the embeddings as they are and without the concept.

    The concept is removed from X and Y; A and B stay as they are.  d has no scale: once the concept
    is gone, what is left is divided by its own small spread, and d may still be large.  How much is
    left, in cosines, is the difference of the mean associations.
    """

    def __init__(self, data: TaskData, options: BiasOptions) -> None:
        """Raises `DataError` where the file is not what it should be."""
        self.data, self.options = data, options
        path = Path(options.sets) if options.sets else None
        self.sets: BiasSets = default_sets() if path is None else read_sets(path)
        self.folder = None if path is None else path.parent
        self.protocol = (
            f"{len(self.sets.tests)} tests of {path.name if path else 'the built-in sets'} "
            f"({digest(self.sets)}); "
            f"concept {self.sets.concept!r}: first principal component of {len(self.sets.pairs)} "
            "centred pairs of texts, towards the first of each; d: difference of mean "
            "association of X and Y with A against B over the standard deviation in both "
            "together (N - 1), difference: the same undivided; positive: X is closer to A than "
            "Y is; p: one-sided, over partitions of X and Y; removed: the concept projected out "
            "of X and Y"
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        pairs = self._texts(fns, [text for pair in self.sets.pairs for text in pair])
        try:
            found = concept(pairs.reshape(len(self.sets.pairs), 2, -1))
        except ValueError as error:
            raise DataError(f"definitional pairs: {error}") from error
        metrics: dict[str, float] = {"pairs": len(self.sets.pairs), "explained": found.explained}
        rows: list[dict[str, Any]] = []
        for test in self.sets.tests:
            named = {"X": test.X, "Y": test.Y, "A": test.A, "B": test.B}
            x, y, a, b = (self._embedded(fns, test.name, *item) for item in named.items())
            for state in ("before", "after"):
                if state == "after":
                    x, y = remove(x, found.direction), remove(y, found.direction)
                result = effect(x, y, a, b, self.options.permutations, self.options.seed)
                metrics[f"{test.name}_difference_{state}"] = result.mean_x - result.mean_y
                metrics[f"{test.name}_d_{state}"] = result.d
                metrics[f"{test.name}_p_{state}"] = result.p
                rows.append(
                    {
                        "test": test.name,
                        "concept": "kept" if state == "before" else "removed",
                        **{letter: one.name for letter, one in named.items()},
                        **{
                            f"n_{letter}": len(e)
                            for letter, e in zip(named, (x, y, a, b), strict=True)
                        },
                        "mean_X": result.mean_x,
                        "mean_Y": result.mean_y,
                        "d": result.d,
                        "p": result.p,
                        "p_two_sided": result.p_two_sided,
                        "partitions": result.partitions,
                        "exact": result.exact,
                        "says": said(result.d, named),
                    }
                )
        return Outcome(metrics, {"tests": rows})

    def _embedded(self, fns: EncodeFns, test: str, letter: str, some: Set) -> np.ndarray:
        if some.texts:
            return self._texts(fns, some.texts)
        source = _Files(some.images, self.folder or Path())
        views = []
        for index, name in enumerate(some.images):
            try:
                views.append(
                    self.data.inputs.image.view(self.data.inputs.image.open(source, index))
                )
            except BadImage as error:
                self.data.bad.add(name, str(error))
        if not views:
            raise DataError(f"test {test!r}: no picture of {letter} ({some.name!r}) can be used")
        stacked = stack_or_empty(views, self.data.inputs.image.blank)
        return _of_length_one(encode_images(fns, stacked, self.data.batch_size))

    def _texts(self, fns: EncodeFns, texts: Sequence[str]) -> np.ndarray:
        embedded = encode_captions(fns, self.data.inputs.text, texts, self.data.batch_size)
        return _of_length_one(embedded)


def digest(sets: BiasSets) -> str:
    """Twelve characters that other sets do not share; pictures count by their names."""
    content = json.dumps(asdict(sets), sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def build_bias(data: TaskData, options: BiasOptions) -> Bias:
    return Bias(data, options)


def said(d: float, named: dict[str, Set]) -> str:
    """An effect in words, with the sets by their names."""
    if d == 0:
        return f"{named['X'].name!r} and {named['Y'].name!r} are associated alike"
    near, far = ("X", "Y") if d > 0 else ("Y", "X")
    return (
        f"{named[near].name!r} is closer to {named['A'].name!r} than {named[far].name!r} is, "
        f"against {named['B'].name!r}"
    )


def _of_length_one(embeddings: np.ndarray) -> np.ndarray:
    """Raises `ConfigError` where a critic has no embeddings whose cosine means anything."""
    embeddings = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not np.allclose(lengths, 1, atol=0.02):
        raise ConfigError(
            "bias compares embeddings by their cosine, which says something for model.critic.name="
            f"'dot' alone; these have lengths from {lengths.min():.3g} to {lengths.max():.3g}"
        )
    return embeddings / lengths


@dataclass(frozen=True)
class _Files:
    """Pictures beside a file of sets, as a `Source`."""

    names: Sequence[str]
    folder: Path

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        name = self.names[index]
        try:
            data = inside(self.folder, name).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        return Example(name, name, (), data, {})

    def metadata(self, index: int) -> Example:
        return Example(self.names[index], self.names[index], (), b"", {})
