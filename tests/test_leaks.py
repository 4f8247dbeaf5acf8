"""Pictures in training and in what it is judged by are found by COCO's numbers."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from fifty import add, coco, fifty_pairs, karpathy_coco, write_images

from clip_lite_jax.cli import main
from clip_lite_jax.config import DataConfig, PartConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import DataError


@pytest.fixture
def train2017(tmp_path: Path) -> DataConfig:
    """COCO's release of 2017: what was ``train2014``, and some of ``val2014``."""
    pairs = [pair for i, pair in enumerate(fifty_pairs()) if pair.split == "train" or i % 10 == 4]
    folder = tmp_path / "train2017"
    write_images(folder, pairs, prefix="000000")
    (tmp_path / "annotations").mkdir()
    content = {
        "images": [{"id": int(p.stem), "file_name": f"000000{p.name}"} for p in pairs],
        "annotations": [
            {"id": i, "image_id": int(p.stem), "caption": p.captions[0]}
            for i, p in enumerate(pairs)
        ],
    }
    file = tmp_path / "annotations" / "captions_train2017.json"
    file.write_text(json.dumps(content))
    return DataConfig(source=str(file))


@pytest.fixture
def karpathy(tmp_path: Path) -> DataConfig:
    (tmp_path / "karpathy").mkdir()
    return karpathy_coco(tmp_path / "karpathy", fifty_pairs())


def test_train2017_leaks_into_karpathy_test(
    train2017: DataConfig, karpathy: DataConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["data", "splits", train2017.source, karpathy.source]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "5 of the 10 pictures of test are in train" in said
    assert "COCO_val2014_000000000004.jpg" in said
    assert "--write-clean" in said
    assert main([*command, "--allow-leaks"]) == 0
    assert main(["data", "splits", karpathy.source, karpathy.source]) == 0
    assert "no picture in common with the 30" in capsys.readouterr().out

    clean = tmp_path / "clean.jsonl"
    assert main([*command, f"--write-clean={clean}"]) == 0
    assert "30 of 35 written" in capsys.readouterr().out
    data = DataConfig(source=str(clean), image_folder=str(tmp_path / "train2017"))
    found = build_sources(replace(data, held_out=0), BadExamples())
    assert len(found["train"]) == 30
    assert found["train"][0].image == fifty_pairs()[0].image


def test_a_run_refuses_splits_that_leak(train2017: DataConfig, karpathy: DataConfig) -> None:
    # All of Karpathy's file as one split: even its training pictures are then judged by.
    config = replace(train2017, splits={"test": karpathy.source})
    with pytest.raises(DataError, match="35 of the 50 pictures of test are in train .*allow_leaks"):
        build_sources(config, BadExamples())
    found = build_sources(replace(config, allow_leaks=True), BadExamples())
    assert len(found["test"]) == 50


def test_a_mixture_whose_parts_leak(train2017: DataConfig, karpathy: DataConfig) -> None:
    parts = {
        "release": PartConfig(source=train2017.source),
        "karpathy": PartConfig(source=karpathy.source),
    }
    with pytest.raises(DataError, match="5 of the 10 pictures of test are in train"):
        build_sources(DataConfig(mixture=parts), BadExamples())


def test_coco_2014_keeps_its_splits_apart(tmp_path: Path) -> None:
    configs = coco(tmp_path, fifty_pairs())
    config = replace(configs["train"], splits={"validation": configs["val"].source})
    found = build_sources(config, BadExamples())
    assert {split: len(source) for split, source in found.items()} == {
        "train": 30,
        "validation": 20,
    }


def test_sources_that_cannot_be_compared(train2017: DataConfig, karpathy: DataConfig) -> None:
    assert main(["data", "splits", karpathy.source, train2017.source]) == 2


def test_equal_names_in_other_places_are_other_pictures(tmp_path: Path) -> None:
    tables, tars = {}, {}
    for name in ("train", "val"):
        root = tmp_path / name
        root.mkdir()
        write_images(root, fifty_pairs()[:3])
        rows = "".join(f"{pair.name},a thing\n" for pair in fifty_pairs()[:3])
        (root / "pairs.csv").write_text(f"image,caption\n{rows}")
        tables[name] = str(root / "pairs.csv")
        with tarfile.open(root / "00000.tar", "w") as tar:
            add(tar, "0.jpg", fifty_pairs()[0].image)
            add(tar, "0.txt", b"a thing")
        tars[name] = str(root / "00000.tar")
    for paths in (tables, tars):
        found = build_sources(
            DataConfig(source=paths["train"], splits={"validation": paths["val"]}), BadExamples()
        )
        assert len(found["validation"]) == len(found["train"])
    # The same files through another table are the same pictures.
    other = tmp_path / "train" / "again.csv"
    other.write_text((tmp_path / "train" / "pairs.csv").read_text())
    config = DataConfig(source=tables["train"], splits={"validation": str(other)})
    with pytest.raises(DataError, match="3 of the 3 pictures of validation are in train"):
        build_sources(config, BadExamples())
