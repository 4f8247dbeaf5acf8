"""What README and docs/ say can be done: commands, Python, tables, names, links, and the site.

Commands are checked by `doc_commands`, where new programs of others go to `OTHERS`.  Python runs in
a folder with `stand_ins`; what cannot run here goes to `NOT_RUN`, with its reason.
"""

import ast
import csv
import http.server
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml
from browser import open_browser
from conftest import draw
from doc_blocks import (
    PAGES,
    ROOT,
    SAMPLES,
    Block,
    anchors,
    blocks,
    commands,
    inline,
    links,
    split_commands,
)
from doc_commands import DEFAULTS, TOP, check_command, check_mention, has_field

import clip_lite_jax
from clip_lite_jax import config, pretrained
from clip_lite_jax.apps.index_build import build_index
from clip_lite_jax.config.loading import field_paths
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources

NOT_RUN = {
    "torch.save": "needs torch",
    'torch.library.Library("torchvision"': "needs torch",
    "import open_clip_model": "needs torch",
}
"""Python blocks that are compiled and not run: what they hold, and why."""

BLOCKS = blocks()
SHELL = [block for block in BLOCKS if block.kind == "shell"]
PYTHON = [block for block in BLOCKS if block.kind == "python"]
TABLES = [block for block in BLOCKS if block.kind == "csv"]


def test_every_block_says_what_it_is() -> None:
    known = {"shell", "python", "csv", "listing", *SAMPLES}
    assert [str(block) for block in BLOCKS if block.kind not in known] == []
    assert len(SHELL) > 50
    assert len(PYTHON) > 8


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_of_blocks(block: Block) -> None:
    for words in commands(block):
        check_command(words)


@pytest.mark.parametrize(
    "wrong",
    [
        "clip-lite serach --model runs/quickstart --images pictures fruit",
        "clip-lite search --model runs/quickstart --folder pictures fruit",
        "clip-lite train --config configs/my_pears.py --workdir runs/mine",
        "clip-lite train --config configs/my_pairs.py --workdir runs/mine --config.step=3",
        "clip-lite config --config configs/my_pairs.py --config.model.image.name=resnet18",
        "clip-lite data check pairs.csv --config.data.captoin_columns=title",
        "python -m clip_lite_jax.main --config configs/quickstart.py",
        "python -m benchmarks.nothing",
        "python -m benchmarks.one_negative --quickly",
        "make quikstart",
        "make PYTHN=python3 quickstart",
        "pip install '.[tpus]'",
        "pip install -r requirements-nothing.txt",
        "launch/local.sh 2 --device=2 --config configs/quickstart.py --workdir runs/two",
        "docker build --file launch/Dockerfiles .",
        "conda install jax",
        "--config.optim.learning_rates=3",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    (words,) = split_commands(wrong)
    with pytest.raises((AssertionError, clip_lite_jax.errors.UserError)):
        check_command(words)


def test_commands_within_text() -> None:
    """``make NAME`` and the like in inline code, where it is more than a part of a command."""
    wrong, found = [], 0
    for page in PAGES:
        for line, token in inline(page):
            text = token.content.strip()
            if token.type != "code_inline" or not IN_TEXT.match(text) or PART.search(text):
                continue
            found += 1
            try:
                for words in split_commands(text):
                    check_mention(words)
            except (AssertionError, ValueError, clip_lite_jax.errors.UserError) as error:
                wrong.append(f"{page.relative_to(ROOT)}:{line}: {text}: {error}")
    assert wrong == []
    assert found > 50


PART = re.compile("…|FIELD")
IN_TEXT = re.compile(r"make [a-z-]+$|python -m \S|pip install \S|clip-lite [a-z]|--config\.[a-z]")


@pytest.fixture(scope="module")
def stand_ins(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that Python on the pages reads: small runs, pictures, a table, an index."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "pictures").mkdir()
    for name, shape, colour in (("cat", "circle", "red"), ("tree", "triangle", "green")):
        draw(shape, colour).save(folder / f"{name}.png")
        draw(shape, colour).save(folder / "pictures" / f"{name}.png")
    (folder / "pairs.csv").write_text("image,caption\ncat.png,a cat\ntree.png,a tree\n")
    (folder / "runs").mkdir()
    for run in ("quickstart", "mine", "plain", "warm_start"):
        (folder / "runs" / run).symlink_to(finished_run)
    pictures = config.DataConfig(source=str(folder / "pictures"))
    build_index(clip_lite_jax.load(finished_run), pictures, folder / "pictures.index")
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_of_blocks(
    block: Block, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile(block.text, str(block), "exec")
    if any(part in block.text for part in NOT_RUN):
        return
    here = tmp_path / "here"
    shutil.copytree(stand_ins, here, symlinks=True)
    monkeypatch.chdir(here)
    load = inspect.signature(pretrained.load_clip_lite)

    def load_small(*arguments: object, **named: object) -> clip_lite_jax.DualEncoderModel:
        """Published checkpoints are large, and `test_clip_lite_import` reads them."""
        load.bind(*arguments, **named)
        return clip_lite_jax.load("runs/quickstart")

    monkeypatch.setattr(pretrained, "load_clip_lite", load_small)
    rng = np.random.default_rng(0)
    names = {
        "images": rng.standard_normal((2, 16, 16, 3)).astype(np.float32),
        "ids": np.ones((2, 8), np.int32),
        "mask": np.ones((2, 8), bool),
        **{name: getattr(config, name) for name in config.__all__},
    }
    exec(code, names)


@pytest.mark.parametrize("block", TABLES, ids=str)
def test_tables_of_blocks(block: Block, tmp_path: Path) -> None:
    rows = list(csv.DictReader(block.text.splitlines()))
    for name in {row["image"] for row in rows}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        draw("circle", "red").save(tmp_path / name, format="PNG")
    (tmp_path / "pairs.csv").write_text(block.text)
    columns = tuple(name for name in ("caption", "name", "description") if name in rows[0])
    data = config.DataConfig(source=str(tmp_path / "pairs.csv"), caption_columns=columns)
    bad = BadExamples()
    read = [
        source[i]
        for source in build_sources(data, bad, training=False).values()
        for i in range(len(source))
    ]
    assert len(bad) == 0
    assert {e.id for e in read} == {row["image"] for row in rows}
    assert {c for e in read for c in e.captions} == {row[c] for row in rows for c in columns}


def test_names_within_text() -> None:
    """Fields of the configuration and paths of the repository in inline code are there."""
    wrong, found = [], 0
    for page in PAGES:
        for line, token in inline(page):
            text = token.content
            if token.type != "code_inline":
                continue
            if match := FIELD.fullmatch(text):
                found += 1
                good = has_field(DEFAULTS, match[0].partition("=")[0])
            elif PATH.fullmatch(text) and not OF_OTHERS.fullmatch(text):
                found += 1
                good = any(ROOT.glob(text.rstrip("/"))) or any((ROOT / "clip_lite_jax").glob(text))
            else:
                continue
            if not good:
                wrong.append(f"{page.relative_to(ROOT)}:{line}: {text}")
    assert wrong == []
    assert found > 150


SECTIONS = "|".join(f.name for f in fields(DEFAULTS) if is_dataclass(getattr(DEFAULTS, f.name)))
FIELD = re.compile(rf"(?:{SECTIONS})\.(?!safetensors|pth|pkl|py)[a-z_][\w.]*(?:=.*)?")
PATH = re.compile(rf"(?:{'|'.join(sorted(TOP))}|docs)/(?![A-Z]+\b)[\w./*-]+")
OF_OTHERS = re.compile(r"configs/(?:sbert|done)\b.*")
"""Paths in the repository of the paper's authors."""


def test_links_lead_somewhere() -> None:
    wrong = []
    for page in PAGES:
        for line, target in links(page):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            there = file.exists() and (not anchor or anchor in anchors(file))
            if not there:
                wrong.append(f"{page.relative_to(ROOT)}:{line}: {target}")
    assert wrong == []


def test_every_page_is_in_the_navigation() -> None:
    def pages(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [
            page
            for part in (nav.values() if isinstance(nav, dict) else nav)
            for page in pages(part)
        ]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(there)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("warn|error", done.stderr, re.IGNORECASE), done.stderr
    return folder


def test_the_site_holds_the_reference(site: Path) -> None:
    page = (site / "reference" / "objectives.html").read_text()
    assert "E_P[sp(-T)]" in page  # the docstring of `jsd`
    for html in site.rglob("*.html"):
        assert not LOADS.search(html.read_text()), f"{html.name} loads something from elsewhere"


LOADS = re.compile(
    r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//'
    r'|<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(?:https?:)?//'
)


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The address of the site, on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_site_in_a_browser(served: str) -> None:
    """Nothing comes from elsewhere, no page is wider than a telephone, and the search finds."""
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for name in (
            "index",
            "mathematics",
            "objectives",
            "how_to/product_photos",
            "reference/data",
        ):
            page.goto(f"{served}/{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            broken = (
                "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
            )
            assert page.evaluate(broken) == []
        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(f"{served}/index.html")
        page.locator(".md-search__input").fill("certified bound")
        page.locator(".md-search-result__link", has_text="The mathematics").first.wait_for()
    assert wrong == []
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []


def test_fields_are_leaves() -> None:
    """`has_field` agrees with the configuration's own list of its fields."""
    assert all(has_field(DEFAULTS, path) for path in field_paths(DEFAULTS))
    assert not has_field(DEFAULTS, "data.image_sise")


def test_the_notebook_is_clean_and_compiles() -> None:
    """`tests/long/test_notebook.py` runs it; outputs are left out, so that changes can be read."""
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(cells) > 3
        assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
        code = "\n".join(cell.source for cell in cells)
        imports = [n for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), file.name, "exec"), {})
        for cell in notebook.cells:
            for target in re.findall(r"\]\(([^)#:]+)\)", cell.source):
                assert (file.parent / target).exists(), target
