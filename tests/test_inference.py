"""A trained model in use: `load`, encoding, scoring, searching a folder."""

from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image

import clip_lite_jax
from clip_lite_jax.apps.search import search
from clip_lite_jax.errors import BadImage, CheckpointError, DataError
from clip_lite_jax.inference import DualEncoderModel


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return clip_lite_jax.load(finished_run)


def test_encoders_give_unit_float32_rows(model: DualEncoderModel) -> None:
    images = model.encode_image([draw("circle", "red"), draw("bar", "blue", size=57)])
    texts = model.encode_text(["a red circle", "", "blau " * 500])
    for rows, count in ((images, 2), (texts, 3)):
        assert rows.dtype == np.float32
        assert rows.shape == (count, 16)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_paths_pictures_and_arrays_are_the_same(model: DualEncoderModel, tmp_path: Path) -> None:
    picture = draw("cross", "green")
    picture.save(tmp_path / "cross.png")
    forms = [[tmp_path / "cross.png"], [str(tmp_path / "cross.png")], np.asarray(picture)[None]]
    expected = model.encode_image([picture])
    for images in forms:
        np.testing.assert_array_equal(model.encode_image(images), expected)


def test_batches_do_not_change_results(finished_run: Path, model: DualEncoderModel) -> None:
    images = [draw("circle", colour) for colour in ("red", "green", "blue", "pink", "black")]
    small = clip_lite_jax.load(finished_run, batch_size=2)
    np.testing.assert_allclose(small.encode_image(images), model.encode_image(images), atol=1e-6)


def test_score_is_the_critic(model: DualEncoderModel) -> None:
    images, texts = [draw("circle", "red"), draw("bar", "blue")], ["a red circle", "bar in blue"]
    scores = model.score(images, texts)
    assert scores.dtype == np.float32
    matrix = model.fns.matrix(model.encode_image(images), model.encode_text(texts))
    np.testing.assert_allclose(scores, np.diagonal(matrix), atol=1e-5)
    with pytest.raises(ValueError, match="2 images, 1 texts"):
        model.score(images, texts[:1])


def test_nothing_gives_no_rows(model: DualEncoderModel) -> None:
    assert model.encode_image([]).shape == (0, 16)
    assert model.encode_text([]).shape == (0, 16)
    assert model.score([], []).shape == (0,)


def test_what_cannot_be_encoded_is_named(model: DualEncoderModel, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(BadImage, match=r"notes.png: cannot be decoded"):
        model.encode_image([tmp_path / "notes.png"])
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], not float32"):
        model.encode_image(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        clip_lite_jax.load(tmp_path)


def test_transparent_pictures_are_put_on_white(model: DualEncoderModel) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    white = Image.new("RGB", (32, 32), "white")
    np.testing.assert_array_equal(model.encode_image([clear]), model.encode_image([white]))


def test_search_ranks_and_lists_what_it_skipped(model: DualEncoderModel, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.JPG", "deep/c.webp"):
        draw("circle", "red").save(tmp_path / name, quality=90)
    (tmp_path / "readme.txt").write_text("no picture")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    hits = search(model, tmp_path, "a red circle", count=2)
    assert len(hits.files) == 2
    assert hits.files[0][1] >= hits.files[1][1]
    assert [path.name for path, _ in hits.unreadable] == ["torn.jpg"]


def test_search_stays_in_its_folder(model: DualEncoderModel, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.png"
    inside.mkdir()
    draw("circle", "red").save(outside)
    (inside / "link.png").symlink_to(outside)
    with pytest.raises(DataError, match="no usable row .the path leaves"):
        search(model, inside, "a red circle", count=1)
    with pytest.raises(DataError, match="no such folder"):
        search(model, tmp_path / "nowhere", "a red circle", count=1)
