"""The published recipes: every variant builds at full size, and a small main run trains.

Also what they brought along: a share of the training images, and a change of hue.
"""

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import draw, tiny_config

from clip_lite_jax.apps.report_commands import commands
from clip_lite_jax.config import Config, DataConfig, OptimConfig, load_config
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import Source, build_sources
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.learner import build_learner
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.models import build_model
from clip_lite_jax.negatives import Pairs, build_sampler
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train import train

ROOT = Path(__file__).parent.parent

# --- The variants ---------------------------------------------------------------------------------

IMAGE_PARAMETERS = {  # torchvision's, without the classifier
    "resnet18": 11_176_512,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
    "resnet152": 58_143_808,
}
BERT_LAYER = 7_087_872
TEXT_PARAMETERS = {  # of 12 layers: transformers' BertModel, and MPNetModel without its pooler
    "bert": 109_482_240,
    "mpnet": 108_894_336,
}
VOCABULARY = {"bert": 30_522, "mpnet": 30_527}


def paper(variant: str) -> Config:
    return load_config(f"configs/paper.py:{variant}")


def variants() -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        paper("?")
    return re.findall(r"\w+", str(refusal.value).partition("choose one of ")[2])


def test_an_unknown_variant_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"configs/paper.py:bert_3: choose one of main, batch_64"):
        paper("bert_3")
    assert load_config("configs/paper.py") == paper("main")


def test_a_report_prints_the_variant() -> None:
    command = commands(paper("resnet18"), Path("runs/r"))["train"].replace("\\\n", "")
    assert command.split() == (
        ["clip-lite", "train", "--config", "configs/paper.py:resnet18", "--workdir", "runs/r"]
    )


def test_every_variant_is_in_the_table_of_the_docs() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    first, last = text.index("## Variants"), text.index("### What is uncertain")
    missing = [v for v in variants() if f"`{v}`" not in text[first:last]]
    assert missing == ["batch_128", "batch_256"]  # of `batch_64` … `batch_512`


@pytest.mark.parametrize("variant", variants())
def test_every_variant_builds_at_full_size(variant: str) -> None:
    """Shapes only: model, optimizer and loss, with the parameters that they should have."""
    config = paper(variant)
    text = config.model.text
    vocabulary = VOCABULARY[text.name]
    model = build_model(config.model, 224, vocabulary, 30, config.objective)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    missing = 12 - int(str(text.options["layers"]))
    assert size(params["image_encoder"]) == IMAGE_PARAMETERS[config.model.image.name]
    assert size(params["text_encoder"]) == TEXT_PARAMETERS[text.name] - missing * BERT_LAYER
    optimizer = build_optimizer(config.optim, config.steps, params)
    state = jax.eval_shape(optimizer.init, params)
    # Momentum and Lookahead's copy of all but a frozen bias or three, and counters.
    assert abs(size(state) - 2 * size(params)) < 9
    mesh = build_mesh(jax.devices()[:1])
    build_learner(model, config.objective, config.negatives, config.batch_size, mesh, config.seed)


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- What the settings do -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["main", "batch_64"])
def test_the_negative_is_the_next_caption_of_the_same_gpu(variant: str) -> None:
    config = paper(variant)
    batch, gpus = config.batch_size, 8
    rows = np.arange(batch, dtype=np.int32)

    class TextRow:
        def pairs(self, image: Any, text: Any) -> Any:
            return text[..., 0]

        def matrix(self, image: Any, text: Any) -> Any:
            raise NotImplementedError

    column = rows[:, None].astype(np.float32)
    pairs = Pairs(column, column, rows[:, None], np.ones(batch, bool), row=rows)
    sampler = build_sampler(config.negatives, batch, build_mesh(jax.devices()[:8]))
    drawn = jax.jit(lambda: sampler(jax.random.key(0), jnp.zeros((), int), pairs, TextRow()))()
    shifted = np.roll(rows.reshape(gpus, -1), -1, axis=1).ravel()
    np.testing.assert_array_equal(drawn.scores.negative[0, :, 0], shifted)
    assert drawn.scores.negative.shape == (1, batch, 1)


def test_the_optimizer_steps_as_published() -> None:
    """Against the published update, written out: clip, decay, momentum, rates, Lookahead."""
    config = replace(paper("main").optim, warmup_steps=4)
    rng = np.random.default_rng(0)
    shapes = {"image_encoder": (3, 4), "text_encoder": (5,), "critic": (2, 2)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params = {name: {"kernel": value} for name, value in start.items()}
    params["critic"]["score_bias"] = np.float32(0)
    optimizer = build_optimizer(config, 12, params)
    state, now, update = optimizer.init(params), params, jax.jit(optimizer.update)

    fast = {name: value.astype(np.float64) for name, value in start.items()}
    slow = dict(fast)
    momentum = {name: np.zeros_like(value) for name, value in fast.items()}
    rates = {"image_encoder": 0.2, "text_encoder": 0.001, "critic": 0.001}
    for step in range(12):
        gradient = {n: 10 * rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        tree = {name: {"kernel": jnp.array(value)} for name, value in gradient.items()}
        tree["critic"]["score_bias"] = jnp.array(1e6)
        updates, state = update(tree, state, now)
        now = optax.apply_updates(now, updates)

        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradient.values()))
        warm = 0.25 + 0.75 * step / 4  # the published one begins at 0
        scale = warm if step < 4 else np.cos((step - 4) / 8 * np.pi / 2) ** 2
        for name, g in gradient.items():
            decayed = g * min(1, 10 / norm) + 1e-4 * fast[name]
            momentum[name] = 0.9 * momentum[name] + decayed
            fast[name] = fast[name] - rates[name] * scale * momentum[name]
            if step % 5 == 4:
                slow[name] = fast[name] = 0.5 * fast[name] + 0.5 * slow[name]
        for name, value in fast.items():
            np.testing.assert_allclose(now[name]["kernel"], value, rtol=1e-5, atol=1e-6)
    assert now["critic"]["score_bias"] == 0


def test_everything_decays_as_published() -> None:
    assert re.search(paper("main").optim.no_decay, "text_encoder/LayerNorm_0/bias") is None
    assert re.search(OptimConfig().no_decay, "text_encoder/LayerNorm_0/bias")


# --- A small main run -----------------------------------------------------------------------------


@pytest.mark.usefixtures("two_devices")
def test_a_small_main_run_trains(pairs: Path, tmp_path: Path) -> None:
    config = shrunk(paper("main"), pairs)
    run = train(config, tmp_path)
    steps = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        expected = 0.9 * line["bound_loss"] + 0.1 * line["prior_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert run.model.module.dtype == jnp.bfloat16


def shrunk(config: Config, table: Path) -> Config:
    """Two steps of a recipe with small images and narrow networks."""
    model, tiny = config.model, tiny_config(table)
    image = {"layers": [1, 1], "width": 8, "batch_groups": 2}
    text = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
    critic = {"width": 16, "hidden": 16}
    return replace(
        config,
        steps=2,
        batch_size=8,
        data=replace(
            config.data,
            source=str(table),
            splits={},
            image_size=32,
            tokenizer=None,
            vocab_size=60,
            threads=0,
        ),
        model=replace(
            model,
            image=replace(model.image, options={**model.image.options, **image}),
            text=replace(model.text, options={**model.text.options, **text}),
            critic=replace(model.critic, options={**model.critic.options, **critic}),
        ),
        negatives=replace(config.negatives, block=4),
        optim=replace(config.optim, warmup_steps=1),
        eval=replace(tiny.eval, every=2, retrieval=()),
        log=replace(tiny.log, every=1),
    )


# --- COCO -----------------------------------------------------------------------------------------

COCO = {
    "train2017": [
        (9, "000000000009.jpg", ["A red ring,\n on white. ", 'The "big" ring.']),
        (25, "000000000025.jpg", ["A blue ring.", "A ring."]),
    ],
    "val2017": [(139, "000000000139.jpg", ["A green ring."])],
}


def test_coco_is_read_as_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "annotations").mkdir()
    for folder, images in COCO.items():
        (tmp_path / folder).mkdir()
        for _, name, _ in images:
            draw("ring", "red").save(tmp_path / folder / name)
        captions = [(id, text) for id, _, texts in images for text in texts]
        (tmp_path / "annotations" / f"captions_{folder}.json").write_text(
            json.dumps(coco_captions([(id, name) for id, name, _ in images], captions))
        )
    monkeypatch.chdir(tmp_path)
    splits = build_sources(paper("main").data, BadExamples())
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation": 1}
    first = splits["train"].metadata(0)
    assert first.id == "000000000009.jpg"
    assert first.captions == ("A red ring, on white.", 'The "big" ring.')
    assert splits["validation"].metadata(0).captions == ("A green ring.",)


def coco_captions(images: list[tuple[int, str]], captions: list[tuple[int, str]]) -> dict[str, Any]:
    """The layout of ``captions_train2017.json``, field by field."""
    return {
        "info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017},
        "licenses": [{"url": "http://example.org", "id": 1, "name": "A licence"}],
        "images": [
            {"license": 1, "file_name": name, "height": 32, "width": 32, "id": id}
            for id, name in images
        ],
        "annotations": [
            {"image_id": image, "id": number, "caption": caption}
            for number, (image, caption) in enumerate(captions)
        ],
    }


# --- A share of the training images ---------------------------------------------------------------


def table_of(folder: Path, rows: int, per_group: int = 1) -> Path:
    """A table of `rows` names of one picture each."""
    picture = folder / "picture.png"
    draw("ring", "red").save(picture)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "group"])
        for row in range(rows):
            name = folder / f"{row}.png"
            if not name.exists():
                os.link(picture, name)
            writer.writerow([name.name, "a ring", f"group {row // per_group}"])
    return folder / "table.csv"


def ids(source: Source) -> list[str]:
    return [source.metadata(index).id for index in range(len(source))]


def test_shares_are_nested_stable_and_of_their_size(tmp_path: Path) -> None:
    def chosen(rows: int, share: float) -> tuple[list[str], int]:
        config = DataConfig(source=str(table_of(tmp_path, rows)), train_share=share)
        splits = build_sources(config, BadExamples())
        return ids(splits["train"]), sum(len(s) for n, s in splits.items() if n != "train")

    whole, held_out = chosen(1000, 1.0)
    larger, smaller = whole, whole
    for share in (0.75, 0.5, 0.25, 0.1):
        smaller, others = chosen(1000, share)
        assert others == held_out
        assert len(smaller) == pytest.approx(share * len(whole), abs=3 * np.sqrt(len(whole)) / 2)
        assert smaller == [id for id in larger if id in set(smaller)]  # a part, in the same order
        larger = smaller
    assert chosen(1000, 0.1)[0] == smaller
    assert chosen(1200, 0.1)[0][: len(smaller)] == smaller  # more rows, the same ones of the old


def test_a_share_takes_whole_groups_and_reads_their_images(tmp_path: Path) -> None:
    table = table_of(tmp_path, 60, per_group=3)
    config = DataConfig(source=str(table), group_column="group", held_out=0, train_share=0.5)
    source = build_sources(config, BadExamples())["train"]
    groups = [source.metadata(index).group for index in range(len(source))]
    assert 0 < len(groups) < 60
    assert all(groups.count(group) == 3 for group in groups)
    assert source[0].image == (tmp_path / "picture.png").read_bytes()


def test_shares_that_cannot_be_taken_are_refused(pairs: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.train_share=0: .*greater than 0"):
        load_config("configs/my_pairs.py", {"data.train_share": "0"})
    with pytest.raises(DataError, match="data.train_share=1e-06 of .* training examples is none"):
        build_sources(DataConfig(source=str(pairs), train_share=1e-6), BadExamples())
    with pytest.raises(DataError, match="data.train_share=0.5: .* data.shapes.examples"):
        build_sources(DataConfig(source="shapes", train_share=0.5), BadExamples())
