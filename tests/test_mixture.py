"""Several sources as one: shares, order, names, splits in files of their own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw, write_pairs

from clip_lite_jax.batch import Batch
from clip_lite_jax.config import DataConfig, PartConfig, load_config
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.pipeline import TrainTransform, train_batches
from clip_lite_jax.data.sources import Mixture, build_sources, captions_of, fingerprint
from clip_lite_jax.data.tokenizer import Tokenizer, train_tokenizer
from clip_lite_jax.errors import DataError

SIZES = {"small": 20, "middle": 30, "large": 60}
BATCH = 20


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tables whose columns have names of their own."""
    root = tmp_path_factory.mktemp("parts")
    paths = {}
    for name, count in SIZES.items():
        lines = [f"image,{name}"]
        for i in range(count):
            colour, shape = COLOURS[i % 8], SHAPES[i // 8 % 6]
            draw(shape, colour, 16).save(root / f"{name}{i}.png")
            lines.append(f"{name}{i}.png,{name} {colour} {shape} {i}")
        paths[name] = root / f"{name}.csv"
        paths[name].write_text("\n".join(lines))
    return paths


def mixture(tables: dict[str, Path], parts: dict[str, dict[str, Any]], **more: Any) -> DataConfig:
    return DataConfig(
        mixture={
            name: PartConfig(
                source=str(tables[name]), fields={"caption_columns": (name,)}, **options
            )
            for name, options in parts.items()
        },
        held_out=0,
        image_size=16,
        threads=0,
        **more,
    )


WEIGHTS = {"small": {"weight": 5.0}, "middle": {"weight": 3.0}, "large": {"weight": 2.0}}


def batches(
    config: DataConfig, steps: int, start: int = 0, process: int = 0, processes: int = 1
) -> list[Batch]:
    source = build_sources(config, BadExamples())["train"]
    tokenizer = Tokenizer(train_tokenizer(captions_of(source), 80), 8)
    transform = TrainTransform(
        source, TowerInputs(Pixels(config), tokenizer), config, BadExamples()
    )
    found = train_batches(transform, BATCH, 0, start, (process,), processes)
    return [next(found) for _ in range(steps)]


def drawn(config: DataConfig, steps: int) -> dict[str, np.ndarray]:
    """How often each example of each part came, by part."""
    source = build_sources(config, BadExamples())["train"]
    assert isinstance(source, Mixture)
    index = np.concatenate([batch.index for batch in batches(config, steps)])
    counts = np.bincount(index, minlength=len(source))
    return dict(zip(source.parts, np.split(counts, source.starts[1:-1]), strict=True))


@pytest.mark.parametrize(
    ("parts", "more", "shares"),
    [
        (WEIGHTS, {}, (0.5, 0.3, 0.2)),
        ({name: {} for name in SIZES}, {}, (20 / 110, 30 / 110, 60 / 110)),
        (
            {name: {} for name in SIZES},
            {"mixture_temperature": 2.0},
            tuple(np.sqrt([20, 30, 60]) / np.sqrt([20, 30, 60]).sum()),
        ),
        (
            {"small": {"epochs": 3.0}, "middle": {"epochs": 1.0}, "large": {"epochs": 0.5}},
            {},
            (60 / 120, 30 / 120, 30 / 120),
        ),
    ],
)
def test_parts_keep_their_shares(
    tables: dict[str, Path],
    parts: dict[str, dict[str, Any]],
    more: dict[str, Any],
    shares: tuple[float, ...],
) -> None:
    counts = drawn(mixture(tables, parts, **more), 60)
    total = sum(found.sum() for found in counts.values())
    for found, share in zip(counts.values(), shares, strict=True):
        assert found.sum() / total == pytest.approx(share, abs=0.01)
        # Each epoch of a part holds all of its examples.
        assert found.max() - found.min() <= 1


def test_the_order_is_a_function_of_seed_and_step(tables: dict[str, Path]) -> None:
    config = mixture(tables, WEIGHTS)
    whole = batches(config, 12)
    for one, other in zip(whole[7:], batches(config, 5, start=7), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    for processes in (2, 4):
        parts = [batches(config, 3, 5, process, processes) for process in range(processes)]
        for step in range(3):
            rows = [part[step] for part in parts]
            joined = jax.tree.map(lambda *values: np.concatenate(values), *rows)
            jax.tree.map(np.testing.assert_array_equal, joined, whole[5 + step])


def test_examples_bear_the_name_of_their_part(tables: dict[str, Path]) -> None:
    config = mixture(tables, WEIGHTS)
    found = build_sources(config, BadExamples())
    source = found["train"]
    assert len(source) == sum(SIZES.values())
    assert source.metadata(0).id == "small/small0.png"
    assert source.metadata(20).group == "middle/middle0.png"
    assert source[109].id == "large/large59.png"
    assert source[109].captions == source.metadata(109).captions == ("large black square 59",)
    assert source[109].image.startswith(b"\x89PNG")
    other = mixture(tables, {"middle": {}, "small": {}, "large": {}})
    assert fingerprint(found) != fingerprint(build_sources(other, BadExamples()))


def test_validation_is_that_of_all_parts(tables: dict[str, Path]) -> None:
    config = replace(mixture(tables, WEIGHTS), held_out=0.2)
    alone = [
        build_sources(
            replace(config, mixture={}, source=str(path), caption_columns=(name,)), BadExamples()
        )
        for name, path in tables.items()
    ]
    found = build_sources(config, BadExamples())
    for split in ("train", "validation", "test"):
        assert len(found[split]) == sum(len(splits.get(split, ())) for splits in alone)


def test_a_built_in_source_mixes_too(tables: dict[str, Path]) -> None:
    parts = {"emoji": PartConfig(source="emoji")} | mixture(tables, {"small": {}}).mixture
    found = build_sources(DataConfig(mixture=parts), BadExamples())
    assert "artist_test" in found
    assert found["train"].metadata(0).id.startswith("emoji/")


def test_splits_in_files_of_their_own(tables: dict[str, Path], tmp_path: Path) -> None:
    config = DataConfig(
        source=str(tables["large"]),
        image_folder=str(tables["large"].parent),
        caption_columns=("large",),
        splits={"validation": str(tmp_path / "val.csv"), "test": str(tmp_path / "test.csv")},
    )
    lines = tables["large"].read_text().splitlines()
    tables["large"].with_name("fewer.csv").write_text("\n".join(lines[:31]))
    (tmp_path / "val.csv").write_text("\n".join([lines[0], *lines[31:41]]))
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *lines[41:]]))
    config = replace(config, source=str(tables["large"].with_name("fewer.csv")))
    found = build_sources(config, BadExamples())
    assert {split: len(source) for split, source in found.items()} == {
        "train": 30,
        "validation": 10,
        "test": 20,
    }
    with pytest.raises(DataError, match="data.splits names 'train'"):
        build_sources(replace(config, splits={"train": "x.csv"}), BadExamples())


def test_mixtures_that_mean_nothing(tables: dict[str, Path]) -> None:
    for parts in (
        {"small": {"weight": 1.0}, "large": {}},
        {"small": {"weight": 1.0}, "large": {"epochs": 1.0}},
        {"small": {"weight": 1.0, "epochs": 1.0}},
    ):
        with pytest.raises(DataError, match="give all parts a weight"):
            build_sources(mixture(tables, parts), BadExamples())
    config = mixture(tables, WEIGHTS)
    with pytest.raises(DataError, match=r"data.source='x.csv' beside data.mixture"):
        build_sources(replace(config, source="x.csv"), BadExamples())
    part = PartConfig(source=str(tables["small"]), fields={"colour": "red"})
    with pytest.raises(DataError, match=r"data.mixture.a.fields: .*colour"):
        build_sources(DataConfig(mixture={"a": part}), BadExamples())


def test_a_mixture_on_the_command_line(tables: dict[str, Path]) -> None:
    parts = {"a": {"source": str(tables["small"]), "fields": {"caption_columns": ["small"]}}}
    config = load_config("quickstart.py", {"data.mixture": json.dumps(parts)})
    assert config.data.mixture["a"].source == str(tables["small"])
    assert len(build_sources(config.data, BadExamples())["train"]) > 5


def test_the_names_of_all_sources(tables: dict[str, Path]) -> None:
    assert DataConfig(source="x.csv").sources == ("x.csv",)
    assert mixture(tables, WEIGHTS).sources == tuple(map(str, tables.values()))


def test_what_cannot_be_used_is_listed_with_its_part(tmp_path: Path) -> None:
    tables = {name: write_pairs(tmp_path / name) for name in ("a", "b")}
    for table in tables.values():
        with table.open("a") as file:
            file.write("gone.png,a picture\n")
    mixture = {name: PartConfig(source=str(table)) for name, table in tables.items()}
    bad = BadExamples()
    build_sources(DataConfig(source="", mixture=mixture, held_out=0.0), bad)
    assert [id.partition("/")[0] for id in bad.reasons] == ["a", "b"]
    rows = [len(table.read_text().splitlines()) - 1 for table in tables.values()]
    assert bad.total == sum(rows)
