"""The report of a tiny run: its numbers, its safety, and what is left out when it is not there."""

import base64
import html
import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, write_pairs
from PIL import Image

from clip_lite_jax.apps import report_tables
from clip_lite_jax.apps.report import write_report
from clip_lite_jax.apps.report_commands import commands
from clip_lite_jax.apps.report_gallery import build_gallery, picture_uri, shorten
from clip_lite_jax.apps.report_plots import BINS, binned, curves
from clip_lite_jax.apps.report_tables import (
    Recall,
    categories,
    number,
    percent,
    terminal_table,
)
from clip_lite_jax.config import Config, load_config, parse_overrides
from clip_lite_jax.data.records import Example
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.evaluate import evaluate
from clip_lite_jax.evaluators.ranking import dense_counts, ranks
from clip_lite_jax.evaluators.retrieval import retrieval_metrics
from clip_lite_jax.train import train

HOSTILE = "<script>alert(1)</script>"
SECTIONS = [
    "summary", "retrieval", "information", "curves", "gallery", "errors", "map", "scores", "data",
    "skipped", "cost", "next",
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags, sections, table rows and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.style = ""
        self._style = self._cell = False
        self.feed(source)
        self.text = one_line(" ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._style = tag == "style"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._style = False
        if tag in ("td", "th"):
            self._cell = False
            self.rows[-1][-1] = one_line(self.rows[-1][-1])

    def handle_data(self, data: str) -> None:
        if self._style:
            self.style += data
            return
        self.words.append(data)
        if self._cell:
            self.rows[-1][-1] += f" {data}"

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]

    def count(self, tag: str, css: str) -> int:
        return sum(t == tag and css in a.get("class", "").split() for t, a in self.tags)


def one_line(text: str) -> str:
    return re.sub("[ \n]+", " ", text).strip()  # and narrow spaces stay


def hostile_pairs(folder: Path) -> Path:
    """The coloured shapes with HTML in their captions, and one broken picture."""
    table = write_pairs(folder)
    table.write_text(table.read_text().replace(",a ", f",{HOSTILE} ") + "broken.png,nothing\n")
    (folder / "broken.png").write_bytes(b"not a picture")
    return table


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    table = hostile_pairs(tmp_path_factory.mktemp("hostile"))
    data = replace(tiny_config(table).data, held_out=0.25, vocab_size=90)
    return tiny_config(table, name="tiny", data=data)


@pytest.fixture(scope="module")
def workdir(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a run"
    evaluate(train(config, folder))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(workdir: Path) -> Page:
    return Page((workdir / "report.html").read_text())


@pytest.fixture
def copy(workdir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workdir, tmp_path / "copy"))


def change_config(workdir: Path, **sections: dict[str, Any]) -> None:
    file = workdir / "config.json"
    values = json.loads(file.read_text())
    for section, fields in sections.items():
        values[section] |= fields
    file.write_text(json.dumps(values))


def test_numbers_are_those_of_the_results(workdir: Path, page: Page) -> None:
    test = json.loads((workdir / "results.json").read_text())["test"]
    metrics = test["retrieval/held_out"]
    rows = [row for row in page.rows if row[0].startswith("Held out")]
    assert [row[0].split("N")[0].strip() for row in rows] == [
        "Held out text → image",
        "Held out image → text",
    ]
    for row, direction in zip(rows, ("text_to_image", "image_to_text"), strict=True):
        for cell, k in zip(row[1:4], (1, 5, 10), strict=True):
            value, chance = metrics[f"{direction}_r{k}"], metrics[f"{direction}_r{k}_chance"]
            low, high = (metrics[f"{direction}_r{k}_{end}"] for end in ("low", "high"))
            assert low < high  # of equal answers, too
            ends = f"{100 * low:.1f} to {100 * high:.1f}"
            assert cell == f"{percent(value)} {ends} {value / chance:.1f} × {percent(chance)}"
        assert row[5].split()[0] == percent(metrics[f"{direction}_map"]).split()[0]
        assert row[4].split()[0] == f"{metrics[f'{direction}_median_rank']:g}"
    captions, images = int(metrics["captions"]), int(metrics["images"])
    assert f"N = {captions}, among {images}" in page.text  # two captions for every picture
    (best,) = [k for k in (10, 5, 1) if 4 * k <= images][:1]
    hits = round(metrics[f"text_to_image_r{best}"] * captions)
    assert f"for {hits} of {captions} held-out captions the right picture" in page.text
    information = {row[0].split(" Yes")[0].split(" No")[0]: row[1:] for row in page.rows}
    bound = test["information"]["jsd_lower_bound"]
    low, high = (test["information"][f"jsd_lower_bound_{end}"] for end in ("low", "high"))
    nats = f"{number(bound)} {number(low)} to {number(high)}"
    assert information["Certified JSD bound"] == [nats, number(bound / np.log(2))]
    score = test["information"]["score_positive"]
    assert information["Mean score T of the pairs"][0].split()[0] == number(score)
    assert "only at the optimum T = log r" in page.text
    assert information["log N of these pairs"][0] == number(np.log(test["information"]["pairs"]))


def test_sections_and_curves(page: Page) -> None:
    assert page.sections == SECTIONS
    assert page.count("figure", "plot") == 9  # five curves, information, two maps, the histogram
    anchors = {a["href"] for tag, a in page.tags if tag == "a"}
    assert anchors == {f"#{section}" for section in SECTIONS}
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    assert "broken.png" in page.text  # among the skipped examples, with its reason
    assert "cannot be decoded" in page.text


def test_strangers_text_is_shown_and_never_run(workdir: Path, page: Page) -> None:
    source = (workdir / "report.html").read_text()
    assert "<script" not in source.lower()
    assert html.escape(HOSTILE) in source
    assert HOSTILE in page.text
    assert not any(name.startswith("on") for _, a in page.tags for name in a)


def test_nothing_is_loaded_from_elsewhere(workdir: Path, page: Page) -> None:
    loads = [a[n] for _, a in page.tags for n in ("src", "srcset", "href", "action") if n in a]
    assert loads
    assert all(load.startswith(("data:image/", "#")) for load in loads)
    assert not re.search(r"url\(|@import|@font-face", page.style)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {t for t, _ in page.tags}
    for load in loads:
        if "svg" in load:  # a figure draws what is in it and nothing else
            figure = base64.b64decode(load.partition(",")[2]).decode()
            assert not re.search(r"href=\"(?!#)|url\((?!#)|<image|<script", figure)
    assert (workdir / "report.html").stat().st_size < 1_000_000


def test_every_figure_has_a_dark_variant(page: Page) -> None:
    dark = [a["srcset"] for t, a in page.tags if t == "source" and "dark" in a["media"]]
    light = [a["src"] for t, a in page.tags if t == "img" and "svg" in a["src"]]
    assert len(dark) == len(light) == page.count("figure", "plot")
    assert not set(dark) & set(light)
    assert "prefers-color-scheme: dark" in page.style
    assert any(a.get("name") == "viewport" for t, a in page.tags if t == "meta")


def test_right_answers_are_marked_in_the_page(page: Page) -> None:
    _, _, searches = page.text.partition("marks a right answer")
    searches = searches.partition("hardest misses")[0]
    shown = [int(rank) for rank in re.findall(r"Right answer at rank (\d+)", searches)]
    hidden = [int(rank) for rank in re.findall(r"Right answer not shown: rank (\d+)", searches)]
    assert max(shown, default=1) <= 5 < min(hidden, default=6)
    assert len(shown) + len(hidden) == 16
    assert searches.count("✓ right") >= len(shown)  # a picture has two captions


@pytest.mark.parametrize("ties", [False, True])
def test_marks_agree_with_ranks_by_brute_force(ties: bool) -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(30), rng.integers(1, 4, 30))
    retrieval = fake_retrieval(owner)
    scores = rng.normal(size=(30, len(owner)))
    scores[owner, np.arange(len(owner))] += 2
    scores = np.round(scores) if ties else scores
    gallery = build_gallery("g", retrieval, scores, queries=30, worst=1000)
    for query in gallery.text_to_image:
        caption = retrieval.captions.index(query.asked.caption)
        right = scores[owner[caption], caption]
        assert query.rank == np.sum(scores[:, caption] >= right)
        marked = [place for place, item in enumerate(query.answers, 1) if item.right]
        assert marked == ([query.rank] if query.rank <= 5 else [])
    for query in gallery.image_to_text:
        image = owner[retrieval.captions.index(query.asked.caption)]
        best = scores[image, owner == image].max()
        assert query.rank == 1 + np.sum(scores[image, owner != image] >= best)
        marked = [place for place, item in enumerate(query.answers, 1) if item.right]
        assert marked[:1] == ([query.rank] if query.rank <= 5 else [])
        for item in query.answers:
            assert item.right == (owner[retrieval.captions.index(item.caption)] == image)
    recall = retrieval_metrics(scores, owner)["text_to_image_r1"]
    assert len(gallery.worst_text_to_image) == round((1 - recall) * len(owner))
    worst = [query.rank for query in gallery.worst_image_to_text]
    assert worst == sorted(worst, reverse=True)
    # Categories split the same hits up.
    metrics = retrieval_metrics(scores, owner)
    rows = categories(retrieval, scores)
    hits = sum(row.text_to_image_hits for row in rows), sum(row.image_to_text_hits for row in rows)
    assert hits[0] == round(metrics["text_to_image_r10"] * len(owner))
    assert hits[1] == round(metrics["image_to_text_r10"] * 30)
    assert sum(row.captions for row in rows) == len(owner)


def fake_retrieval(owner: np.ndarray) -> Any:
    count = int(owner.max()) + 1
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png = buffer.getvalue()
    return SimpleNamespace(
        owner=owner,
        ranks=lambda scores: ranks(dense_counts(scores, owner), owner),
        captions=[f"caption {c}" for c in range(len(owner))],
        examples=[
            Example(f"id {i}", "", ("",), png, {"category": "odd" if i % 2 else "even"})
            for i in range(count)
        ],
    )


def test_queries_do_not_follow_the_order_of_the_data() -> None:
    owner, scores = np.arange(40), np.eye(40)
    retrieval = fake_retrieval(owner)
    chosen = [q.asked.caption for q in build_gallery("g", retrieval, scores).text_to_image]
    turned = fake_retrieval(owner)
    turned.captions, turned.examples = retrieval.captions[::-1], retrieval.examples[::-1]
    assert [q.asked.caption for q in build_gallery("g", turned, scores).text_to_image] == chosen
    assert chosen != retrieval.captions[:8]
    assert build_gallery("g", retrieval, scores).worst_text_to_image == []  # all are found first


def test_pictures_and_captions_stay_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert len(picture_uri(Image.fromarray(noise))) < 20_000
    assert shorten("a  b\nc", 10) == "a b c"
    assert shorten("x" * 5000, 160) == "x" * 159 + "…"


def test_the_printed_command_makes_the_same_configuration(config: Config, page: Page) -> None:
    printed = commands(config, Path("runs/a run"))["train"]
    words = shlex.split(printed.replace("\\\n", ""))  # as a shell joins the lines
    assert words[:3] == ["clip-lite", "train", "--config"]
    assert words[-2:] == ["--workdir", "runs/a run"]
    assert load_config(words[3], parse_overrides(words[4:-2])) == config
    quickstart = load_config("configs/quickstart.py")
    command = commands(quickstart, Path("runs/q"))["train"].replace("\\\n", "")
    assert command.split() == (
        ["clip-lite", "train", "--config", "configs/quickstart.py", "--workdir", "runs/q"]
    )
    assert "--config.steps=8" in page.text  # twice as long
    assert "a run' --images" in page.text


def test_without_results_validation_numbers_are_shown_and_said_to_be(copy: Path) -> None:
    (copy / "results.json").unlink()
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 5, "retrieval/held_out/text_to_im')
    page = Page(write_report(copy).read_text())
    assert "no results.json yet" in page.text
    assert "validation split at step 4" in page.text
    values = [json.loads(line) for line in metrics.read_text().splitlines()[:-1]]
    last = [line for line in values if "retrieval/held_out/images" in line][-1]
    (row,) = [r for r in page.rows if r[0].startswith("Held out text")]
    assert row[1].split(" ")[0] == percent(last["retrieval/held_out/text_to_image_r1"])
    # Results of another step are not this checkpoint's.
    (copy / "results.json").write_text(
        json.dumps({"step": 2, "test": {}, "provenance": {}}).replace(
            '"provenance": {}', f'"provenance": {json.dumps(PROVENANCE)}'
        )
    )
    change_config(copy, negatives={"name": "hard"})
    page = Page(write_report(copy).read_text())
    assert "results.json is of step 2" in page.text
    assert "with hard negatives the optimum of T is not log r" in page.text


PROVENANCE = {
    "version": "0",
    "commit": "abc1234",
    "date": "2026-01-01",
    "machine": "Abacus, 2 cores",
    "devices": "1 x cpu",
    "python": "3.11",
    "jax": "0",
}


def test_without_galleries_and_evaluations_the_rest_stands(copy: Path) -> None:
    (copy / "results.json").unlink()
    (copy / "metrics.jsonl").unlink()
    (copy / "skipped.jsonl").unlink()
    nothing = {"retrieval": [], "information_split": "none", "information_test_split": "none"}
    change_config(copy, eval=nothing)
    page = Page(write_report(copy).read_text())
    assert page.sections == ["summary", "data", "cost", "next"]
    assert "Nothing was evaluated" in page.text
    assert "None" not in page.text


def test_published_runs_stand_below_this_one(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = "retrieval/held_out/text_to_image_r10"
    published = {
        "config_name": "tiny",
        "command": "make compare",
        "provenance": PROVENANCE,
        "steps": 9,
        "batch_size": 16,
        "rows": [
            {
                "label": "JSD", "objective": "jsd", "negatives": "shuffle", "seeds": [0, 1, 2],
                "train_seconds": [50.0, 60.0, 70.0], "test": {key: [0.1, 0.2, 0.3]},
            },
            {
                "label": "InfoNCE", "objective": "infonce", "negatives": "all", "seeds": [0],
                "train_seconds": [], "test": {key: [0.5]},
            },
        ],
    }  # fmt: skip
    file = tmp_path / "compare.json"
    monkeypatch.setattr(report_tables, "COMPARE_FILE", file)
    file.write_text(json.dumps(published | {"config_name": "another"}))
    held_out = json.loads((copy / "results.json").read_text())["test"]["retrieval/held_out"]
    measured = report_tables.Measured("test", 4, {"retrieval/held_out": held_out}, "")
    config = tiny_config(Path("pairs.csv"), name="tiny")
    assert report_tables.comparison(config, measured) is None
    file.write_text(json.dumps(published))
    # The results of an earlier version, which had none of what came since.
    results = json.loads((copy / "results.json").read_text())
    for key in ("queries", "tables", "protocols", "seconds", "data_fingerprint"):
        del results[key]
    since = ("_low", "_high", "_map", "_mean_rank")
    results["test"]["retrieval/held_out"] = {
        key: value for key, value in held_out.items() if not key.endswith(since)
    }
    (copy / "results.json").write_text(json.dumps(results))
    page = Page(write_report(copy).read_text())
    assert "comparison" in page.sections
    assert "This run is one seed , and has 4 steps" in page.text
    rows = page.rows[[row[0] for row in page.rows].index("This run jsd, shuffle") :][:3]
    own = percent(held_out["text_to_image_r10"])
    assert [row[3] for row in rows] == [own, f"{percent(0.2)} ± 10.0", percent(0.5)]
    assert [row[2] for row in rows][1:] == ["60 s", "–"]
    assert all(part in page.text for part in ("make compare", "abc1234", "Abacus", "2026-01-01"))


def test_no_run_and_no_checkpoint_are_said(tmp_path: Path, copy: Path) -> None:
    empty = tmp_path / "empty"
    with pytest.raises(CheckpointError, match=r"empty holds no run: there is no config.json"):
        write_report(empty)
    assert not empty.exists()
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        write_report(copy)


def test_curves_average_consecutive_steps_and_say_so() -> None:
    lines = [{"step": s, "loss": float(s % 2), "temperature": 0.1} for s in range(1, 1001)]
    points = binned(lines, "loss")
    assert points is not None
    assert len(points.mean) == BINS
    np.testing.assert_allclose(points.mean, 0.5)
    np.testing.assert_allclose(points.deviation, 0.5)
    loss, temperature = curves(lines, "infonce", hard=False)
    assert "mean of 10 consecutive logged steps" in loss.caption
    assert "2 log 2" not in loss.caption
    assert "Not smoothed" in temperature.caption
    assert curves([], "jsd", hard=False) == []


def test_confidence_interval_and_formats() -> None:
    low, high = Recall(10, 54 / 151, 10 / 151, 302, images=151).interval
    assert (low, high) == pytest.approx((0.2855, 0.4367), abs=2e-4)  # Wilson, by hand
    assert Recall(1, 0.0, 0.1, 5, 5).interval[0] == 0
    assert [percent(x) for x in (0, 0.0025, 0.0662, 1)] == [
        "0.0\u202f%", "0.25\u202f%", "6.6\u202f%", "100.0\u202f%",
    ]  # fmt: skip
    assert [number(x) for x in (-1.5, -1e-9, float("-inf"))] == ["−1.500", "0.000", "−∞"]


def test_the_terminal_shows_each_gallery_beside_chance() -> None:
    shares = {f"{way}_r{k}": 0.25 for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    chances = {f"{name}_chance": 0.05 for name in shares}
    medians = {"text_to_image_median_rank": 3.0, "image_to_text_median_rank": 3.0}
    values = {"images": 200, "captions": 400, **shares, **chances, **medians}
    assert terminal_table({"retrieval/unseen_things": values}).splitlines() == [
        "held-out retrieval  direction      R@10  chance  ratio    N",
        "unseen things       text → image  0.250   0.050  5.0 ×  200",
        "unseen things       image → text  0.250   0.050  5.0 ×  400",
    ]
    assert terminal_table({}) == ""
