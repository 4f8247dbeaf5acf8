"""Drawn scenes with known information: the formula, the drawing, the draws and a whole run."""

import itertools
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config

from clip_lite_jax.apps.report import write_report
from clip_lite_jax.apps.report_tables import number, terminal_table
from clip_lite_jax.config import AugmentConfig, DataConfig, EvalConfig, ShapesConfig, load_config
from clip_lite_jax.data import image_ops, shapes
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.pipeline import TrainTransform
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.shapes import (
    FACTORS,
    OPENINGS,
    UNNAMED,
    Shapes,
    all_scenes,
    build_splits,
    draw,
)
from clip_lite_jax.data.sources import (
    IndependentPairs,
    Source,
    build_sources,
    captions_of,
    fingerprint,
)
from clip_lite_jax.data.tokenizer import Tokenizer, train_tokenizer
from clip_lite_jax.errors import DataError
from clip_lite_jax.evaluate import evaluate
from clip_lite_jax.evaluators.information import matched_and_shuffled, read_offs
from clip_lite_jax.train import train

SIZE = 32
AS_DRAWN = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0)
SMALL = ShapesConfig(examples=200, held_out=60)


def split_of(config: ShapesConfig, split: str = "test") -> Shapes:
    return build_splits(config, SIZE)[split]


# --- The information ------------------------------------------------------------------------------


def joint_table(config: ShapesConfig) -> dict[tuple[bytes, str], float]:
    """P(image, caption) by going through every way in which a pair can come about."""
    table: dict[tuple[bytes, str], float] = defaultdict(float)
    for scene in all_scenes():
        image = draw(scene, SIZE).tobytes()
        captions = [(1 / len(OPENINGS), opening) for opening in OPENINGS]
        prior = 1.0
        for factor, value in zip(FACTORS, scene, strict=True):
            prior *= factor.probabilities[value]
            said = ways_to_say(factor, value, config)
            captions = [
                (p * q, f"{text} {phrase}".strip())
                for (p, text), (q, phrase) in itertools.product(captions, said)
            ]
        for p, text in captions:
            table[image, text] += prior * p
    return table


def ways_to_say(factor: shapes.Factor, value: int, config: ShapesConfig) -> list[tuple[float, str]]:
    """(probability, phrase) for one factor of a scene."""
    named = config.named.get(factor.name, 0.0)
    ways = [(1 - named, factor.unnamed)] if named < 1 else []
    if named == 0:
        return ways
    wrong = config.error / (len(factor.phrases) - 1)
    for word, synonyms in enumerate(factor.phrases):
        right = 1 - config.error if word == value else wrong
        ways += [(named * right / len(synonyms), phrase) for phrase in synonyms if right > 0]
    return ways


def information(table: dict[tuple[bytes, str], float]) -> float:
    """The mutual information of a joint table by its definition, in nats."""
    images: dict[bytes, float] = defaultdict(float)
    captions: dict[str, float] = defaultdict(float)
    for (image, caption), p in table.items():
        images[image] += p
        captions[caption] += p
    assert sum(images.values()) == pytest.approx(1)
    return sum(p * math.log(p / (images[i] * captions[c])) for (i, c), p in table.items())


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ({"size": 0.3, "background": 1.0}, 0.1),
        ({"shape": 0.5, "size": 0.5}, 0.0),
        ({"position": 1.0}, 0.6),
        ({}, 0.1),
    ],
)
def test_information_equals_that_of_the_joint_table(named: dict[str, float], error: float) -> None:
    config = replace(SMALL, named=named, error=error)
    truth = information(joint_table(config))
    assert split_of(config).true_information == pytest.approx(truth, abs=1e-9)


def test_information_of_special_cases() -> None:
    colours = np.array(FACTORS[1].probabilities)
    entropy = -float(np.sum(colours * np.log(colours)))
    exact = replace(SMALL, named={"colour": 1.0}, error=0.0)
    assert split_of(exact).true_information == pytest.approx(entropy)
    blind = replace(SMALL, named={"position": 1.0}, error=0.8)  # any of five, evenly
    assert split_of(blind).true_information == pytest.approx(0, abs=1e-12)
    assert split_of(replace(SMALL, named={"colour": 1.0})).true_information < entropy


def test_the_published_configuration() -> None:
    data = load_config("configs/shapes.py").data
    source = build_sources(data, BadExamples())["test"]
    assert isinstance(source, Shapes)
    assert source.true_information == pytest.approx(3.5562, abs=1e-4)
    tokenizer = Tokenizer(train_tokenizer(captions_of(source), data.vocab_size), data.max_tokens)
    assert not tokenizer(list(captions_of(source)))[1].all(axis=1).any()  # no caption is cut


def test_monte_carlo_estimates_meet_the_truth() -> None:
    source = split_of(replace(SMALL, held_out=2000))
    pairs, truth = range(len(source)), source.true_information
    scores = source.log_ratio(pairs, pairs)
    positive, negative = matched_and_shuffled(scores)
    error = positive.std() / math.sqrt(len(positive))
    assert error < 0.05
    assert positive.mean() == pytest.approx(truth, abs=3 * error)
    others = np.where(np.eye(len(scores), dtype=bool), 0.0, np.exp(scores))
    ratios = others.sum(axis=1) / (len(scores) - 1)  # E_Q[dP/dQ] = 1
    assert ratios.mean() == pytest.approx(1, abs=3 * ratios.std() / math.sqrt(len(ratios)))
    offs = read_offs(positive, negative)
    assert offs["nwj_lower_bound"] == pytest.approx(truth, abs=0.3)
    assert 2 < offs["jsd_lower_bound"] < truth


# --- Images and captions --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 48])
def test_different_scenes_are_different_images_in_the_pipeline(size: int) -> None:
    """Encoded, decoded and resized, for training and for evaluation: the drawing, untouched."""
    seen = set()
    rng = np.random.default_rng(0)
    for scene in all_scenes():
        picture = image_ops.decode(shapes._png(scene, size))
        trained, _ = image_ops.augment(Opened.of(picture), size, AS_DRAWN, rng)
        seen.add(trained.tobytes())
        np.testing.assert_array_equal(trained, draw(scene, size))
        np.testing.assert_array_equal(trained, image_ops.resize_and_crop(picture, size))
    assert len(seen) == len(all_scenes()) == math.prod(len(f.phrases) for f in FACTORS)


def test_images_too_small_and_unknown_factors_are_refused() -> None:
    with pytest.raises(DataError, match=r"image_size=16 is too small .* 1,920 scenes make 1,760"):
        build_splits(SMALL, 16)
    with pytest.raises(DataError, match=r"named.color: the factors are size, colour, shape"):
        build_splits(replace(SMALL, named={"color": 1.0}), SIZE)


def test_no_two_values_share_a_phrase() -> None:
    phrases = [phrase for factor in FACTORS for words in factor.phrases for phrase in words]
    assert len(set(phrases)) == len(phrases)
    assert not any(f" {a} " in f" {b} " for a, b in itertools.permutations(phrases, 2))
    assert all("," not in phrase for phrase in phrases)
    for factor in FACTORS:
        assert sum(factor.probabilities) == pytest.approx(1)
        assert len(factor.phrases) == len(factor.probabilities)


def test_captions_say_what_is_named_and_tokens_keep_it() -> None:
    config = replace(SMALL, examples=3000, named={factor.name: 0.7 for factor in FACTORS})
    source = split_of(config, "train")
    tokenizer = Tokenizer(train_tokenizer(captions_of(source), 2000), 40)
    meanings: dict[bytes, set[shapes.Scene]] = defaultdict(set)
    for index in range(len(source)):
        drawn = source.drawn(index)
        for factor, word in zip(FACTORS, drawn.named, strict=True):
            said = [
                value
                for value, phrases in enumerate(factor.phrases)
                if any(f" {phrase} " in f" {drawn.caption} " for phrase in phrases)
            ]
            assert said == ([] if word == UNNAMED else [word])
        tokens, mask = tokenizer([drawn.caption])
        assert not mask.all()  # nothing was cut
        meanings[tokens.tobytes()].add(drawn.named)
    assert all(len(named) == 1 for named in meanings.values())


def test_draws_follow_the_stated_probabilities() -> None:
    source = split_of(replace(SMALL, examples=10_000), "train")
    draws = [source.drawn(index) for index in range(len(source))]
    for k, factor in enumerate(FACTORS):
        values = np.array([drawn.scene[k] for drawn in draws])
        words = [drawn.named[k] for drawn in draws]
        shares = np.bincount(values, minlength=len(factor.phrases)) / len(draws)
        np.testing.assert_allclose(shares, factor.probabilities, atol=0.02)
        named = np.array([word != UNNAMED for word in words])
        assert named.mean() == pytest.approx(SMALL.named.get(factor.name, 0), abs=0.02)
        wrong = [
            word != value for word, value in zip(words, values, strict=True) if word != UNNAMED
        ]
        assert not wrong or np.mean(wrong) == pytest.approx(SMALL.error, abs=0.02)


# --- The source -----------------------------------------------------------------------------------


def test_examples_are_functions_of_seed_split_and_index() -> None:
    splits, again = build_splits(SMALL, SIZE), build_splits(SMALL, SIZE)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 200,
        "validation": 60,
        "test": 60,
    }
    assert [splits["test"][i] for i in (7, 3)] == [again["test"][i] for i in (7, 3)]
    assert splits["test"].metadata(3) == replace(splits["test"][3], image=b"")
    assert split_of(replace(SMALL, held_out=10))[3] == splits["test"][3]
    sets: list[dict[str, Source]] = [dict(splits), dict(again)]
    assert fingerprint(sets[0]) == fingerprint(sets[1])
    assert splits["train"].drawn(5).caption == "this is a brown wedge"
    with pytest.raises(IndexError, match="test has 60 examples, none at 60"):
        splits["test"][60]


def test_splits_and_seeds_differ() -> None:
    other = build_splits(replace(SMALL, seed=1), SIZE)
    sets = [*build_splits(SMALL, SIZE).values(), *other.values()]
    scenes = [[split.drawn(i).scene for i in range(60)] for split in sets]
    assert all(a != b for a, b in itertools.combinations(scenes, 2))


class Unknown:
    """The same pairs, from a source that does not say that they are independent."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.source[index]

    def metadata(self, index: int) -> Example:
        return self.source.metadata(index)


def test_only_independent_pairs_keep_equal_captions_as_negatives() -> None:
    config = DataConfig(source="shapes", shapes=SMALL, image_size=SIZE, augment=AS_DRAWN)
    known = build_sources(config, BadExamples())["train"]
    tokenizer = Tokenizer(train_tokenizer(captions_of(known), 200), 40)
    different = len(set(captions_of(known)))
    assert different < len(known)
    for source, independent in ((known, True), (Unknown(known), False)):
        assert isinstance(source, IndependentPairs) == independent
        inputs = TowerInputs(Pixels(config), tokenizer)
        transform = TrainTransform(source, inputs, config, BadExamples())
        rng = np.random.default_rng(0)
        groups = [transform.random_map(i, rng).group for i in range(len(source))]
        thing, caption = (len(set(column.tolist())) for column in np.array(groups).T)
        assert thing == len(source)
        assert caption == (len(source) if independent else different)


@pytest.mark.usefixtures("two_devices")
def test_a_run_reports_the_truth_beside_its_estimates(tmp_path: Path) -> None:
    data = DataConfig(
        source="shapes", shapes=SMALL, image_size=SIZE, augment=AS_DRAWN, vocab_size=200, threads=0
    )
    config = tiny_config(tmp_path, data=data, steps=2, eval=EvalConfig(every=2, retrieval=()))
    results = evaluate(train(config, tmp_path))
    truth = split_of(SMALL).true_information
    assert results["test"]["information"]["true_information"] == truth
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line.get("information/true_information") for line in lines} == {None, truth}
    assert f"true {truth:.3f}, mean score" in terminal_table(results["test"])
    html = write_report(tmp_path).read_text()
    assert "True information" in html
    assert number(truth) in html
