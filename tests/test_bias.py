"""Bias: every number against loops and planted effects of a known sign; hostile files of sets."""

import copy
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw
from sklearn.decomposition import PCA

from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.bias import (
    Bias,
    BiasOptions,
    build_bias,
    concept,
    concept_direction,
    effect,
    remove,
)
from clip_lite_jax.evaluators.bias_sets import DEFAULT, default_sets
from clip_lite_jax.evaluators.tasks import TaskData
from clip_lite_jax.inference import load

RNG = np.random.default_rng(0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def looped(x: Any, y: Any, a: Any, b: Any) -> tuple[float, float, float]:
    """d, one-sided and two-sided p by the formulas of Caliskan et al., one term at a time."""

    def cos(u: Any, v: Any) -> float:
        return float(sum(u * v) / np.sqrt(sum(u * u) * sum(v * v)))

    def s(w: Any) -> float:
        return sum(cos(w, v) for v in a) / len(a) - sum(cos(w, v) for v in b) / len(b)

    all_s = [s(w) for w in (*x, *y)]
    mean = sum(all_s) / len(all_s)
    spread = np.sqrt(sum((value - mean) ** 2 for value in all_s) / (len(all_s) - 1))

    def difference(order: Any) -> float:
        first, second = order[: len(x)], order[len(x) :]
        return sum(first) / len(first) - sum(second) / len(second)

    observed = difference(all_s)
    others = [difference([all_s[i] for i in order]) for order in permutations(range(len(all_s)))]
    one = np.mean([other >= observed - 1e-12 for other in others])
    two = np.mean([abs(other) >= abs(observed) - 1e-12 for other in others])
    return observed / spread, float(one), float(two)


@pytest.mark.parametrize("sizes", [(3, 3, 2, 4), (2, 4, 1, 1), (1, 1, 3, 2), (4, 2, 2, 2)])
def test_effects_equal_loops(sizes: tuple[int, ...]) -> None:
    for _ in range(2):
        x, y, a, b = (unit(RNG.normal(size=(n, 5))) for n in sizes)
        found = effect(x, y, a, b)
        assert found.exact
        np.testing.assert_allclose((found.d, found.p, found.p_two_sided), looped(x, y, a, b))


def test_effects_of_ties_and_equal_sets() -> None:
    one = unit(RNG.normal(size=(3, 5)))
    a, b = unit(RNG.normal(size=(2, 2, 5)))
    same = effect(one, one, a, b)
    np.testing.assert_allclose(
        (same.d, same.p, same.p_two_sided), looped(one, one, a, b), atol=1e-9
    )
    flat = np.repeat(one[:1], 2, axis=0)
    none = effect(flat, flat, a, b)
    assert (none.d, none.p, none.p_two_sided) == (0, 1, 1)
    alone = effect(one[:1], one[1:2], a[:1], b[:1])
    assert alone.partitions == 2


def test_a_planted_effect_has_its_sign_and_size() -> None:
    """X leans to A by 0.3 along an axis, Y to B as much: s is ±0.6 cos, plus noise."""
    axis, count = np.eye(40)[0], 30
    noise = unit(RNG.normal(size=(2 * count, 40)) * (np.arange(40) > 0))
    lean = np.sqrt(1 - 0.3**2)
    x, y = 0.3 * axis + lean * noise[:count], -0.3 * axis + lean * noise[count:]
    a, b = axis[None], -axis[None]
    found = effect(x, y, a, b, permutations=500)
    # Every x has s = 0.6 and every y s = -0.6: d is their distance over the deviation of all.
    n = 2 * count
    assert found.d == pytest.approx(1.2 / (0.6 * np.sqrt(n / (n - 1))))
    assert (found.mean_x, found.mean_y) == pytest.approx((0.6, -0.6))
    assert not found.exact
    assert found.p == pytest.approx(1 / 501)
    # The labels matter: each swap turns the sign, both together turn it back.
    assert effect(y, x, a, b).d == pytest.approx(-found.d)
    assert effect(x, y, b, a).d == pytest.approx(-found.d)
    assert effect(y, x, b, a).d == pytest.approx(found.d)
    assert effect(y, x, a, b, permutations=500).p == pytest.approx(1.0)
    gone = effect(remove(x, axis), remove(y, axis), a, b)
    assert gone.d == 0


def test_the_direction_is_the_first_principal_component() -> None:
    pairs = RNG.normal(size=(7, 2, 9))
    pairs[:, 0, 3] += 4
    found = concept(pairs)
    centred = pairs - pairs.mean(axis=1, keepdims=True)
    reference = PCA(1).fit(centred.reshape(-1, 9))
    assert abs(found.direction @ reference.components_[0]) == pytest.approx(1)
    assert found.explained == pytest.approx(reference.explained_variance_ratio_[0])
    assert found.direction @ (pairs[:, 0] - pairs[:, 1]).mean(axis=0) > 0
    np.testing.assert_allclose(concept_direction(pairs[:, ::-1]), -found.direction)
    np.testing.assert_array_equal(concept_direction(pairs), found.direction)
    one = concept_direction(pairs[:1])  # of one pair it is the difference
    np.testing.assert_allclose(one, unit(pairs[0, 0] - pairs[0, 1]))
    for wrong in (np.ones((3, 2, 4)), np.ones((0, 2, 4)), np.ones((3, 4))):
        with pytest.raises(ValueError, match="pair"):
            concept_direction(wrong)


def test_removal_leaves_the_rest() -> None:
    embeddings, direction = RNG.normal(size=(6, 8)), RNG.normal(size=8)
    embeddings[0] = 3 * direction
    rest = remove(embeddings.astype(np.float32), direction)
    np.testing.assert_allclose(rest @ direction, 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rest, axis=1), [0, 1, 1, 1, 1, 1], atol=1e-6)
    g = unit(direction)
    for row in range(1, 6):
        expected = embeddings[row] - (embeddings[row] @ g) * g
        np.testing.assert_allclose(rest[row], unit(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(remove(rest, direction), rest, atol=1e-6)
    assert remove(np.zeros((0, 8)), direction).shape == (0, 8)


class PlantedFns:
    """Texts are embedded by the words they hold, images by how red they are."""

    def text(self, tokens: Any, mask: Any) -> np.ndarray:
        del mask
        return unit(np.asarray(tokens, np.float32))

    def image(self, images: Any) -> np.ndarray:
        red = np.asarray(images, np.float32).mean((1, 2))[:, :2] / 255
        return unit(np.concatenate([red - red.mean(1, keepdims=True), 1 + 0 * red], 1))


def planted(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Axis 0 says he or she, the others what it is about."""
    rows = []
    for text in texts:
        words = text.split()
        lean = words.count("he") - words.count("she") + 0.5 * words.count("work")
        rows.append([lean - 0.5 * words.count("home"), 0.1 * len(text), 1.0, "x" in text])
    return np.array(rows, np.float32), np.ones((len(rows), 1), bool)


PLANTED: dict[str, Any] = {
    "concept": "he to she",
    "pairs": [["he", "she"], ["he x", "she x"], ["he reads", "she reads"]],
    "tests": [
        {
            "name": "work_home",
            "X": {"name": "work", "texts": ["work", "work x", "a work"]},
            "Y": {"name": "home", "texts": ["home", "home x", "a home"]},
            "A": {"name": "he", "texts": ["he", "he x"]},
            "B": {"name": "she", "texts": ["she", "she x"]},
        }
    ],
}


def task_data(model: Any = None) -> TaskData:
    inputs = TowerInputs(None, planted)  # type: ignore[arg-type]
    if model is not None:
        inputs = TowerInputs(model.pixels, model.tokenizer)
    return TaskData({}, inputs, 4, BadExamples())


def test_from_a_file_to_effects(tmp_path: Path) -> None:
    path = tmp_path / "sets.json"
    path.write_text(json.dumps(PLANTED))
    task = build_bias(task_data(), BiasOptions(sets=str(path)))
    outcome = task.outcome(PlantedFns())  # type: ignore[arg-type]
    before, after = outcome.tables["tests"]
    embedded = {
        letter: unit(planted(PLANTED["tests"][0][letter]["texts"])[0].astype(float))
        for letter in "XYAB"
    }
    d, p, _ = looped(*embedded.values())
    assert outcome.metrics["work_home_d_before"] == pytest.approx(d, rel=1e-5)
    assert outcome.metrics["work_home_p_before"] == pytest.approx(p)
    assert d > 1.5
    assert p == pytest.approx(1 / 20)
    assert (before["X"], before["Y"], before["A"], before["B"]) == ("work", "home", "he", "she")
    assert before["says"] == "'work' is closer to 'he' than 'home' is, against 'she'"
    assert before["mean_X"] > 0 > before["mean_Y"]
    assert after["concept"] == "removed"
    differences = [outcome.metrics[f"work_home_difference_{s}"] for s in ("before", "after")]
    assert differences == [row["mean_X"] - row["mean_Y"] for row in (before, after)]
    assert abs(after["mean_X"] - after["mean_Y"]) < 0.1 * (before["mean_X"] - before["mean_Y"])
    assert outcome.metrics["explained"] == pytest.approx(1, abs=0.05)
    swapped = copy.deepcopy(PLANTED)
    test = swapped["tests"][0]
    test["X"], test["Y"] = test["Y"], test["X"]
    path.write_text(json.dumps(swapped))
    again = build_bias(task_data(), BiasOptions(sets=str(path))).outcome(PlantedFns())  # type: ignore[arg-type]
    assert again.metrics["work_home_d_before"] == pytest.approx(-d, rel=1e-5)
    assert again.tables["tests"][0]["says"] == before["says"]
    other = build_bias(task_data(), BiasOptions(sets=str(path))).protocol
    assert other != task.protocol  # of a file of the same name
    assert "positive: X is closer to A" in task.protocol


def changed(**changes: Any) -> dict[str, Any]:
    sets = copy.deepcopy(PLANTED)
    test = sets["tests"][0]
    for key, value in changes.items():
        (test if key in test else sets)[key] = value
    return sets


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "a list": ([], "sets.json"),
    "no pairs": (changed(pairs=[]), "pairs"),
    "three of a pair": (changed(pairs=[["a", "b", "c"]]), "pairs"),
    "equal pairs": (changed(pairs=[["he", "he"]]), "equal"),
    "unknown": (changed(more=1), "more"),
    "empty set": (changed(X={"name": "x"}), "needs either texts or images"),
    "both kinds": (changed(X={"name": "x", "texts": ["a"], "images": ["b"]}), "either"),
    "names": (changed(name="<b>"), "name"),
    "twice": (changed(tests=PLANTED["tests"] * 2), "same name"),
    "outside": (changed(X={"name": "x", "images": ["/etc/passwd", "../a.png"]}), "no picture of X"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name: str, tmp_path: Path, finished_run: Path) -> None:
    content, reason = WRONG[name]
    path = tmp_path / "sets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    model = load(finished_run, batch_size=8) if name == "outside" else None
    with pytest.raises(DataError, match=reason):
        build_bias(task_data(model), BiasOptions(sets=str(path))).outcome(PlantedFns())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="No such file"):
        build_bias(task_data(), BiasOptions(sets=str(tmp_path / "none.json")))


def test_pictures_and_a_trained_model(finished_run: Path, tmp_path: Path) -> None:
    sets = changed(
        X={"name": "red", "images": ["a.png", "b.png", "broken.png"]},
        Y={"name": "blue", "images": ["c.png", "d.png"]},
    )
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue"), ("d", "blue")):
        draw("circle" if name in "ac" else "bar", colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    model = load(finished_run, batch_size=4)
    data = task_data(model)
    outcome = Bias(data, BiasOptions(sets=str(tmp_path / "sets.json"))).outcome(model.fns)
    assert all(np.isfinite(value) for value in outcome.metrics.values())
    assert outcome.tables["tests"][0]["n_X"] == 2
    assert list(data.bad.reasons) == ["broken.png"]
    direct = unit(model.encode_image([tmp_path / "a.png", tmp_path / "b.png"]).astype(float))
    y = unit(model.encode_image([tmp_path / "c.png", tmp_path / "d.png"]).astype(float))
    a, b = (unit(model.encode_text([t, f"{t} x"]).astype(float)) for t in ("he", "she"))
    assert outcome.metrics["work_home_d_before"] == pytest.approx(looped(direct, y, a, b)[0], 1e-3)


def test_the_built_in_sets() -> None:
    sets = default_sets()
    assert len(sets.pairs) == 8
    for test in sets.tests:
        assert len(test.X.texts) == len(test.Y.texts)
        assert not set(test.X.texts) & set(test.Y.texts)
        assert not set(test.A.texts) & set(test.B.texts)
    assert DEFAULT["tests"][0]["A"]["name"] == "male"


def test_embeddings_without_a_length_are_refused() -> None:
    class Long:
        def text(self, tokens: Any, mask: Any) -> np.ndarray:
            return np.asarray(tokens, np.float32) * 7

    with pytest.raises(ConfigError, match="'dot' alone"):
        Bias(task_data(), BiasOptions()).outcome(Long())  # type: ignore[arg-type]
