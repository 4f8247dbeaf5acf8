"""Colour jitter against Pillow, which the published code and torchvision take their rules from."""

from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from conftest import tiny_config
from jax import lax
from PIL import Image, ImageEnhance

from clip_lite_jax.batch import Batch
from clip_lite_jax.color_jitter import UNCHANGED, color_jitter, draw_changes, turn_hue
from clip_lite_jax.config import AugmentConfig
from clip_lite_jax.data.pipeline import TrainTransform, train_batches
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.run import build_run
from clip_lite_jax.train import train
from clip_lite_jax.train_step import _jittered

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
PUBLISHED = AugmentConfig(jitter=1, hue=0.1)


def pictures(count: int, size: int = 24) -> np.ndarray:
    """Noise, with black, white and grey corners."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    images[:, :4, :4], images[:, :4, -4:], images[:, -4:, :4] = 0, 255, 128
    return images


def draws(config: AugmentConfig, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    drawn = [draw_changes(config, rng) for _ in range(count)]
    return np.stack([x for x in drawn if x is not None])


def by_pillow(image: np.ndarray, changes: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    for number in range(4):
        if len(changes) == 4 and number == changes[3, 0]:
            turn = round(float(changes[3, 1]) * 255)
            hue, saturation, value = picture.convert("HSV").split()
            hue = hue.point([(h + turn) % 255 for h in range(256)])
            picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        if number < 3:
            kind, factor = changes[number].tolist()
            picture = ENHANCERS[int(kind)](picture).enhance(factor)
    return np.asarray(picture)


def test_without_hue_it_is_pillow_to_the_last_bit() -> None:
    images, changes = pictures(40), draws(replace(PUBLISHED, hue=0), 40)
    assert changes.shape == (40, 3, 2)
    out = jax.jit(color_jitter)(images, changes)
    chex.assert_shape(out, images.shape)
    assert out.dtype == np.uint8
    expected = [by_pillow(*given) for given in zip(images, changes, strict=True)]
    np.testing.assert_array_equal(out, np.stack(expected))


def test_with_hue_it_is_pillow_up_to_its_steps_of_hue() -> None:
    images, changes = pictures(40), draws(PUBLISHED, 40)
    assert set(changes[:, 3, 0]) == {0, 1, 2, 3}
    out = np.asarray(color_jitter(images, changes), int)
    expected = np.stack([by_pillow(*given) for given in zip(images, changes, strict=True)])
    # Pillow rounds hue and saturation to bytes: up to half a step of 6 / 255 of the chroma.
    assert np.abs(out - expected).max() <= 12
    assert np.abs(out - expected).mean() < 1


def test_images_of_any_leading_shape() -> None:
    images, changes = pictures(6), draws(PUBLISHED, 6)
    one = color_jitter(images, changes)
    parts = color_jitter(images.reshape(2, 3, 24, 24, 3), changes.reshape(2, 3, 4, 2))
    np.testing.assert_array_equal(np.reshape(parts, images.shape), one)
    np.testing.assert_array_equal(color_jitter(images[2], changes[2]), one[2])


def test_an_image_can_stay_as_it_is() -> None:
    images = pictures(3)
    for rows in (3, 4):
        changes = np.stack([UNCHANGED[:rows]] * 3)
        np.testing.assert_array_equal(color_jitter(images, changes), images)


def colour(name: str) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(Image.new("RGB", (1, 1), name))[..., c] for c in range(3))


@pytest.mark.parametrize(
    ("turn", "wanted"),
    [(0.0, "red"), (1 / 3, "lime"), (-1 / 3, "blue"), (1.0, "red"), (-2 / 3, "lime")],
)
def test_hue_turns_round_the_circle(turn: float, wanted: str) -> None:
    np.testing.assert_array_equal(turn_hue(colour("red"), turn), colour(wanted))  # type: ignore[arg-type]


def test_hue_leaves_grey_brightness_and_saturation() -> None:
    grey = colour("#787878")
    np.testing.assert_array_equal(turn_hue(grey, 0.3), grey)  # type: ignore[arg-type]
    brown = np.array([150, 90, 40])
    turned = np.ravel(turn_hue(tuple(brown[:, None].astype(np.uint8)), 0.3))  # type: ignore[arg-type]
    assert turned.max() == brown.max()
    assert turned.min() == brown.min()


def test_changes_are_drawn_within_their_limits() -> None:
    changes = draws(PUBLISHED, 400)
    factors, turns = changes[:, :3, 1], changes[:, 3, 1]
    assert 0.6 <= factors.min() < 0.63
    assert 1.37 < factors.max() <= 1.4
    assert -0.1 <= turns.min() < -0.09
    assert 0.09 < turns.max() <= 0.1
    orders = {tuple(rows) for rows in np.c_[changes[:, :3, 0], changes[:, 3, 0]]}
    assert len(orders) == 24  # all orders of four


def test_one_in_five_stays_as_it_is() -> None:
    changes = draws(replace(PUBLISHED, jitter=0.8), 1000)
    same = np.all(changes == UNCHANGED, axis=(1, 2))
    assert 0.15 < same.mean() < 0.25


def test_without_hue_nothing_is_drawn_for_it() -> None:
    """Runs of before it was there see the same numbers."""
    rng, same = np.random.default_rng(5), np.random.default_rng(5)
    draw_changes(replace(PUBLISHED, hue=0), rng)
    same.random()  # whether to jitter
    same.permutation(3)
    same.random(3)
    assert rng.bit_generator.state == same.bit_generator.state


@pytest.mark.parametrize(
    "config", [AugmentConfig(jitter=0), AugmentConfig(brightness=0, contrast=0, saturation=0)]
)
def test_nothing_to_change(config: AugmentConfig) -> None:
    assert draw_changes(config, np.random.default_rng(0)) is None


def first_batch(pairs: Path, workdir: Path) -> Batch:
    config = tiny_config(pairs)
    config = replace(config, data=replace(config.data, augment=PUBLISHED))
    run = build_run(config, workdir)
    state, _ = run.init_state({})
    inputs = run.inputs(state.params, state.model_state)
    transform = TrainTransform(run.sources["train"], inputs, config.data, run.bad, second=True)
    return next(train_batches(transform, config.batch_size, 0, 0))


def test_every_view_of_a_batch_changes_by_itself(pairs: Path, tmp_path: Path) -> None:
    batch = first_batch(pairs, tmp_path)
    chex.assert_shape(batch.changes, (len(batch.index), 2, 4, 2))
    assert not np.array_equal(batch.changes[:, 0], batch.changes[:, 1])
    seen = _jittered(batch)
    assert seen.changes is None
    assert seen.second is not None
    assert batch.second is not None
    first = color_jitter(batch.image, batch.changes[:, 0])
    second = color_jitter(batch.second.image, batch.changes[:, 1])
    np.testing.assert_array_equal(seen.image, first)
    np.testing.assert_array_equal(seen.second.image, second)
    assert not np.array_equal(seen.image, batch.image)


def test_training_sees_the_changes(pairs: Path, tmp_path: Path) -> None:
    """The loss of the first step is another one with jitter than without."""
    losses = []
    for number, jitter in enumerate((0.0, 1.0)):
        config = tiny_config(pairs)
        augment = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=jitter)
        data = replace(config.data, augment=replace(augment, hue=0.1), captions="first")
        config = replace(config, steps=2, data=data)
        train(config, tmp_path / str(number))
        rows = read_metrics(tmp_path / str(number))
        losses.append(next(row["loss"] for row in rows if "loss" in row))
    assert losses[0] != losses[1]


def test_parts_of_a_batch_change_as_the_whole(pairs: Path, tmp_path: Path) -> None:
    batch = first_batch(pairs, tmp_path)
    parts = jax.tree.map(lambda x: x.reshape(2, len(x) // 2, *x.shape[1:]), batch)
    seen, whole = jax.jit(lambda parts: lax.map(_jittered, parts))(parts), _jittered(batch)
    np.testing.assert_array_equal(seen.image.reshape(whole.image.shape), whole.image)
    assert seen.second is not None
    assert whole.second is not None
    second = seen.second.image.reshape(whole.second.image.shape)
    np.testing.assert_array_equal(second, whole.second.image)
