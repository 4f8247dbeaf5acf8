"""Benchmarks that train many small models, from the command to the page.

Kept out of the ordinary run for its minute of compilation; what they compute with is tested in
`tests/test_one_negative.py` and `tests/test_compare.py`.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from conftest import tiny_config
from frozen import make_features

from benchmarks import compare, one_negative
from benchmarks.frozen_features import save_features
from benchmarks.one_negative_report import markdown
from clip_lite_jax.errors import ConfigError


def test_quick_run_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_features(40, per_group=2, image_width=6, text_width=5)
    save_features(tmp_path / "features.npz", features)
    names = {"features": "features.npz", "cells": "cells.jsonl", "out": "results/out.json"}
    names |= {"page": "page.md", "plot": "plot.png"}
    options = [x for name, file in names.items() for x in (f"--{name}", str(tmp_path / file))]
    monkeypatch.setattr(sys, "argv", ["one_negative", "--quick", *options])
    one_negative.main()
    results = json.loads((tmp_path / "results/out.json").read_text())
    page, cells = (tmp_path / "page.md").read_text(), (tmp_path / "cells.jsonl").read_text()
    names = [*one_negative.QUICK.recipes, "best_on_validation"]
    assert [row["name"] for row in results["rows"]] == names
    for row in results["rows"]:
        assert list(row["batches"]) == ["4", "8"]
        for cell in row["batches"].values():
            assert len(cell["top_1"]) == (2 if row["name"] == "jsd_hard" else 3)
            assert cell["seconds"] > 0
        assert row["batches"]["8"]["temporaries"] > 0
    assert markdown(results) in page
    assert "3 seeds a cell, but of JSD, one hard 2." in page
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    # A line that a kill cut short is made again, and nothing else.
    (tmp_path / "cells.jsonl").write_text(cells[: cells.rindex('{"key"') + 20] + "\n")
    one_negative.main()
    again = json.loads((tmp_path / "results/out.json").read_text())
    assert [r["batches"].keys() for r in again["rows"]] == [
        r["batches"].keys() for r in results["rows"]
    ]
    assert (tmp_path / "cells.jsonl").read_text().count('"top_1"') == cells.count('"top_1"')


@pytest.mark.usefixtures("two_devices")
def test_rows_differ_in_objective_and_negatives_alone(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(pairs, steps=2, batch_size=16)
    config = replace(config, data=replace(config.data, held_out=0.25))
    rows = compare.rows(config)
    assert len({row.negatives.sides for row in rows}) == 1
    table = compare.compare(config, [0], tmp_path, "make compare")
    names = [(row["objective"], row["negatives"]) for row in table["rows"]]
    assert names == [("jsd", "shuffle"), ("jsd", "hard"), ("infonce", "all")]
    recalls = [row["test"]["retrieval/held_out/text_to_image_r10"] for row in table["rows"]]
    assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in recalls)
    # Called again, it reads the finished runs back, and refuses those of other settings.
    lines = {path: path.read_text() for path in tmp_path.glob("*/metrics.jsonl")}
    again = compare.compare(config, [0], tmp_path, "make compare")
    assert again["rows"] == table["rows"]
    assert {path: path.read_text() for path in lines} == lines
    with pytest.raises(ConfigError, match="batch_size: 16 there, 32 now"):
        compare.compare(replace(config, batch_size=32), [0], tmp_path, "make compare")
