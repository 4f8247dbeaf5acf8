"""Linear probes, against torch with VirTex's schedule, scikit-learn and an exhaustive search."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_encoders import COSINE, task_data
from fifty import fifty_pairs
from scipy import stats
from scipy.optimize import minimize
from scipy.special import log_softmax
from test_labelled import write_cifar10

from benchmarks import classification_cases
from clip_lite_jax.errors import DataError
from clip_lite_jax.evaluators import linear_classifiers
from clip_lite_jax.evaluators.linear_classifiers import fit_lbfgs, fit_sgd, sweep
from clip_lite_jax.evaluators.linear_probe import draw_shots, mean_of_seeds
from clip_lite_jax.evaluators.registry import build_task

REFERENCES = Path(__file__).parent / "data" / "classification.npz"


@pytest.mark.parametrize("steps", [1, 3, 32])
def test_sgd_is_that_of_torch_and_virtex(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs end with a batch of 5, and chunks of 3 steps with padding."""
    monkeypatch.setattr(linear_classifiers, "STEPS", steps)
    case = classification_cases.probe()
    classify = fit_sgd(
        case.train,
        case.codes,
        case.classes,
        batch_size=case.batch_size,
        epochs=case.epochs,
        seed=case.seed,
    )
    expected = np.load(REFERENCES)["probe_logits"]
    np.testing.assert_allclose(classify(case.test), expected, rtol=1e-4, atol=1e-4)


def test_sgd_on_views_and_divergence() -> None:
    case = classification_cases.probe()
    same = np.repeat(case.train[:, None], 3, axis=1)
    options = {"batch_size": 16, "epochs": 3}
    one = fit_sgd(case.train, case.codes, 5, **options)(case.test)  # type: ignore[arg-type]
    views = fit_sgd(same, case.codes, 5, **options)(case.test)  # type: ignore[arg-type]
    np.testing.assert_allclose(one, views, atol=1e-5)
    with pytest.raises(DataError, match="diverged at learning_rate=0.3: features of root mean"):
        fit_sgd(case.train * np.float32(1e30), case.codes, 5, batch_size=16, epochs=2)


def test_lbfgs_minimises_the_objective_that_it_states() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:9].reshape(3, 3), flat[9:]
        losses = -log_softmax(x @ weight + bias, axis=1)[np.arange(40), y]
        return float(np.sum(weight**2) / (2 * 0.5) + losses.sum())

    best = minimize(objective, np.zeros(12), tol=1e-12).x
    expected = log_softmax(x @ best[:9].reshape(3, 3) + best[9:], axis=1)
    classify, converged = fit_lbfgs(x, 2 * y, 6, 0.5)  # classes 1, 3 and 5 have no example
    scores = classify(x)
    assert converged
    assert np.all(scores[:, 1::2] == -np.inf)
    np.testing.assert_allclose(log_softmax(scores[:, ::2], axis=1), expected, atol=2e-2)
    two, _ = fit_lbfgs(x, y % 2, 2, 1.0)
    assert two(x).shape == (40, 2)
    with pytest.raises(DataError, match="two classes to train on, not 1"):
        fit_lbfgs(x, np.zeros(40, int), 2, 1.0)
    assert not fit_lbfgs(x, y, 3, 1e6, max_iter=1)[1]


@pytest.mark.parametrize("peak", [-48, -31, 0, 5, 47, 48])
def test_the_search_finds_the_peak(peak: int) -> None:
    def score(c: float) -> float:
        return -abs(round(8 * np.log10(c)) - peak)

    c, tried = sweep(score)
    assert c == pytest.approx(10 ** (peak / 8))
    assert len(tried) <= 7 + 8
    assert min(tried) == pytest.approx(1e-6)
    assert sweep(lambda c: 0.5)[0] == pytest.approx(1e-6)  # of equals the smallest


def test_few_shots_and_their_interval() -> None:
    codes = np.repeat([0, 2, 3], [4, 9, 2])
    chosen = draw_shots(codes, 2, seed=0)
    assert np.bincount(codes[chosen]).tolist() == [2, 0, 2, 2]
    assert len(set(chosen)) == 6
    assert draw_shots(codes, 1, 0).tolist() != draw_shots(codes, 1, 1).tolist()
    with pytest.raises(DataError, match="shots=3: a class has only 2 training pictures"):
        draw_shots(codes, 3, seed=0)
    values = [0.5, 0.7, 0.6, 0.4]
    found = mean_of_seeds("x", values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found["x_low"], found["x_high"]) == pytest.approx((low, high))
    assert np.isnan(mean_of_seeds("x", [0.5])["x_low"])


def test_cifar_end_to_end(tmp_path: Path) -> None:
    write_cifar10(tmp_path, rows=5)
    data = task_data(source=str(tmp_path))
    options = {"epochs": 2, "views": 2, "shots": [1], "few_shot_seeds": 2, "max_iter": 30}
    task = build_task("linear_probe", data, options)
    metrics = task.outcome(COSINE).metrics
    assert (metrics["train_images"], metrics["images"]) == (25, 5)
    assert 0 <= metrics["shots_1_top1_low"] + 1 <= metrics["shots_1_top1_high"] + 1
    assert "2 random crops and flips a picture" in task.protocol
    again = build_task("linear_probe", data, options)
    assert again.outcome(COSINE).metrics == metrics
    searched = build_task(
        "linear_probe", data, {"method": "lbfgs", "held_out": 0.2, "max_iter": 30}
    )
    outcome = searched.outcome(COSINE)
    assert "chosen on 20% of the training pictures" in searched.protocol
    by_c = {row["c"]: row["validation_top1"] for row in outcome.tables["c"]}
    assert by_c[outcome.metrics["c"]] == max(by_c.values())


def test_inaturalist_end_to_end(tmp_path: Path) -> None:
    """Validation data are measured on, so that C is searched on a part of the training's."""
    species = ["Corvus corax", "Rosa canina", "Apis mellifera"]
    for split, pairs in (("train", fifty_pairs()[:24]), ("val", fifty_pairs()[24:30])):
        names = [f"{split}_{i}.jpg" for i in range(len(pairs))]
        images = []
        for i, (name, pair) in enumerate(zip(names, pairs, strict=True)):
            path = tmp_path / "train_val2018" / "Aves" / str(i % 3) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pair.image)
            images.append({"id": i, "file_name": str(path.relative_to(tmp_path))})
        content = {
            "info": {"year": 2018},
            "images": images,
            "annotations": [
                {"id": i, "image_id": i, "category_id": i % 3} for i in range(len(images))
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(species)],
        }
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))
    data = task_data(
        source=str(tmp_path / "train2018.json"),
        splits={"validation": str(tmp_path / "val2018.json")},
        format="inaturalist",
    )
    for options in (
        {"epochs": 2},
        {"method": "lbfgs", "max_iter": 30},
        {"method": "lbfgs", "c": 0.316},
    ):
        task = build_task("linear_probe", data, options)
        outcome = task.outcome(COSINE)
        assert task.protocol.startswith("6 pictures of 'validation', trained on 24 of 'train', 3")
        assert [row["class"] for row in outcome.tables["per_class"]] == sorted(species)
    assert outcome.metrics["c"] == 0.316
    assert "without training pictures" not in task.protocol
    assert "C=0.316" in task.protocol
    assert "seed" not in task.protocol  # nothing is drawn
    for options in ({}, {"method": "lbfgs"}, {"method": "lbfgs", "c": 1.0, "max_train": 9}):
        assert (
            "drawn with seed 4" in build_task("linear_probe", data, options | {"seed": 4}).protocol
        )
    shots = build_task("linear_probe", data, {"shots": [1, 2], "few_shot_seeds": 3}).protocol
    assert "1, 2 shots: mean of 3 draws, L-BFGS with C=0.316" in shots
