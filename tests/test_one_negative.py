"""The bench of one negative against the batch: protocol, statistics, prototype."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frozen import make_features
from scipy import stats

from benchmarks import one_negative as bench
from benchmarks.frozen_features import Features
from benchmarks.one_negative_report import paired
from benchmarks.one_negative_train import Setting, build_task, visits

ROWS = 40


@pytest.fixture(scope="module")
def features() -> Features:
    """Forty pairs in every split, two of a group."""
    return make_features(ROWS, per_group=2, image_width=6, text_width=5)


def test_rows_come_with_their_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["one_negative", "--rows", "jsd_hard"])
    with pytest.raises(SystemExit):
        bench.main()


def test_selection_never_touches_test_rows(features: Features, tmp_path: Path) -> None:
    """With the test rows replaced by noise, all that is chosen and all training stay the same."""
    test = np.char.startswith(features.split, "test/")
    rng = np.random.default_rng(1)
    image, joined = features.image.copy(), features.joined.copy()
    image[test] = rng.normal(size=image[test].shape)
    joined[test] = rng.normal(size=joined[test].shape)
    caption = np.repeat(joined, 2, axis=0)
    changed = replace(features, image=image, joined=joined, caption=caption)
    plan, chosen = replace(bench.QUICK, selected=(4,), batches=(4,)), []
    for number, given in enumerate((features, changed)):
        cells = bench.Cells(tmp_path / f"{number}.jsonl")
        runs = {4: bench.RowRuns(plan, "infonce", 4, build_task(given, 4), cells)}
        chosen.append((bench.choose(plan, runs), [c["top_1"] for c in cells.done.values()]))
        stages = {json.loads(key)["stage"] for key in cells.done}
        assert stages == {"validation"}
    assert chosen[0] == chosen[1]
    assert not set(plan.selection_seeds) & set(plan.seeds)
    assert not set(bench.Plan().selection_seeds) & set(bench.Plan().seeds)


def test_paired_difference_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    values, reference = rng.normal(size=5), rng.normal(size=5)
    expected = stats.ttest_rel(values, reference)
    low, high = expected.confidence_interval(0.95)
    assert paired(values.tolist(), reference.tolist()) == pytest.approx(
        (np.mean(values - reference), low, high)
    )


def test_visits_are_the_same_for_all_batch_sizes(features: Features) -> None:
    data = build_task(features, 4).train
    small, large = (visits(3, data, 2, batch) for batch in (4, 16))
    np.testing.assert_array_equal(small.example.reshape(-1), large.example.reshape(-1))
    np.testing.assert_array_equal(np.sort(small.example[:10].reshape(-1)), np.arange(ROWS))
    np.testing.assert_array_equal(small.caption // 2, small.example)


def test_between_batch_sizes_is_interpolated() -> None:
    known = {4: 0.0, 64: 2.0}
    assert [bench.interpolated(b, known) for b in (2, 4, 16, 64, 128)] == pytest.approx(
        [0.0, 0.0, 1.0, 2.0, 2.0]
    )


def test_validation_picks_a_contender_for_every_batch_size() -> None:
    def row(name: str, validation: tuple[float, float], top_1: float) -> dict[str, Any]:
        cells = {
            b: {"validation": v, "top_1": [top_1]} for b, v in zip((4, 8), validation, strict=True)
        }
        return {"name": name, "label": name.upper(), "batches": cells}

    plan = replace(bench.QUICK, contenders=("one", "two"))
    rows = [row("one", (0.3, 0.1), 0.0), row("two", (0.2, 0.2), 0.9), row("other", (1.0, 1.0), 1.0)]
    (best,) = bench.best_on_validation(plan, rows)
    assert [best["batches"][b]["row"] for b in (4, 8)] == ["ONE", "TWO"]
    assert [best["batches"][b]["top_1"] for b in (4, 8)] == [[0.0], [0.9]]
    assert bench.best_on_validation(plan, rows[1:]) == []


def test_setting_is_part_of_what_a_kept_run_is_known_by(features: Features, tmp_path: Path) -> None:
    cells = bench.Cells(tmp_path / "cells.jsonl")
    keys = []
    for hidden in (4, 8):
        setting = Setting(components=4, hidden=hidden)
        plan = replace(bench.QUICK, setting=setting)
        keys.append(bench.RowRuns(plan, "infonce", 4, build_task(features, 4), cells).key)
    assert keys[0] != keys[1]
