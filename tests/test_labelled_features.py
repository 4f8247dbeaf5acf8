"""Features of labelled pictures: bad ones, views, and eight devices as one."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw
from fake_encoders import COSINE, task_data

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.labelled_features import (
    classes_in,
    encoded,
    features_of,
    held_out_split,
    labelled,
    random_view_features,
)
from clip_lite_jax.evaluators.registry import build_task
from clip_lite_jax.evaluators.tasks import TaskData
from clip_lite_jax.inference import load
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_step import make_encode_fns


def write_folder(root: Path, pictures: int = 3) -> Path:
    """Colours as classes, some pictures of each to train on and one to measure on."""
    for colour in COLOURS[:6]:
        for number, shape in enumerate(SHAPES[: pictures + 1]):
            split = "val" if number == pictures else "train"
            path = root / split / colour / f"{shape}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(shape, colour).save(path)
    return root


def test_bad_pictures_are_listed_and_left_out(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "train" / "red" / "circle.png").write_bytes(b"no picture")
    data = task_data(source=str(tmp_path), batch_size=5)
    assert held_out_split(data) == "validation"
    classes = classes_in(data, ("train", "validation"))
    assert classes == tuple(sorted(COLOURS[:6]))
    pictures = labelled(data, "train", classes)
    found = encoded(COSINE, data, pictures)
    assert len(pictures) == 18
    assert found.features.shape == (17, 48)
    assert list(data.bad.reasons) == ["train/red/circle.png"]
    source, expected = data.splits["train"], []
    for place, code in zip(pictures.places.tolist(), pictures.codes, strict=True):
        example = source.metadata(place)
        assert classes[code] in example.id
        if example.id not in data.bad:
            opened = data.inputs.image.open(source, place)
            view = data.inputs.image.view(opened)
            expected.append(COSINE.image_features(view[None])[0])
    np.testing.assert_allclose(found.features, np.stack(expected), rtol=1e-6)
    broken = [i for i, p in enumerate(pictures.places) if source.metadata(p).id in data.bad]
    with pytest.raises(DataError, match="none of 1 pictures can be used"):
        encoded(COSINE, data, pictures.take(np.array(broken)))


def test_pictures_are_encoded_once_for_a_model(tmp_path: Path) -> None:
    data = task_data(source=str(write_folder(tmp_path)))
    calls = []

    def features(images: np.ndarray) -> object:
        calls.append(len(images))
        return COSINE.image_features(images)

    fns = replace(COSINE, image_features=features)  # type: ignore[arg-type]
    source, places = data.splits["train"], np.arange(9)
    first, _ = features_of(fns, data, source, places)
    same = replace(data, inputs=replace(data.inputs))
    again, _ = features_of(fns, same, source, places)
    assert calls == [4, 4, 4]  # the last batch is padded
    np.testing.assert_array_equal(first, again)
    features_of(replace(fns), data, source, places[:1])
    features_of(fns, data, data.splits["validation"], places[:1])
    assert len(calls) > 3


def test_random_views(tmp_path: Path) -> None:
    data = task_data(source=str(write_folder(tmp_path)))
    source, places = data.splits["train"], np.arange(6)
    one, kept = random_view_features(COSINE, data, source, places, seed=1)
    two, _ = random_view_features(COSINE, data, source, places[3:], seed=1)
    np.testing.assert_array_equal(one[3:], two)  # a picture's view depends on no other picture
    assert not np.array_equal(one, random_view_features(COSINE, data, source, places, seed=2)[0])
    np.testing.assert_array_equal(kept, places)
    kept_on_disk = replace(data, inputs=TowerInputs(object(), data.inputs.text))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="have one view; set views=0"):
        random_view_features(COSINE, kept_on_disk, source, places, seed=1)


def test_sources_without_labels_or_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    data = task_data(source=str(tmp_path / "set"))
    for task in ("zero_shot", "knn", "linear_probe"):
        with pytest.raises(DataError, match="'test' has no examples; there are: train 18, val"):
            build_task(task, data, {"split": "test"})
    everything = build_task("zero_shot", data, {"split": "all", "prompts": 1}).outcome(COSINE)
    assert everything.metrics["images"] == 24
    (tmp_path / "set" / "val").rename(tmp_path / "val")
    (tmp_path / "set" / "train").rename(tmp_path / "classes")
    by_class = task_data(source=str(tmp_path / "classes"), held_out=0.3)
    for task in ("knn", "linear_probe"):
        with pytest.raises(DataError, match="no class to measure on has training pictures"):
            build_task(task, by_class, {})
    (tmp_path / "plain").mkdir()
    for split in ("train", "test"):
        draw("ring", "red").save(tmp_path / "plain" / f"{split}.png")
        (tmp_path / "plain" / f"{split}.txt").write_text("a red ring")
    plain = task_data(source=str(tmp_path / "plain"), held_out=0.0)
    with pytest.raises(DataError, match="no picture has exactly one label"):
        build_task("zero_shot", plain, {"split": "train"})


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("knn", {"split": "all"}, "split='all' would measure on train, which train='train' learns"),
        ("knn", {"split": "train"}, "set train to another split, or split to validation"),
        ("knn", {"train": "all"}, "measure on validation, which train='all' learns from"),
        ("linear_probe", {"split": "train"}, "train='train' learns from"),
        (
            "linear_probe",
            {"method": "lbfgs", "validation": "validation"},
            "measure on validation, which validation='validation' learns from",
        ),
        ("voc_svm", {"split": "all"}, "which train='train' learns from"),
        ("voc_svm", {"split": "train"}, "which train='train' learns from"),
    ],
)
def test_what_is_learned_from_is_not_measured_on(
    task: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    data = task_data(source=str(write_folder(tmp_path)))
    with pytest.raises(ConfigError, match=message):
        build_task(task, data, options)


def test_too_many_shots_are_said_before_anything_is_encoded(tmp_path: Path) -> None:
    data = task_data(source=str(write_folder(tmp_path)))
    assert build_task("linear_probe", data, {"shots": [3]})
    with pytest.raises(DataError, match="shots=4: a class has only 3 training pictures; set shots"):
        build_task("linear_probe", data, {"shots": [1, 4]})


def test_eight_devices_measure_as_one(finished_run: Path, tmp_path: Path) -> None:
    """Batches that are not full, and a block of keys that is not either."""
    model = load(finished_run, batch_size=8)
    whole = jax.tree.map(np.asarray, (model.params, model.model_state))
    config = DataConfig(source=str(write_folder(tmp_path, pictures=2)), image_size=16)
    splits = build_sources(config, BadExamples(), training=False)
    inputs = TowerInputs(model.pixels, model.tokenizer)
    data = TaskData(splits, inputs, 8, BadExamples())
    results = []
    for devices in (1, 8):
        mesh = build_mesh(jax.devices()[:devices])
        fns = make_encode_fns(model.model, mesh)(*whole)
        features, _ = features_of(fns, data, splits["train"], np.arange(len(splits["train"])))
        tasks = [build_task(name, data, {}) for name in ("zero_shot", "knn")]
        results.append((features, [task.outcome(fns) for task in tasks]))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    for one, eight in zip(results[0][1], results[1][1], strict=True):
        assert one == eight
        assert one.metrics["images"] == 6
