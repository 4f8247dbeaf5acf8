"""Pairs, splits and stored features of the frozen towers; no torch, no network."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from frozen import make_features

from benchmarks import frozen_linear
from benchmarks.frozen_features import Features, load_features, save_features
from benchmarks.frozen_pairs import (
    CATALOGUES,
    GALLERIES,
    HELD_OUT_ARTIST,
    SPLITS,
    STAGES,
    head_word,
    parse_catalogue,
    place_emoji,
    place_furniture,
    read_catalogue,
)
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import read_emoji
from clip_lite_jax.errors import DataError


def render(name: str, number: int = 0) -> Example:
    return Example(f"furniture/{name}{number}", name.casefold(), (name,), b"", {})


@pytest.fixture(scope="module")
def emoji() -> list[Example]:
    """The built-in drawings without their images, placed."""
    splits = read_emoji(DataConfig(), BadExamples()).values()
    return place_emoji(s.metadata(i) for s in splits for i in range(len(s)))


@pytest.fixture
def features() -> Features:
    """Six pairs in every split, three of a group."""
    return make_features(rows=6, per_group=3, image_width=5, text_width=4)


def test_emoji_splits_hold_out_concepts_and_artists(emoji: list[Example]) -> None:
    groups, artists = defaultdict(set), defaultdict(set)
    for example in emoji:
        groups[example.attributes["split"]].add(example.group)
        artists[example.attributes["split"]].add(example.attributes["artist"])
    assert set(groups) == set(SPLITS) - {f"{stage}/unseen_furniture" for stage in STAGES}
    for stage in STAGES:
        assert not groups["train"] & (
            groups[f"{stage}/unseen_concepts"] | groups[f"{stage}/unseen_both"]
        )
        assert groups[f"{stage}/unseen_artist"] <= groups["train"]
        assert artists[f"{stage}/unseen_concepts"] <= artists["train"]
        assert artists[f"{stage}/unseen_both"] == {HELD_OUT_ARTIST}
        assert not artists["train"] & (artists[f"{stage}/unseen_artist"] | {HELD_OUT_ARTIST})
    validation, test = (set().union(*(groups[f"{s}/{g}"] for g in GALLERIES)) for s in STAGES)
    assert not validation & test


def test_furniture_is_held_out_by_head_word(emoji: list[Example]) -> None:
    names = [f"{kind} thing{i}" for i in range(200) for kind in ("Old", "New")]
    placed = place_furniture([render(name) for name in names], emoji)
    splits = defaultdict(set)
    for example in placed:
        splits[head_word(example.captions[0])].add(example.attributes["split"])
    assert all(len(found) == 1 for found in splits.values())
    found = [next(iter(split)) for split in splits.values()]
    assert {*found} == {"train", "validation/unseen_furniture", "test/unseen_furniture"}
    assert found.count("train") > 80
    look_alikes = [render(f"{kind} thing0") for kind in "ABCDE"]
    assert {e.attributes["split"] for e in place_furniture(look_alikes, emoji)} == {"train"}


def test_furniture_follows_the_emoji_of_its_name(emoji: list[Example]) -> None:
    seen = next(e for e in emoji if e.attributes["split"] == "train")
    unseen = next(e for e in emoji if e.attributes["split"] == "test/unseen_concepts")
    placed = place_furniture([render(seen.captions[0]), render(unseen.captions[0])], emoji)
    assert [(e.group, e.attributes["split"]) for e in placed] == [(seen.group, "train")]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("Coffee table", "table"),
        ("Table on trestles", "table"),
        ("TV 16:9", "tv"),
        ("Plate, glass and cutlery", "plate"),
        ("Air conditioning - External unit", "conditioning"),
        ("Double French window small panes", "window"),
        ("Small oven", "oven"),
    ],
)
def test_head_word(name: str, head: str) -> None:
    assert head_word(name) == head


def test_catalogue_properties() -> None:
    text = b"name=Models\nname#2=Bill 10\\u20ac\ntags#2=\nname#1=Vase \nicon#1=/a/b.png\n"
    assert parse_catalogue(text) == [
        {"name": "Vase", "icon": "/a/b.png"},
        {"name": "Bill 10€", "tags": ""},
    ]


def test_only_the_known_catalogues_are_read(tmp_path: Path) -> None:
    path = tmp_path / next(iter(CATALOGUES))
    with pytest.raises(DataError, match="no such file"):
        read_catalogue(path)
    path.write_bytes(b"another zip")
    with pytest.raises(DataError, match="is not the file of"):
        read_catalogue(path)


def test_features_come_back_as_they_were_saved(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "made" / "features.npz"
    save_features(path, features)
    loaded = load_features(path)
    for name, value in vars(features).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
    assert loaded.provenance == features.provenance


def test_other_files_are_refused(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    with pytest.raises(DataError, match="no such file"):
        load_features(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(DataError, match="does not hold frozen features"):
        load_features(path)
    np.savez(path, image=features.image)
    with pytest.raises(DataError, match="does not hold frozen features"):
        load_features(path)
    np.savez(path, **{**vars(features), "id": np.array([object()]), "provenance": "{}"})
    with pytest.raises(DataError, match="does not hold frozen features"):
        load_features(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group": np.zeros(3, np.int32)}, "group has 3 rows, not 54"),
        ({"image": np.zeros((54, 5))}, "image is not a finite float32 matrix"),
        ({"joined": np.full((54, 4), np.nan, np.float32)}, "joined is not a finite"),
        ({"owner": np.zeros(108, np.int32)}, "owner does not give every example its captions"),
    ],
)
def test_features_are_checked(
    features: Features, changed: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        replace(features, **changed)


def test_a_gallery_has_one_example_of_every_group(features: Features) -> None:
    for split in SPLITS:
        rows = features.gallery(split)
        assert set(rows) <= set(features.rows(split))
        assert sorted(features.group[rows]) == sorted(set(features.group[features.rows(split)]))
    order = np.random.default_rng(1).permutation(len(features.id))
    shuffled = replace(
        features, id=features.id[order], split=features.split[order], group=features.group[order]
    )
    chosen = [set(f.id[f.gallery("train")]) for f in (features, shuffled)]
    assert chosen[0] == chosen[1]


def test_the_linear_map_finds_a_linear_relation(features: Features) -> None:
    penalty, results = frozen_linear.fit(features)
    assert penalty in frozen_linear.PENALTIES
    assert results["test"]["mean"]["text_to_image_r1"] == 1
    assert "| test/mean | 2 | 1.000 |" in frozen_linear.markdown(results)
