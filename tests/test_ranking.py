"""Ranks in blocks against plain loops and scikit-learn; one device against eight."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from clip_lite_jax.evaluators.bootstrap import mean_interval, resampled_means
from clip_lite_jax.evaluators.ranking import (
    Counts,
    average_precision,
    count,
    dense_counts,
    ranks,
)
from clip_lite_jax.evaluators.reranking import reranked
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_step import EncodeFns, make_encode_fns


class Given:
    """A model whose embeddings are what it is given, and whose critic is `matrix`."""

    def __init__(self, matrix: Any, pairs: Any) -> None:
        self.matrix, self.pairs = matrix, pairs

    def encode_image(self, params: Any, state: Any, images: Any) -> Any:
        return images

    image_features = encode_image

    def encode_text(self, params: Any, state: Any, tokens: Any, mask: Any) -> Any:
        return tokens

    def critic(self, params: Any) -> Any:
        return SimpleNamespace(matrix=self.matrix, pairs=self.pairs)


def inner(devices: int = 8) -> EncodeFns:
    mesh = build_mesh(jax.devices()[:devices])
    given = Given(lambda a, b: a @ b.T, lambda a, b: (a * b).sum(-1))
    return make_encode_fns(given, mesh)({}, {})  # type: ignore[arg-type]


def gallery(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of small whole numbers: products are exact, and many of them tie."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), rng.integers(1, 6, images))
    values = [rng.integers(-2, 3, (n, 6)).astype(np.float32) for n in (images, len(owner))]
    return values[0], values[1], owner


def brute_force(scores: np.ndarray, owner: np.ndarray) -> Counts:
    images, captions = np.zeros(len(owner), int), np.zeros(len(owner), int)
    for c, i in enumerate(owner):
        images[c] = sum(scores[k, c] >= scores[i, c] for k in range(len(scores)) if k != i)
        others = [k for k in range(len(owner)) if owner[k] != i]
        captions[c] = sum(scores[i, k] >= scores[i, c] for k in others)
    return Counts(images, captions)


@pytest.mark.parametrize("images", [1, 3, 37])
def test_blocks_count_what_a_loop_counts(images: int) -> None:
    first, second, owner = gallery(images)
    wanted = brute_force(first @ second.T, owner)
    assert np.any(wanted.images) == (images > 1)
    for devices in (8, 1):
        for block in (8, 4096):  # padded last blocks, and all in one
            found = count(inner(devices), first, second, owner, block)
            np.testing.assert_array_equal(found.images, wanted.images)
            np.testing.assert_array_equal(found.captions, wanted.captions)
    dense = dense_counts(first @ second.T, owner)
    np.testing.assert_array_equal(dense.images, wanted.images)
    np.testing.assert_array_equal(dense.captions, wanted.captions)


def test_copies_tie_wherever_they_lie() -> None:
    """Equal pictures and captions in other blocks, of numbers that no product rounds alike."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 33)).astype(np.float32)
    images, texts = np.repeat(one, 40, axis=0), np.repeat(one / 3, 40, axis=0)
    found = count(inner(), images, texts, np.arange(40), block=16)
    assert np.all(found.images == 39)
    assert np.all(found.captions == 39)


def test_scores_that_are_no_numbers_count_against_the_model() -> None:
    images = np.full((4, 2), np.nan, np.float32)
    found = count(inner(), images, np.ones((4, 2), np.float32), np.arange(4))
    assert np.all(found.images == 3)
    assert np.all(found.captions == 3)


def test_average_precision_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(20), rng.integers(1, 6, 20))
    scores = rng.normal(size=(20, len(owner)))
    of_texts, of_images = average_precision(dense_counts(scores, owner), owner)
    for i in range(20):
        assert of_images[i] == pytest.approx(average_precision_score(owner == i, scores[i]))
    for c, i in enumerate(owner):
        right = np.arange(20) == i
        assert of_texts[c] == pytest.approx(average_precision_score(right, scores[:, c]))


def test_the_best_caption_gives_an_images_rank() -> None:
    counts = Counts(np.array([0, 4, 1]), np.array([7, 2, 0]))
    to_images, to_texts = ranks(counts, np.array([0, 0, 1]))
    assert to_images.tolist() == [1, 5, 2]
    assert to_texts.tolist() == [3, 1]


def test_reranking_all_candidates_is_exact() -> None:
    """And of some: right answers that are none of them come after them."""

    def pairs(a: Any, b: Any) -> Any:
        return -(((a - b) ** 2).sum(-1) ** 2)

    def matrix(a: Any, b: Any) -> Any:
        return pairs(a[..., :, None, :], b[..., None, :, :])

    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(60), 2)
    images = rng.integers(-3, 4, (60, 4)).astype(np.float32)
    texts = images[owner] + rng.integers(-1, 2, (120, 4)).astype(np.float32)
    given = Given(matrix, pairs)
    fns = make_encode_fns(given, build_mesh(jax.devices()[:1]))({}, {})  # type: ignore[arg-type]
    wanted = brute_force(np.asarray(matrix(images, texts)), owner)
    exact = reranked(fns, images, texts, owner, candidates=120)
    np.testing.assert_array_equal(exact.images, wanted.images)
    np.testing.assert_array_equal(exact.captions, wanted.captions)
    some = reranked(fns, images, texts, owner, candidates=20)
    assert np.all((some.images <= wanted.images) | (some.images == 20))
    few = wanted.images < 5
    assert np.mean(some.images[few] == wanted.images[few]) > 0.9  # the approximation finds them


def test_intervals_of_a_mean() -> None:
    """The normal approximation, where values are many; wider where they come in clusters."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=4000)
    low, high = mean_interval(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=error / 10)
    assert high == pytest.approx(values.mean() + error, abs=error / 10)
    copies, clusters = np.repeat(values[:400], 10), np.repeat(np.arange(400), 10)
    wide = np.subtract(*mean_interval(copies, clusters)[::-1])
    assert wide == pytest.approx(np.subtract(*mean_interval(values[:400])[::-1]), rel=0.05)
    assert mean_interval(np.full(3, 0.5)) == (0.5, 0.5)
    assert np.isnan(mean_interval(np.zeros(0))).all()


def test_resampled_means_by_hand() -> None:
    """Two clusters: all of one, all of the other, or one of each."""
    found = set(np.round(resampled_means(np.array([2.0, 3.0]), np.array([1.0, 3.0])), 6))
    assert found == {2.0, 1.0, 1.25}
