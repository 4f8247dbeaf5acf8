"""Grounding: RefCOCO's files from end to end, and every measure against a loop."""

import io
import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refcoco_files
from PIL import Image
from scipy import ndimage

from benchmarks.grounding import composites
from clip_lite_jax.apps.grounding_page import page
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import decode, resize_and_crop, view_box
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.grounding import Grounding, GroundingOptions, build_grounding
from clip_lite_jax.evaluators.places import (
    box_around,
    hottest,
    on_picture,
    overlap,
    points_at,
    share_near,
    strongest_points,
)
from clip_lite_jax.evaluators.tasks import TaskData
from clip_lite_jax.inference import load

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("size", "side", "shorter"),
    [
        ((90, 40), 20, None),
        ((40, 91), 20, 20),
        ((90, 41), 20, 30),
        ((33, 70), 24, 37),
    ],
)
def test_the_view_is_where_the_picture_shows_it(
    size: tuple[int, int], side: int, shorter: int | None
) -> None:
    """In a picture whose colours are its coordinates."""
    width, height = size
    x = np.broadcast_to(np.arange(width) + 0.5, (height, width))
    y = np.broadcast_to(np.arange(height)[:, None] + 0.5, (height, width))
    picture = Image.fromarray(np.stack([x * 2, y * 2, 0 * x], axis=2).astype(np.uint8))
    seen = resize_and_crop(picture, side, shorter)[..., :2] / 2.0
    left, upper, right, lower = view_box(size, side, shorter)
    centres = (np.arange(side) + 0.5) / side
    middle = slice(3, -3)  # bicubic resampling overshoots at the edges
    np.testing.assert_allclose(
        seen[side // 2, middle, 0], (left + centres * (right - left))[middle], atol=0.8
    )
    np.testing.assert_allclose(
        seen[middle, side // 2, 1], (upper + centres * (lower - upper))[middle], atol=0.8
    )


def test_a_map_on_a_picture_is_bilinear() -> None:
    for _ in range(20):
        cells = RNG.random(RNG.integers(1, 6, 2))
        width, height = RNG.integers(3, 30, 2).tolist()
        left, upper = RNG.uniform(0, width / 3), RNG.uniform(0, height / 3)
        right, lower = RNG.uniform(width / 2, width), RNG.uniform(height / 2, height)
        found = on_picture(cells, (width, height), (left, upper, right, lower))
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        places = [
            (y - upper) / (lower - upper) * cells.shape[0] - 0.5,
            (x - left) / (right - left) * cells.shape[1] - 0.5,
        ]
        expected = ndimage.map_coordinates(cells, places, order=1, mode="nearest")
        expected[(x < left) | (x > right) | (y < upper) | (y > lower)] = 0
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pointing() -> None:
    view = (10.0, 0.0, 30.0, 20.0)
    heat = np.array([[0.0, 1.0], [0.5, 0.2]])
    points = strongest_points(heat, view)
    np.testing.assert_array_equal(points, [[25, 5]])
    assert points_at(points, (25, 5, 30, 20))  # on the corner
    assert not points_at(points, (25.1, 5, 30, 20))
    assert points_at(points, (28, 9, 30, 20), tolerance=5)
    assert not points_at(points, (28, 9, 30, 20), tolerance=4.99)
    tie = strongest_points(np.array([[1.0, 1.0]]), view)
    assert len(tie) == 2
    assert not points_at(tie, (10, 0, 20, 20))
    assert points_at(tie, (10, 0, 30, 20))
    empty = strongest_points(np.zeros((2, 2)), view)
    assert not points_at(empty, (0, 0, 100, 100))
    assert points_at(strongest_points(np.ones((1, 1)), view), (20, 10, 20, 10))


def flooded(heat: np.ndarray, threshold: float) -> list[tuple[int, int, int, int]]:
    """`box_around`, by flooding."""
    if heat.max() <= 0:
        return []
    hot, seen, parts = heat >= threshold * heat.max(), set(), []
    for start in zip(*np.nonzero(hot), strict=True):
        if start in seen:
            continue
        queue, part = deque([start]), []
        seen.add(start)
        while queue:
            y, x = queue.popleft()
            part.append((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= near[0] < heat.shape[0] and 0 <= near[1] < heat.shape[1]
                if inside and near not in seen and hot[near]:
                    seen.add(near)
                    queue.append(near)
        parts.append(part)
    most = max(map(len, parts))
    return [
        (min(x for _, x in p), min(y for y, _ in p), max(x for _, x in p) + 1,
         max(y for y, _ in p) + 1)
        for p in parts if len(p) == most
    ]  # fmt: skip


def test_boxes_around_heat_and_among_candidates_equal_loops() -> None:
    for number in range(60):
        heat = RNG.integers(0, 4, RNG.integers(1, 8, 2)).astype(np.float32)
        if number % 10 == 0:
            heat[:] = 0
        threshold = (0.15, 0.5, 1.0)[number % 3]
        assert sorted(box_around(heat, threshold)) == sorted(flooded(heat, threshold))
        height, width = heat.shape
        corners = np.sort(RNG.integers(-2, 9, (5, 2, 2)), axis=1)
        boxes = [(*map(float, (*low, *high)),) for low, high in corners if (low < high).all()]
        scores = []
        for left, upper, right, lower in boxes:
            total = sum(
                float(heat[y, x])
                for y in range(height)
                for x in range(width)
                if left <= x < right and upper <= y < lower
            )
            scores.append(total / ((right - left) * (lower - upper)) ** 0.5)
        best = max(scores, default=0)
        expected = [b for b, s in zip(boxes, scores, strict=True) if best and np.isclose(s, best)]
        assert hottest(heat, boxes, 0.5) == expected


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 7.5, 100.0])
@pytest.mark.parametrize("box", [(5.25, 4.5, 20.0, 15.0), (-3.0, 2.0, 4.0, 40.0), (31.0, 0, 60, 9)])
def test_the_chance_to_point_near_a_box_is_that_of_random_points(
    box: tuple[float, float, float, float], tolerance: float
) -> None:
    points = np.random.default_rng(0).uniform(0, (30, 20), (20_000, 2))
    hits = [points_at(point[None], box, tolerance) for point in points]
    assert share_near(box, (30, 20), tolerance) == pytest.approx(np.mean(hits), abs=0.01)


def test_overlap_equals_counted_pixels() -> None:
    for _ in range(50):
        (a, b, c, d), (e, f, g, h) = RNG.integers(0, 8, (2, 4)).tolist()
        one, other = (a, b, a + c, b + d), (e, f, e + g, f + h)
        pixels = [
            {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
            for box in (one, other)
        ]
        union = pixels[0] | pixels[1]
        expected = len(pixels[0] & pixels[1]) / len(union) if union else 0.0
        assert overlap(one, other) == pytest.approx(expected)


class RedFns:
    """The heat of a place is how red it is: 2 by 2 cells."""

    def heat_maps(self, images: Any, tokens: Any, mask: Any) -> np.ndarray:
        assert len(images) == 3  # batches are padded
        red = np.asarray(images, np.float32)[..., 0]
        size = red.shape[1] // 2
        return red.reshape(len(red), 2, size, 2, size).mean((2, 4))


def task_data(folder: Path, bad: BadExamples, **fields: Any) -> TaskData:
    config = DataConfig(source=str(folder), image_size=16, **fields)

    def texts(captions: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(captions), 4), np.int32), np.ones((len(captions), 4), bool)

    sources = build_sources(config, bad)
    return TaskData(sources, TowerInputs(Pixels(config), texts), 3, bad)


def test_from_files_to_numbers(tmp_path: Path) -> None:
    folder = refcoco_files.write(tmp_path)
    data = task_data(folder, BadExamples())
    outcome = build_grounding(data, GroundingOptions(split="test")).outcome(RedFns())  # type: ignore[arg-type]
    metrics = outcome.metrics
    # The view is the centre square, columns 10 to 30 of 40; its cells' centres are at 15 and 25.
    # testA is red on the left, testB on the right: of each the two phrases of the left box, and
    # the one of the right box.
    assert metrics["phrases"] == 6
    assert metrics["images"] == 2
    assert metrics["pointing_game"] == pytest.approx(3 / 6)
    assert metrics["pointing_game_centre"] == 0
    chance = (2 * 14.5 * 12 + 14 * 12) / 3 / 800
    assert metrics["pointing_game_chance"] == pytest.approx(chance)
    rows = {row["part"]: row for row in outcome.tables["per_part"]}
    assert rows["testA"]["pointing_game"] == pytest.approx(2 / 3)
    assert rows["testB"]["pointing_game"] == pytest.approx(1 / 3)
    assert metrics["pointing_game_low"] <= 0.5 <= metrics["pointing_game_high"]
    assert metrics["candidate_chance"] == pytest.approx(1 / 3)
    assert metrics["seen"] == pytest.approx((2 * 6.5 / 14.5 + 6 / 14) / 3)
    part = build_grounding(data, GroundingOptions(split="test", part="testB"))
    assert part.outcome(RedFns()).metrics["pointing_game"] == pytest.approx(1 / 3)  # type: ignore[arg-type]
    one = build_grounding(data, GroundingOptions(split="test", part="testB", max_references=1))
    assert one.outcome(RedFns()).metrics["phrases"] == 2  # type: ignore[arg-type]
    with pytest.raises(DataError, match="part 'testC', has a box"):
        build_grounding(data, GroundingOptions(split="test", part="testC"))


def test_pictures_of_another_size_and_broken_ones(tmp_path: Path) -> None:
    folder = refcoco_files.write(tmp_path)
    images = tmp_path / "images/mscoco/images/train2014"
    before = build_grounding(task_data(folder, BadExamples()), GroundingOptions(split="test"))
    expected = before.outcome(RedFns()).metrics  # type: ignore[arg-type]
    for name in sorted(images.iterdir())[2:]:
        picture = Image.open(name)
        picture.resize((80, 40), Image.Resampling.NEAREST).save(name, quality=95)
    bad = BadExamples()
    data = task_data(folder, bad)
    larger = build_grounding(data, GroundingOptions(split="test")).outcome(RedFns())  # type: ignore[arg-type]
    for key in ("pointing_game", "pointing_game_chance", "seen", "candidate_accuracy"):
        assert larger.metrics[key] == pytest.approx(expected[key], abs=1e-6)
    sorted(images.iterdir())[2].write_bytes(b"nonsense")
    Image.new("RGB", (20, 20)).save(sorted(images.iterdir())[3])
    with pytest.raises(DataError, match="none of the pictures"):
        build_grounding(data, GroundingOptions(split="test")).outcome(RedFns())  # type: ignore[arg-type]
    reasons = list(bad.reasons.values())
    assert len(reasons) == 4
    assert any("cannot be decoded" in r for r in reasons)
    assert any("another shape" in r for r in reasons)


class Attributed:
    """Examples with attributes that come from anybody."""

    def __init__(self, attributes: list[dict[str, str]]) -> None:
        self.attributes = attributes

    def __len__(self) -> int:
        return len(self.attributes)

    def __getitem__(self, index: int) -> Example:
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
        return replace(self.metadata(index), image=buffer.getvalue())

    def metadata(self, index: int) -> Example:
        return Example(str(index), str(index), ("one", "two"), b"", self.attributes[index])


def test_attributes_of_strangers() -> None:
    good = {"box": "[0, 0, 30, 20]"}
    wrong = [
        {"box": box}
        for box in ("", "null", "[" * 100_000, "[1, 2, 3]", "[NaN, 0, 1, 1]", "[5, 5, 1, 1]",
                    "[1e400, 0, 1, 1]", '["a", 0, 1, 1]', "{}")
    ]  # fmt: skip
    wrong += [good | {"candidates": "3"}, good | {"candidates": "[[1]]"}]
    wrong += [good | {"size": size} for size in ("[0, 5]", "[5]", '"ab"', "[NaN, 1]")]
    config, bad = DataConfig(image_size=16), BadExamples()
    source = Attributed([{}, good, *wrong])

    def texts(captions: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(captions), 4), np.int32), np.ones((len(captions), 4), bool)

    data = TaskData({"validation": source}, TowerInputs(Pixels(config), texts), 3, bad)
    metrics = build_grounding(data, GroundingOptions(split="validation")).outcome(RedFns()).metrics  # type: ignore[arg-type]
    assert len(bad.reasons) == len(wrong)
    assert metrics["phrases"] == 2
    assert metrics["pointing_game"] == metrics["pointing_game_chance"] == 1
    assert "candidate_accuracy" not in metrics  # there are none


def test_detections(tmp_path: Path) -> None:
    folder = refcoco_files.write(tmp_path)
    path = tmp_path / "detections.json"
    # Of testA the two true boxes, of testB none: that is a miss.
    path.write_text(json.dumps({"2": [[2, 3, 14.5, 12, 0.9], [24, 3, 14, 12, 0.8]]}))
    options = GroundingOptions(split="test", detections=str(path))
    metrics = build_grounding(task_data(folder, BadExamples()), options).outcome(RedFns()).metrics  # type: ignore[arg-type]
    assert metrics["candidate_accuracy"] == pytest.approx(2 / 6)
    assert metrics["candidate_chance"] == pytest.approx(3 / 2 / 6)
    for content in ('{"02": [[1, 2, 3, 4]]}', "{}"):
        path.write_text(content)
        with pytest.raises(
            DataError, match="no id is that of .*in the file: (02|none); of .*: 2, 3"
        ):
            build_grounding(task_data(folder, BadExamples()), options)
    for content in (
        "[]",
        '{"1": 2}',
        '{"1": [[1, 2, 3]]}',
        '{"1": [["a", 1, 2, 3]]}',
        '{"1": [[9, 9, -3, -3]]}',
        "no",
    ):
        path.write_text(content)
        with pytest.raises(DataError):
            build_grounding(task_data(folder, BadExamples()), options)


def test_what_grounding_cannot_use(tmp_path: Path) -> None:
    data = task_data(refcoco_files.write(tmp_path), BadExamples())
    features = TowerInputs(image=object(), text=data.inputs.text)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not features"):
        Grounding(replace(data, inputs=features), GroundingOptions())


def test_a_trained_model_and_its_page(finished_run: Path, tmp_path: Path) -> None:
    references = refcoco_files.references()
    for reference in references:
        reference["sentences"][0]["sent"] = "<script>alert(1)</script>"
    folder = refcoco_files.write(tmp_path, refcoco_files.python2_pickle(references))
    model = load(finished_run, batch_size=8)
    sources = build_sources(DataConfig(source=str(folder)), BadExamples())
    data = TaskData(sources, TowerInputs(model.pixels, model.tokenizer), 8, BadExamples())
    task = build_grounding(data, GroundingOptions(split="test"))
    outcome = task.outcome(model.fns)
    assert all(np.isfinite(value) for value in outcome.metrics.values())
    html = page(task, model.fns, outcome, count=3)
    assert html.count("data:image/jpeg") == 3
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "http" not in html.replace("http-equiv", "")
    assert "pointing game" in html


def test_composites_show_what_their_references_say() -> None:
    emoji = build_sources(DataConfig(), BadExamples())["test"]
    for count in (2, 4):
        composed = composites(emoji, count, pictures=2)
        assert len(composed) == 2 * count
        for first in range(0, len(composed), count):
            several = composed.examples[first : first + count]
            assert len({example.image for example in several}) == 1
            assert len({example.captions for example in several}) == count
            picture = np.asarray(decode(several[0].image))
            for example in several:
                left, upper, right, lower = json.loads(example.attributes["box"])
                part = picture[upper:lower, left:right]
                assert part.min() < 128  # something is drawn in every box
