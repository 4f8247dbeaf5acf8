"""The comparison of objectives: every run once, a table for reports and one for the docs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config

from benchmarks import compare as benchmark
from clip_lite_jax.apps.report_tables import COMPARE_FILE
from clip_lite_jax.config import Config
from clip_lite_jax.errors import ConfigError


@pytest.fixture
def config(pairs: Path) -> Config:
    config = tiny_config(pairs, steps=2, batch_size=16)
    return replace(config, data=replace(config.data, held_out=0.25))


@pytest.mark.usefixtures("two_devices")
def test_rows_differ_in_objective_and_negatives_alone(config: Config, tmp_path: Path) -> None:
    rows = benchmark.rows(config)
    assert len({row.negatives.sides for row in rows}) == 1
    table = benchmark.compare(config, [0], tmp_path, "make compare")
    names = [(row["objective"], row["negatives"]) for row in table["rows"]]
    assert names == [("jsd", "shuffle"), ("jsd", "hard"), ("infonce", "all")]
    recalls = [row["test"]["retrieval/held_out/text_to_image_r10"] for row in table["rows"]]
    assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in recalls)
    # Called again, it reads the finished runs back, and refuses those of other settings.
    lines = {path: path.read_text() for path in tmp_path.glob("*/metrics.jsonl")}
    again = benchmark.compare(config, [0], tmp_path, "make compare")
    assert again["rows"] == table["rows"]
    assert {path: path.read_text() for path in lines} == lines
    with pytest.raises(ConfigError, match="batch_size: 16 there, 32 now"):
        benchmark.compare(replace(config, batch_size=32), [0], tmp_path, "make compare")


def test_markdown_has_means_deviations_and_chance() -> None:
    key = "retrieval/unseen_things/text_to_image_r10"
    row = {"label": "JSD", "train_seconds": [10.0, 12.0]}
    test = {key: [0.2, 0.4], f"{key}_chance": [0.1, 0.1], "information/jsd_loss": [1.0, 1.0]}
    assert benchmark.markdown({"rows": [row | {"test": test}]}).splitlines() == [
        "| run | training | unseen things, text → image |",
        "| --- | --- | --- |",
        "| JSD | 11 s | 0.300 ± 0.141 |",
        "| chance |  | 0.100 |",
    ]


def test_the_docs_show_the_published_table() -> None:
    docs = Path(__file__).parent.parent / "docs" / "results.md"
    assert benchmark.markdown(json.loads(COMPARE_FILE.read_text())) in docs.read_text()
