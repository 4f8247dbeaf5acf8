"""VOC 2007 by SVMs, against VirTex's own function and its reading of ImageSets."""

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from fake_encoders import COSINE, task_data
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from benchmarks import classification_cases
from clip_lite_jax.errors import DataError
from clip_lite_jax.evaluators.registry import build_task
from clip_lite_jax.evaluators.voc_svm import (
    _weighted_precision,
    average_precision,
    fit_svm,
    interval,
    targets,
)

REFERENCES = Path(__file__).parent / "data" / "classification.npz"
COSTS = (0.01, 0.1, 1.0, 10.0)
CLASSES = ("bird", "car", "cat", "tvmonitor")
PICTURES = {"train": 14, "val": 14, "test": 12}


def write_voc(root: Path) -> None:
    """As the development kit lays it out, with the lists of each class; colours tell classes."""
    colours = dict(zip(CLASSES[:3], ("red", "green", "blue"), strict=True))
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    marks: dict[str, dict[str, dict[str, int]]] = {split: {} for split in PICTURES}
    splits = [split for split, count in PICTURES.items() for _ in range(count)]
    for number, split in enumerate(rng.permutation(splits).tolist()):
        id = f"{number + 1:06}"
        # 1: there, 0: there in difficult objects alone, -1: not there.
        mark = {name: int(rng.choice([-1, -1, 1, 0])) for name in CLASSES[:3]} | {"tvmonitor": -1}
        if split == "test":
            mark["tvmonitor"] = 1
        if max(mark.values()) < 0:
            mark["car"] = 1
        marks[split][id] = mark
        there = [name for name in CLASSES if mark[name] >= 0]
        pixels = draw("square", colours.get(there[0], "black"))
        pixels.save(root / "JPEGImages" / f"{id}.jpg")
        objects = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"
            for name in there
            # One that is plain to see makes the class present, whatever else there is.
            for difficult in ((1,) if mark[name] == 0 else (1, 0))
        )
        text = f"<annotation><filename>{id}.jpg</filename>{objects}</annotation>"
        (root / "Annotations" / f"{id}.xml").write_text(text)
    marks["trainval"] = dict(sorted((marks["train"] | marks["val"]).items()))
    lists = root / "ImageSets" / "Main"
    for split, found in marks.items():
        (lists / f"{split}.txt").write_text("".join(f"{id}\n" for id in found))
        for name in CLASSES:
            rows = "".join(f"{id} {mark[name]:2}\n" for id, mark in found.items())
            (lists / f"{name}_{split}.txt").write_text(rows)


def read_lists(root: Path, split: str) -> tuple[list[str], np.ndarray]:
    """Ids and targets ``[N, C]`` as VirTex's data set reads them."""
    columns = []
    for name in CLASSES:
        with (root / "ImageSets" / "Main" / f"{name}_{split}.txt").open() as file:
            rows = list(csv.reader(file, delimiter=" ", skipinitialspace=True))
        columns.append([{-1: 0, 0: -1, 1: 1}[int(mark)] for _, mark in rows])
    return [id for id, _ in rows], np.transpose(columns)


def test_svms_are_virtexs() -> None:
    case, reference = classification_cases.svm(), np.load(REFERENCES)["voc_average_precision"]
    for number, expected in enumerate(reference):
        found = fit_svm(case.train, case.known[:, number], COSTS)
        scores = found.model.decision_function(case.test)
        assert average_precision(scores, case.truth[:, number]) == pytest.approx(expected, abs=1e-6)


def test_voc_end_to_end(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007")
    data = task_data(source=str(tmp_path / "VOC2007"))
    ids, known = read_lists(tmp_path / "VOC2007", "trainval")
    test_ids, truth = read_lists(tmp_path / "VOC2007", "test")
    # Annotations in XML say what the lists say.
    found = targets(data.splits["test"])
    assert [Path(id).stem for id in found.ids] == test_ids
    np.testing.assert_array_equal(found.matrix(CLASSES), truth)

    task = build_task("voc_svm", data, {})
    outcome = task.outcome(COSINE)

    def features(names: list[str]) -> np.ndarray:
        at = {
            Path(source.metadata(i).id).stem: (source, i)
            for source in data.splits.values()
            for i in range(len(source))
        }
        image = data.inputs.image
        rows = [COSINE.image_features(image.view(image.open(*at[n]))[None])[0] for n in names]
        found = np.stack(rows).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    rows = outcome.tables["per_class"]
    for number, name in enumerate(CLASSES[:3]):
        expected = fit_svm(features(ids), known[:, number], COSTS)
        scores = expected.model.decision_function(features(test_ids))
        precision = average_precision(scores, truth[:, number])
        assert rows[number]["class"] == name
        assert rows[number]["cost"] == expected.cost
        assert rows[number]["average_precision"] == pytest.approx(precision)
        assert rows[number]["test_difficult"] == np.sum(truth[:, number] == -1)
    assert rows[3]["left_out"] == "0 of 28 training pictures; 3 folds need 3 on each side"
    metrics = outcome.metrics
    assert (metrics["classes"], metrics["classes_left_out"]) == (3, 1)
    mean = np.mean([row["average_precision"] for row in rows[:3]])
    assert metrics["mean_average_precision"] == pytest.approx(mean)
    assert metrics["mean_average_precision_low"] < mean < metrics["mean_average_precision_high"]
    assert "12 pictures of 'test', trained on 28 of train+validation, 4 classes" in task.protocol
    with pytest.raises(DataError, match="no class has three training pictures"):
        build_task("voc_svm", task_data(**only_one(tmp_path)), {}).outcome(COSINE)


def only_one(folder: Path) -> dict[str, str]:
    """A source with one picture to train on, and one to test on."""
    for split in ("train", "test"):
        path = folder / "one" / split / "bird" / f"{split}.png"
        path.parent.mkdir(parents=True)
        draw("ring", "red").save(path)
    return {"source": str(folder / "one")}


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_resampled_precision_is_scikit_learns(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, count).astype(float)  # with ties
    truth = rng.choice([-1, 0, 1], count)
    truth[0] = 1
    times = rng.multinomial(count, np.full(count, 1 / count), size=3).astype(float)
    found = _weighted_precision(scores, truth, times)
    easy = truth != -1
    for row, weights in zip(found, times, strict=True):
        if not weights[truth == 1].any():
            assert np.isnan(row)
            continue
        expected = average_precision_score(
            truth[easy] == 1, scores[easy], sample_weight=weights[easy]
        )
        assert row == pytest.approx(expected)


def test_interval_of_one_picture() -> None:
    assert interval(np.array([[0.3]]), np.array([[1]]), resamples=5) == (1, 1)
