"""``clip-lite report`` of several runs: seeds, paired differences, and what does not compare."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page

from clip_lite_jax import cli
from clip_lite_jax.apps.compare import Run, grouped, read_run, write_comparison
from clip_lite_jax.apps.compare_plots import overlays
from clip_lite_jax.apps.compare_tables import notes, number_rows, paired_difference, paired_rows
from clip_lite_jax.apps.report_tables import percent
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.evaluators.bootstrap import RESAMPLES

GALLERY = "retrieval/held_out"
Copies = Callable[..., Path]


@pytest.fixture
def copies(finished_run: Path, tmp_path: Path) -> Copies:
    """Copies of a run with another seed, other settings, and other numbers by chance."""

    def copy(name: str, seed: int = 0, chance: int = 0, **sections: Any) -> Path:
        folder = Path(shutil.copytree(finished_run, tmp_path / name))
        config = json.loads((folder / "config.json").read_text()) | {"seed": seed}
        for section, fields in sections.items():
            config[section] |= fields
        (folder / "config.json").write_text(json.dumps(config))
        results = json.loads((folder / "results.json").read_text())
        rng = np.random.default_rng(chance)
        for direction in ("text_to_image", "image_to_text"):
            kept = results["queries"][GALLERY]
            ranks = rng.integers(1, 21, len(kept[direction].split()))
            kept[direction] = " ".join(map(str, ranks))
            for k in (1, 5, 10):
                results["test"][GALLERY][f"{direction}_r{k}"] = float(np.mean(ranks <= k))
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return copy


def runs_of(*folders: Path) -> list[Run]:
    return [read_run(folder.name, folder) for folder in folders]


def test_seeds_of_a_configuration_are_one_column(copies: Copies) -> None:
    seeds = [copies(f"s{seed}", seed, chance=seed, log={"every": 1 + seed}) for seed in (2, 0, 1)]
    other = copies("other", 0, chance=9, optim={"learning_rate": 0.5})
    runs = runs_of(*seeds, other)
    groups = grouped(runs)
    assert [group.seeds for group in groups] == [[0, 1, 2], [0]]
    assert [group.label for group in groups] == ["A (3 seeds)", "B"]
    (row,) = [r for r in number_rows(groups) if r.name == "R@10" and r.of.endswith("text → image")]
    values = [run.held_out.numbers[GALLERY]["text_to_image_r10"] for run in runs[:3]]
    mean = sum(values) / 3
    deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert row.cells[0].text == f"{percent(mean)} ± {100 * deviation:.1f}"
    assert row.cells[0].below == "3 seeds"
    own = runs[3].held_out.numbers[GALLERY]
    assert row.cells[1].text == percent(own["text_to_image_r10"])
    assert row.cells[1].below.split(" to ")[0] == percent(own["text_to_image_r10_low"])
    assert row.mark == ""
    assert notes(groups) == []
    titles = [plot.title for plot in overlays(groups)]
    assert titles[0] == "Training loss"  # of one objective, and so one thing
    assert "Held out, text → image" in titles
    bands = [plot.caption for plot in overlays(groups) if plot.title.startswith("Held out")]
    assert "one standard deviation over seeds or the 95 % interval" in bands[0]


def test_paired_differences_equal_a_bootstrap_by_hand(copies: Copies) -> None:
    seeds = [copies(f"a{seed}", seed, chance=seed) for seed in (0, 1)]
    other = copies("b", 0, chance=5, optim={"learning_rate": 0.5})
    groups = grouped(runs_of(*seeds, other))
    found = paired_rows(groups)
    assert found.missing == []
    text, _ = found.rows
    assert (text.letters, text.seeds) == ("B − A", "1 and 2 seeds")
    ranks = [run.queries[GALLERY].ranks["text_to_image"] for run in runs_of(*seeds, other)]
    queries = groups[0].first.queries[GALLERY]
    differences = [
        float(after <= 10) - (float(one <= 10) + float(two <= 10)) / 2
        for one, two, after in zip(*ranks, strict=True)
    ]
    of = paired_difference(
        [run.queries[GALLERY] for run in groups[0].runs],
        [groups[1].first.queries[GALLERY]],
        "text_to_image",
        10,
    )
    np.testing.assert_allclose(of, differences)
    clusters = queries.groups[queries.owner]
    count = int(clusters.max()) + 1
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    means = [np.repeat(differences, times[clusters]).mean() for times in draws]
    low, high = (round(100 * end, 1) for end in np.quantile(means, (0.025, 0.975)))
    shown = [float(end.replace("−", "-")) for end in text.cells[1].below.split(" to ")]
    assert shown == pytest.approx([low, high], abs=0.051)
    assert text.telling[1] == (low > 0 or high < 0)
    assert text.queries == len(differences)


def test_what_does_not_compare_is_said(copies: Copies) -> None:
    first = copies("first")
    folder = copies("second", objective={"name": "infonce"}, negatives={"name": "all"})
    one, two = runs_of(first, folder)
    assert "Training loss" not in [plot.title for plot in overlays(grouped([one, two]))]

    protocol = json.loads((folder / "config.json").read_text())
    protocol["eval"]["retrieval"][0]["captions"] = "joined"
    (folder / "config.json").write_text(json.dumps(protocol))
    groups = grouped(runs_of(first, folder))
    assert "Not the same protocol on Held out: A: captions all" in notes(groups)[0]
    assert {row.mark for row in number_rows(groups) if row.of.startswith("Held")} == {"‡"}
    assert paired_rows(groups).rows[0].of.endswith("‡")

    other_data = replace(two, fingerprint="0")
    assert "Not the same data: A; B" in notes(grouped([one, other_data]))[0]
    queries = json.loads((folder / "results.json").read_text())
    queries["queries"][GALLERY]["ids"] = "other"
    (folder / "results.json").write_text(json.dumps(queries))
    groups = grouped([one, replace(read_run("second", folder), fingerprint="0")])
    assert {row.mark for row in number_rows(groups)} == {"†"}
    assert paired_rows(groups).rows == []
    assert "has other queries or candidates" in paired_rows(groups).missing[0]

    del queries["queries"]  # of an earlier version
    (folder / "results.json").write_text(json.dumps(queries))
    groups = grouped([one, *runs_of(folder)])
    assert "no ranks of single queries in the results of second" in paired_rows(groups).missing[0]

    (folder / "results.json").unlink()
    groups = grouped([one, *runs_of(folder)])
    assert any("Not the same split: B have no test numbers" in note for note in notes(groups))
    assert {row.mark for row in number_rows(groups)} == {"†"}
    half = replace(one, step=2)
    assert any("B is not finished: step 2 of 4" in note for note in notes(grouped([one, half])))


def test_information_of_other_pairs_is_marked(copies: Copies) -> None:
    folders = copies("a"), copies("b", eval={"max_information_pairs": 7})
    assert {r.mark for r in number_rows(grouped(runs_of(*folders)))} == {""}  # the same pairs
    results = json.loads((folders[1] / "results.json").read_text())
    results["test"]["information"]["pairs"] = 7
    (folders[1] / "results.json").write_text(json.dumps(results))
    groups = grouped(runs_of(*folders))
    (note,) = notes(groups)
    assert note.startswith("Not the same protocol on Information: A: captions first, ")
    assert note.endswith("; B: captions first, 7 pairs of test.")
    rows = number_rows(groups)
    assert {row.mark for row in rows if row.of.startswith("Information")} == {"‡"}
    assert {row.mark for row in rows if row.of.startswith("Held out")} == {""}


def test_copies_of_a_run_are_no_seeds(copies: Copies, tmp_path: Path) -> None:
    one, copy = copies("one", 3), copies("copy", 3, chance=1, log={"every": 5})
    with pytest.raises(ConfigError, match="one and copy have the same .* seed=3: they are no two"):
        grouped(runs_of(one, copy))
    (tmp_path / "link").symlink_to(one)
    with pytest.raises(ConfigError, match="link, one: given twice"):
        write_comparison([("one", one), ("link", tmp_path / "link")], tmp_path / "c.html")


def test_the_page_is_one_safe_file(
    copies: Copies, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        copies("<script>alert(1)<"),
        copies("b", 1, chance=1),
        copies("c", optim={"b1": 0.5}),
    ]
    out = tmp_path / "new" / "compare.html"
    assert cli.main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    source = out.read_text()
    page = Page(source)
    assert "<script" not in source.lower()
    assert page.sections == ["runs", "settings", "numbers", "paired", "curves", "cost"]
    assert ["optim.b1", "0.9", "0.5"] in page.rows
    loads = [a[n] for _, a in page.tags for n in ("src", "srcset", "href", "action") if n in a]
    assert all(load.startswith(("data:image/", "#")) for load in loads)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    assert "All have the same data, splits, protocols and budget" in page.text
    alone = write_comparison([(f.name, f) for f in folders[:2]], out)  # one configuration
    assert "paired" not in Page(alone.read_text()).sections


@pytest.mark.parametrize(
    "content",
    ['{"step": 4, "te', "[]", "{}", '{"step": 4}', '{"step": 4, "test": {"a": 1}}', "[" * 10**5],
)
def test_results_that_cannot_be_read_are_said(
    content: str, copies: Copies, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copies("run")
    (folder / "results.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run/results\.json holds no results: .* move it"):
        read_run("run", folder)
    if content.endswith("te"):  # a report of one run
        assert cli.main(["report", str(folder)]) == 2
        assert "results.json holds no results" in capsys.readouterr().err


def test_wrong_arguments_are_said(copies: Copies, tmp_path: Path) -> None:
    run = copies("run")
    with pytest.raises(ConfigError, match="given twice"):
        write_comparison([("run", run), ("run", run)], tmp_path / "c.html")
    with pytest.raises(CheckpointError, match="nowhere holds no run"):
        write_comparison([("run", run), ("nowhere", tmp_path / "nowhere")], tmp_path / "c.html")
    assert cli.main(["report", str(run), "--out", "x.html"]) == 2
