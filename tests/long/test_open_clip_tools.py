"""Our models in the tools of open_clip's users, and their metrics beside ours.

Here and not among the quick tests because both need PyTorch (``make .venv-peers/installed``) and
LAION's clip_benchmark.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw

from clip_lite_jax.apps.open_clip_model import add_to_clip_benchmark, open_clip_model
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.ranking import dense_counts
from clip_lite_jax.evaluators.retrieval import metrics_of
from clip_lite_jax.inference import DualEncoderModel, load

ROOT = Path(__file__).parents[2]
PEERS = (
    ROOT / ".venv-peers/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
)


@pytest.fixture(scope="module")
def torch() -> Any:
    # At the end: what both environments have comes from ours.
    sys.path += [str(PEERS), str(ROOT / ".work/clip_benchmark")]
    from benchmarks import torch_operators

    return torch_operators.torch


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return load(finished_run, batch_size=16)


def test_embeddings_and_scores_are_the_models(torch: Any, model: DualEncoderModel) -> None:
    module, preprocess, tokenizer = open_clip_model(model)
    images = [draw("circle", "red"), draw("square", "blue", 50)]
    texts = ["a red circle", "square"]
    pixels = torch.stack([preprocess(image) for image in images])
    found = module(pixels, tokenizer(texts))
    np.testing.assert_allclose(found["image_features"], model.encode_image(images), atol=1e-6)
    np.testing.assert_allclose(found["text_features"], model.encode_text(texts), atol=1e-6)
    cosine = (found["image_features"] * found["text_features"]).sum(-1)
    scores = found["logit_scale"] * cosine + found["logit_bias"]
    np.testing.assert_allclose(scores, model.score(images, texts), atol=1e-5)


def test_clip_benchmark_measures_it(torch: Any, model: DualEncoderModel) -> None:
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from clip_benchmark.models import load_clip

    add_to_clip_benchmark()
    module, preprocess, tokenizer = load_clip(
        "clip_lite_jax",
        "clip_lite",
        model,
        None,
        "cpu",  # type: ignore[arg-type]
    )
    drawn = [(c, s) for c in COLOURS for s in SHAPES]
    pictures = [draw(shape, colour) for colour, shape in drawn]
    texts = [[f"a {c} {s}", f"{s} in {c}"] for c, s in drawn]
    pixels = torch.stack([preprocess(p) for p in pictures])
    loader = [(pixels[:20], texts[:20]), (pixels[20:], texts[20:])]
    theirs = zeroshot_retrieval.evaluate(
        module, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    scores = np.asarray(
        model.fns.matrix(
            model.project_image(pictures), model.project_text([t for of in texts for t in of])
        )
    )
    owner = np.repeat(np.arange(len(pictures)), 2)
    ours = metrics_of(dense_counts(scores, owner), owner)
    for k in (1, 5, 10):
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(ours[f"text_to_image_r{k}"])
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(ours[f"image_to_text_r{k}"])
    weights = zeroshot_classification.zero_shot_classifier(
        module, tokenizer, list(SHAPES), ["a {c}", "{c} in red"], "cpu", amp=False
    )
    assert weights.shape[1] == len(SHAPES)


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_recall_is_clip_benchmarks(torch: Any, seed: int) -> None:
    """Random scores of five captions an image, without ties: theirs break them by place."""
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(40), 5)
    scores = rng.normal(size=(40, 200))
    scores[owner, np.arange(200)] += 1
    ours = metrics_of(dense_counts(scores, owner), owner)
    right = torch.zeros(200, 40, dtype=bool)
    right[torch.arange(200), torch.from_numpy(owner)] = True
    of_texts = torch.from_numpy(scores.T.copy())
    for k in (1, 5, 10):
        theirs = (recall_at_k(of_texts, right, k) > 0).float().mean().item()
        assert ours[f"text_to_image_r{k}"] == pytest.approx(theirs)
        theirs = (recall_at_k(of_texts.T, right.T, k) > 0).float().mean().item()
        assert ours[f"image_to_text_r{k}"] == pytest.approx(theirs)


def test_other_critics_are_refused(model: DualEncoderModel) -> None:
    from dataclasses import replace

    critic = replace(model.config.model.critic, name="concat", options={})
    config = replace(model.config, model=replace(model.config.model, critic=critic))
    other = DualEncoderModel(config, model.model, model.params, model.model_state, model.tokenizer)
    with pytest.raises(ConfigError, match="'concat' is no cosine"):
        open_clip_model(other)
