"""The exchange of captions, AUROC with weights, and the tables of the experiment."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.wrong_captions import (
    RESULTS,
    Plan,
    auroc,
    draws_of,
    mean_auroc,
    statistics,
    swap,
)
from benchmarks.wrong_captions_report import markdown
from benchmarks.wrong_captions_train import Gallery


def gallery(images: int = 60) -> Gallery:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, images)
    owner = np.repeat(np.arange(images), counts)
    return Gallery(
        image=np.zeros((images, 1)),
        caption=np.zeros((len(owner), 1)),
        groups=np.array([f"g{i // 3}" for i in range(images)]),
        captions=np.array([f"c{i % 37}" for i in range(len(owner))]),  # some of them equal
        owner=owner,
    )


def test_a_fifth_of_the_captions_are_wrong_and_no_more() -> None:
    some = gallery()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        captions = some.captions[np.searchsorted(some.owner, np.arange(60))]
        source = swap(some.groups, captions, 0.2, rng)
        moved = np.flatnonzero(source != np.arange(60))
        assert len(moved) == 12
        assert sorted(source[moved]) == moved.tolist()
        assert np.all(some.groups[source[moved]] != some.groups[moved])
        assert np.all(captions[source[moved]] != captions[moved])
    with pytest.raises(ValueError, match="no exchange of 2 captions"):
        swap(np.array(["a", "a"]), np.array(["x", "y"]), 1.0, np.random.default_rng(0))


def test_auroc_is_that_of_scikit_learn_with_ties_and_weights() -> None:
    rng = np.random.default_rng(1)
    score, wrong = rng.integers(0, 8, 50).astype(float), rng.random(50) < 0.3
    weight = rng.integers(0, 4, (7, 50)).astype(float)
    expected = [roc_auc_score(wrong, -score, sample_weight=w) for w in weight]
    np.testing.assert_allclose(auroc(score, wrong, weight), expected)
    assert auroc(score, wrong)[0] == pytest.approx(roc_auc_score(wrong, -score))
    assert auroc(np.zeros(50), wrong)[0] == 0.5


def test_a_critic_that_knows_finds_them_all() -> None:
    some, plan = gallery(), Plan(draws=3)
    draws = draws_of(some, plan, 0)
    for draw in draws:
        right = some.owner[draw.caption] == np.arange(60)
        np.testing.assert_array_equal(draw.wrong, ~right)
    knows = np.where(some.groups[:, None] == some.groups[some.owner][None, :], 5.0, -5.0)
    guesses = np.random.default_rng(2).normal(size=knows.shape)
    found = mean_auroc(knows, some, draws, others=30)
    assert found["T"][0] == found["contrast"][0] == 1
    assert abs(mean_auroc(guesses, some, draws, others=30)["T"][0] - 0.5) < 0.15
    each = statistics(guesses, some, draws[0], 30)
    assert each["rank"].min() >= -1
    np.testing.assert_array_equal(each["T"], guesses[np.arange(60), draws[0].caption])


def test_the_page_shows_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    assert markdown(results) in Path("docs/score.md").read_text()
    for row in results["rows"]:
        for found in row["galleries"].values():
            assert len(found["auroc"]["T"]) == len(results["plan"]["seeds"]) >= 3
