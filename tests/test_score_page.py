"""The review page in a browser: keys, what is kept, the export, and the source without it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import open_browser
from scored import write_faulty

from clip_lite_jax import load
from clip_lite_jax.apps import score_pieces
from clip_lite_jax.apps.score import Settings, score
from clip_lite_jax.apps.score_page import write_page
from clip_lite_jax.cli import main
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.image_ops import Opened


@pytest.fixture(scope="module")
def page_file(pairs: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("review")
    table = write_faulty(pairs, folder / "faulty")
    command = ["score", "--model", str(finished_run), str(table), "--out", str(folder / "out")]
    assert main([*command, "--no-near", "--show", "8"]) == 0
    return folder / "out" / "review.html"


def said(page: Any) -> str:
    return page.locator("#said").text_content()


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id")


def decide(page: Any) -> None:
    """Keys on the first cards: one dropped, one kept, one undone."""
    cards = page.locator(".card").count()
    answers = page.locator(".card .answer")
    assert page.locator("#export").is_disabled()
    page.keyboard.press("d")  # the first goes, and the second has the focus
    assert answers.nth(0).text_content() == "dropped"
    assert focused(page) == "c1"
    assert said(page) == f"dropped; card 2 of {cards}"
    page.keyboard.press("a")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "c1"
    assert answers.nth(1).text_content() == "kept"
    assert page.locator("#count").text_content() == f"2 of {cards} decided, 1 pair dropped"
    page.keyboard.press("n")  # the next that is open
    assert focused(page) == "c2"
    page.keyboard.press("d")
    page.keyboard.press("u")
    assert answers.nth(2).text_content() == "not decided"
    assert focused(page) == "c2"
    page.keyboard.press("Control+d")  # the browser's own
    assert answers.nth(2).text_content() == "not decided"


def decide_about_copies(page: Any) -> None:
    """Of three equal files all but the best go, and a key takes one back."""
    copies = page.locator(".card", has=page.locator(".item:nth-child(3)"))
    assert copies.count() == 1
    copies.locator(".drop").click()
    assert copies.locator(".answer").text_content() == "2 of 3 dropped"
    copies.focus()
    page.keyboard.press("2")
    assert copies.locator(".answer").text_content() == "1 of 3 dropped"
    assert copies.locator(".toggle").nth(1).get_attribute("aria-pressed") == "false"


def test_a_review_from_the_first_key_to_the_clean_source(page_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "decisions.json"
    with open_browser() as browser:
        page = browser.new_page()
        problems: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        assert page.title().startswith("Review: ")  # no caption has run
        decide(page)
        decide_about_copies(page)
        page.reload()
        answers = page.locator(".card .answer").all_text_contents()
        assert answers[:3] == ["dropped", "kept", "not decided"]
        assert page.locator("#count").text_content() == (
            f"3 of {len(answers)} decided, 2 pairs dropped"
        )
        with page.expect_download() as download:
            page.keyboard.press("e")
        assert download.value.suggested_filename == "decisions.json"
        download.value.save_as(file)
        first = page.locator(".card .id").first.text_content()
        assert problems == []
        assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}
    made = json.loads(file.read_text())
    gone = [d["id"] for d in made["decisions"] if d["drop"]]
    assert gone[2:] == ["torn.png"]
    assert len(made["decisions"]) == 1 + 1 + 3 + 1
    assert gone[0] == first.partition(" · ")[2]
    table, out = page_file.parents[1] / "faulty" / "faulty.csv", tmp_path / "clean"
    assert main(["score", str(table), "--out", str(out), "--decisions", str(file)]) == 0
    lines = (out / "clean.jsonl").read_text().splitlines()
    left = {json.loads(line)["image"] for line in lines}
    assert len(left) == 56 - 3
    assert not left & set(gone)


def test_the_page_without_what_a_browser_may_lack(page_file: Path) -> None:
    """What was stored is damaged; and on a telephone nothing is wider than it."""
    with open_browser() as browser:
        context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme="dark")
        page = context.new_page()
        page.goto(page_file.as_uri())
        store = page.evaluate("JSON.parse(document.getElementById('data').textContent).store")
        page.evaluate(
            "([key, value]) => localStorage.setItem(key, value)",
            [store, '{"answers": {"0": [7], "1": "x", "99": [0], "2": []}, "history": []}'],
        )
        page.reload()
        answers = page.locator(".card .answer").all_text_contents()
        assert answers[:3] == ["not decided", "not decided", "kept"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("u")
        assert said(page) == "nothing to undo"
        # Buttons and images have names, and one card alone is in the order of the tab key.
        assert page.locator("img:not([alt])").count() == 0
        assert page.locator(".card[tabindex='0']").count() == 1
        context.close()


def test_two_captions_that_were_exchanged_go_together(
    pairs: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the table to the clean one, with a critic that knows what each picture shows."""
    swapped = ["blue_cross.png", "pink_ring.png"]
    table = write_exchanged(pairs, tmp_path / "exchanged", *swapped)
    told = {path.stem.replace("_", " "): number for number, path in enumerate(drawings(pairs))}
    model = load(finished_run)
    seen = {model.pixels.view(Opened(p.read_bytes())).tobytes(): p for p in drawings(pairs)}
    assert len(seen) == len(told) == 48
    meaning = np.random.default_rng(0).normal(size=(48, 512)).astype(np.float32)
    meaning /= np.linalg.norm(meaning, axis=1, keepdims=True)

    def image(fns: object, pixels: np.ndarray, size: int) -> np.ndarray:
        shown = [seen[view.tobytes()].stem.replace("_", " ") for view in pixels]
        return meaning[[told[name] for name in shown]]

    def text(fns: object, tokenizer: object, captions: list[str], size: int) -> np.ndarray:
        return meaning[[told[caption.removeprefix("a ")] for caption in captions]]

    monkeypatch.setattr(score_pieces, "encode_images", image)
    monkeypatch.setattr(score_pieces, "encode_captions", text)
    model.fns = replace(
        model.fns, pairs=lambda i, t: 12 * (i * t).sum(axis=1), matrix=lambda i, t: 12 * i @ t.T
    )
    out = tmp_path / "out"
    found = score(model, DataConfig(source=str(table)), out, Settings(calibration=False))
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    known = [row for row in rows if row["swap_with"] is not None]
    partners = {row["id"]: rows[row["swap_with"]]["id"] for row in known}
    assert partners == dict(zip(swapped, reversed(swapped), strict=True))
    assert json.loads((out / "findings.json").read_text())["swaps"] == 1
    file = tmp_path / "decisions.json"
    with open_browser() as browser:
        page = browser.new_page()
        page.goto(write_page(found, out, show=100).as_uri())
        card = page.locator("section", has_text="Swapped captions").locator(".card")
        assert card.count() == 1
        shown = card.locator(".id").all_text_contents()
        assert sorted(id.rpartition(" · ")[2] for id in shown) == swapped
        button = card.get_by_role("button", name="Drop both")
        button.click()
        assert card.locator(".answer").text_content() == "dropped"
        with page.expect_download() as download:
            page.locator("#export").click()
        download.value.save_as(file)
    clean = tmp_path / "clean"
    assert main(["score", str(table), "--out", str(clean), "--decisions", str(file)]) == 0
    lines = (clean / "clean.jsonl").read_text().splitlines()
    left = sorted(json.loads(line)["image"] for line in lines)
    assert left == [path.name for path in drawings(pairs) if path.name not in swapped]


def drawings(pairs: Path) -> list[Path]:
    return sorted(pairs.parent.glob("*.png"))


def write_exchanged(pairs: Path, folder: Path, one: str, other: str) -> Path:
    """The pictures of `pairs` with a caption each, those of two exchanged."""
    shutil.copytree(pairs.parent, folder)
    captions = {path.name: f"a {path.stem.replace('_', ' ')}" for path in drawings(pairs)}
    captions[one], captions[other] = captions[other], captions[one]
    lines = [f"{name},{caption}\n" for name, caption in captions.items()]
    table = folder / "exchanged.csv"
    table.write_text("image,caption\n" + "".join(lines))
    return table
