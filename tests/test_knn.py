"""Weighted nearest neighbours, against a loop and scikit-learn, on the layout of Fashion-MNIST."""

from pathlib import Path

import numpy as np
import pytest
from fake_encoders import COSINE, task_data
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from test_labelled import write_idx

from clip_lite_jax.evaluators import knn
from clip_lite_jax.evaluators.knn import nearest, votes
from clip_lite_jax.evaluators.registry import build_task
from clip_lite_jax.vectors import unit


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last of both padded."""
    monkeypatch.setattr(knn, "QUERIES", 4)
    monkeypatch.setattr(knn, "KEYS", 8)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 7, 8, 21]), st.sampled_from([1, 4, 6]), st.integers(0, 10**6))
def test_neighbours_and_votes_are_those_of_a_loop(train: int, test: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Signs only: many rows are equal, and many cosines.
    keys = unit(rng.choice([-1, 1], size=(train, 4)).astype(np.float32))
    queries = unit(rng.choice([-1, 1], size=(test, 4)).astype(np.float32))
    codes = rng.integers(0, 3, train)
    k = 5
    places, cosines = nearest(keys, queries, k)
    assert places.shape == (test, min(k, train))
    found = votes(codes[places], cosines, 0.07, 3)
    for row, query in enumerate(queries):
        similar = [float(np.dot(key, query)) for key in keys]
        order = sorted(range(train), key=lambda i: (-round(similar[i], 4), i))[:k]
        assert places[row].tolist() == order
        expected = np.zeros(3)
        for i in order:
            expected[codes[i]] += np.exp((similar[i] - similar[order[0]]) / 0.07)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4)


def test_unit_length() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(unit(rows), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert (unit(rows).dtype, unit(rows[0], np.float64).dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(unit(rows[0]), [0.6, 0.8], rtol=1e-6)


def test_the_class_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, 30)
    centres = rng.normal(size=(4, 6))
    keys = unit((centres[codes] + rng.normal(size=(30, 6))).astype(np.float32))
    queries = unit(rng.normal(size=(21, 6)).astype(np.float32))
    places, cosines = nearest(keys, queries, 7)
    found = votes(codes[places], cosines, 0.07, 4)
    model = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(keys, codes)
    np.testing.assert_array_equal(found.argmax(axis=1), model.predict(queries))
    np.testing.assert_allclose(
        found / found.sum(axis=1, keepdims=True), model.predict_proba(queries), atol=1e-4
    )


def test_fashion_mnist_end_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    numbers = (np.arange(26) % 10).astype(np.uint8)
    images = rng.integers(0, 40, (26, 28, 28), np.uint8)
    for image, number in zip(images, numbers.tolist(), strict=True):
        down, across = divmod(number, 4)
        image[7 * down : 7 * down + 7, 7 * across : 7 * across + 7] = 255  # says which class it is
    for prefix, some in (("train", slice(0, 20)), ("t10k", slice(20, 26))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[some], True)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", numbers[some], True)
    data = task_data(source=str(folder))
    for options, neighbours in (({"k": 1}, 1), ({}, 20), ({"features": "embedding"}, 20)):
        task = build_task("knn", data, options)
        metrics = task.outcome(COSINE).metrics
        assert f"6 pictures of 'test' by {neighbours} nearest of 20" in task.protocol
        assert metrics["images"] == 6
        assert metrics["train_images"] == 20
    assert build_task("knn", data, {"k": 1}).outcome(COSINE).metrics["top1"] == 1
    assert "seed" not in build_task("knn", data, {"max_train": 20}).protocol
    task = build_task("knn", data, {"max_train": 7, "max_images": 1, "seed": 3})
    assert "; drawn with seed 3" in task.protocol
    some = task.outcome(COSINE).metrics
    assert (some["train_images"], some["images"]) == (7, 1)
