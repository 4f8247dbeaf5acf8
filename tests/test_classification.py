"""Accuracies, and zero-shot classification, against scikit-learn, clip-benchmark and loops."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from fake_encoders import CONCAT, COSINE, task_data, text_embedding, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from test_labelled import write_imagenet

from benchmarks import classification_cases
from clip_lite_jax.apps.confusion_page import confusion_page
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.classification import mean_per_class, outcome, predictions
from clip_lite_jax.evaluators.prompts import names_from_file, published, templates
from clip_lite_jax.evaluators.registry import TASKS, build_task
from clip_lite_jax.evaluators.zero_shot import class_scores, ensemble, is_unit

REFERENCES = Path(__file__).parent / "data" / "classification.npz"
CAPTIONS = ("a photo of a {}.", "art of the {}.")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 10**6))
def test_metrics_are_those_of_scikit_learn(images: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.arange(images * classes)).reshape(images, classes).astype(float)
    labels = rng.integers(0, classes, images)
    found = predictions(scores, labels)
    names = [f"class {number}" for number in range(classes)]
    result = outcome(found, labels, names)
    every = np.arange(classes)
    if classes > 2:
        top1 = top_k_accuracy_score(labels, scores, k=1, labels=every)
        assert result.metrics["top1"] == pytest.approx(top1)
    if classes > 5:
        top5 = top_k_accuracy_score(labels, scores, k=5, labels=every)
        assert result.metrics["top5"] == pytest.approx(top5)
    np.testing.assert_array_equal(found.predicted, scores.argmax(axis=1))
    there = confusion_matrix(labels, found.predicted, labels=every).diagonal()
    counts = np.bincount(labels, minlength=classes)
    recalls = there[counts > 0] / counts[counts > 0]
    assert result.metrics["mean_per_class"] == pytest.approx(recalls.mean())
    assert [row["top1"] for row in result.tables["per_class"]] == pytest.approx(recalls)
    matrix = np.zeros((classes, classes), int)
    for row in result.tables["confusion"]:
        matrix[names.index(row["class"]), names.index(row["predicted"])] = row["images"]
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, found.predicted, labels=every))
    for name in ("top1", "mean_per_class"):
        low, value, high = (result.metrics[f"{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= value + 1e-12
        assert value <= high + 1e-12


def test_balanced_accuracy_and_intervals() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=400, p=[0.8, 0.15, 0.05])
    scores = rng.normal(size=(400, 3)) + 1.5 * np.eye(3)[labels]
    result = outcome(predictions(scores, labels), labels, "abc").metrics
    assert result["mean_per_class"] == pytest.approx(
        balanced_accuracy_score(labels, scores.argmax(axis=1))
    )
    # The binomial standard error, by 1.96 either way.
    width = 2 * 1.96 * (result["top1"] * (1 - result["top1"]) / 400) ** 0.5
    assert result["top1_high"] - result["top1_low"] == pytest.approx(width, rel=0.1)
    assert result["mean_per_class_high"] - result["mean_per_class_low"] > width


def test_the_mean_over_classes_is_never_certain() -> None:
    """Two classes of four pictures, one all right and one all wrong; then by simulation, where
    classes have one picture each, five, or many, or one class alone has few."""
    hits, counts = np.array([4, 0, 0]), np.array([4, 4, 0])
    found = mean_per_class(hits, counts)
    assert found["mean_per_class"] == 0.5
    assert 0.1 < found["mean_per_class_low"] < 0.3
    assert 0.7 < found["mean_per_class_high"] < 0.9
    assert mean_per_class(counts, counts)["mean_per_class_low"] < 0.9
    rng = np.random.default_rng(0)
    for rates, counts in (
        (np.full(300, 0.9), np.ones(300, int)),
        (np.full(100, 0.9), np.full(100, 5)),
        (np.linspace(0, 0.8, 10), np.full(10, 1000)),
        (np.append(np.ones(50), 0.5), np.append(np.full(50, 1000), 2)),
        (np.full(2, 0.5), np.full(2, 4)),
    ):
        covered = [
            found["mean_per_class_low"] <= rates.mean() <= found["mean_per_class_high"]
            for _ in range(400)
            for found in [mean_per_class(rng.binomial(counts, rates), counts)]
        ]
        assert np.mean(covered) > 0.9


def test_ties_and_what_is_no_number_count_as_wrong() -> None:
    nan = np.nan
    scores = np.array([[1.0, 1, 0], [2, 1, 1], [nan, 1, 0], [0, nan, -1], [nan, nan, nan]])
    found = predictions(scores, np.array([0, 0, 0, 0, 2]))
    assert found.ranks.tolist() == [2, 1, 3, 2, 3]
    assert found.predicted.tolist() == [1, 0, 1, 1, 0]
    assert predictions(np.zeros((1, 1)), np.array([0])).ranks.tolist() == [1]


def test_zero_shot_is_clip_benchmarks() -> None:
    case, reference = classification_cases.zero_shot(), np.load(REFERENCES)
    texts = [t.replace("{}", n) for n in case.names for t in case.templates]
    prompts = np.stack([case.texts[text] for text in texts])
    vectors = ensemble(prompts, np.full(len(case.names), len(case.templates)))
    images = case.images / np.linalg.norm(case.images, axis=1, keepdims=True)
    found = outcome(predictions(images @ vectors.T, case.labels), case.labels, case.names).metrics
    assert found["top1"] == pytest.approx(float(reference["acc1"]))
    assert found["top5"] == pytest.approx(float(reference["acc5"]))
    assert found["mean_per_class"] == pytest.approx(float(reference["mean_per_class_recall"]))


def test_scores_of_a_critic_without_cosine_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_lite_jax.evaluators.zero_shot.MAX_TEXTS", 3)  # several pieces
    rng = np.random.default_rng(0)
    counts = np.array([2, 1, 5, 1, 1, 1])
    prompts, images = rng.normal(size=(counts.sum(), 24)), rng.normal(size=(3, 24))
    assert not is_unit(prompts)
    expected, start = [], 0
    for count in counts:
        own = [np.tanh(images + prompt).sum(axis=1) for prompt in prompts[start : start + count]]
        expected.append(np.mean(own, axis=0))
        start += count
    found = class_scores(CONCAT, images, prompts, counts)
    np.testing.assert_allclose(found, np.transpose(expected))


def test_imagenet_end_to_end(tmp_path: Path) -> None:
    """Two classes are called crane: OpenAI's names tell them apart."""
    wnids = write_imagenet(tmp_path)
    data = task_data(source=str(tmp_path))
    task = build_task("zero_shot", data, {"prompts": 7})
    result = task.outcome(COSINE)
    names = ["goldfish", "crane bird", "construction crane"]
    assert [row["class"] for row in result.tables["per_class"]] == [
        f"{wnid} {name}" for wnid, name in zip(wnids, names, strict=True)
    ]
    # The notebook's loop.
    vectors = []
    for name in names:
        own = np.stack([text_embedding(t.format(name)) for t in templates("7")])
        own /= np.linalg.norm(own, axis=-1, keepdims=True)
        vectors.append(own.mean(axis=0) / np.linalg.norm(own.mean(axis=0)))
    source = data.splits["validation"]
    right = []
    for index in range(len(source)):
        picture = data.inputs.image.view(data.inputs.image.open(source, index))
        scores = np.stack(vectors) @ COSINE.image(picture[None])[0]
        right.append(wnids[int(scores.argmax())] in source[index].id)
    assert result.metrics["top1"] == pytest.approx(np.mean(right))
    assert (result.metrics["images"], result.metrics["prompts"]) == (len(source), 7)
    assert "7 prompts (7) a name, normalised, averaged, normalised" in task.protocol
    averaged = build_task("zero_shot", data, {"prompts": 7})
    averaged.outcome(CONCAT)
    assert "scores averaged" in averaged.protocol


def test_own_classes_and_prompts(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "set")
    classes, prompts = tmp_path / "classes.txt", tmp_path / "prompts.txt"
    lines = "n01443537=a fish\nn01443537=orange fish\nn02012849=bird\nn03126707=bird\nother\n"
    classes.write_text(lines)
    prompts.write_text("{}\n\nthe {} of {}\n")
    assert names_from_file(str(classes))["n01443537"] == ["a fish", "orange fish"]
    options = {"prompts": str(prompts), "classes": str(classes)}
    data = task_data(source=str(tmp_path / "set"))
    task = build_task("zero_shot", data, options)
    result = task.outcome(COSINE)
    assert result.metrics["classes"] == 4
    build = functools.partial(build_task, "zero_shot", data)
    before = build(options | {"max_images": 2, "seed": 5}).protocol
    assert re.search(r"4 classes \(classes.txt \w{12}\); 2 prompts \(prompts.txt \w{12}\)", before)
    assert before.endswith("; drawn with seed 5")
    assert "seed" not in build(options).protocol
    prompts.write_text("{}\n\na {} of {}\n")  # the name of the file stays
    assert before != build(options | {"max_images": 2, "seed": 5}).protocol
    # Two classes are called bird: none of their pictures can be right.
    assert "2 classes are never right" in task.protocol
    for row in result.tables["per_class"]:
        assert row["top1"] == 0 or row["class"].startswith("n01443537")
    classes.write_text("n01443537=fish\nother\n")
    with pytest.raises(DataError, match="2 classes are not listed: n02012849, n03126707"):
        build_task("zero_shot", data, options)
    prompts.write_text("a photo\n")
    with pytest.raises(ConfigError, match=r"no \{\} for the class in 'a photo'"):
        build_task("zero_shot", data, options)
    with pytest.raises(ConfigError, match="choose from 80, 18, 7, 1, or give a file"):
        build_task("zero_shot", data, {"prompts": "81"})
    classes.write_text("=fish\n")
    with pytest.raises(ConfigError, match="=fish.*is no name"):
        names_from_file(str(classes))
    with pytest.raises(ConfigError, match=f"choose from {', '.join(TASKS)}"):
        build_task("zeroshot", data, {})
    with pytest.raises(ConfigError, match="options of the task 'knn'.*neighbours"):
        build_task("knn", data, {"neighbours": 5})


def test_published_prompts() -> None:
    content = published()
    counts = {name: len(templates(name)) for name in content["templates"]}
    assert counts == {"80": 80, "18": 18, "7": 7, "1": 1}
    assert set(templates("7")) < set(templates("80"))
    assert set(templates("1")) < set(templates("80"))
    assert all(text.count("{}") == 1 for name in counts for text in templates(name))
    names = content["imagenet"]
    assert len(names) == 1000
    assert list(names) == sorted(names)
    assert names["n02012849"] == "crane bird"
    assert names["n04355933"] == names["n04356056"]
    assert "Copyright (c) 2021 OpenAI" in content["notice"]
    assert tokens(templates("80"))[0].shape[0] == 80


def test_confusion_page() -> None:
    rows = [
        {"class": "<b>cat</b>", "predicted": "<b>cat</b>", "images": 8},
        {"class": "<b>cat</b>", "predicted": "dog", "images": 2},
        {"class": "dog", "predicted": "<b>cat</b>", "images": 5},
    ]
    page = confusion_page(rows)
    assert "<b>cat" not in page
    assert "&lt;b&gt;cat" in page
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "80.0 %" in page
    assert "8 of 15 pictures" in page
    many = [
        {"class": f"c{n}", "predicted": f"c{(n + m) % 60}", "images": 1}
        for n in range(60)
        for m in range(2)
    ]
    assert 'class="matrix"' not in confusion_page(many)
    assert 'class="matrix"' in page
    assert "No picture" in confusion_page([])
