"""What README and docs/ say can be done: commands, Python, tables, names, links, and the site.

A command is parsed by what would run it: `clip_lite_jax.cli`, the Makefile, a launch script with
``--dry_run``.  Python runs in a folder with `stand_ins`.  A new command of others goes to `OTHERS`,
Python that cannot run here to `NOT_RUN`, each with its reason.
"""

import argparse
import ast
import configparser
import csv
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml
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
from launch_scripts import launch

import clip_lite_jax
from clip_lite_jax import cli, config, pretrained
from clip_lite_jax.combinations import check_combination
from clip_lite_jax.commands.arguments import data_config
from clip_lite_jax.config.loading import field_paths
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.models import build_model

OTHERS = {
    "apt-get", "cd", "docker", "gcloud", "git", "hf", "mkdir", "nvidia-smi", "python", "source",
    "ssh-add", ".venv/bin/pre-commit",
}  # fmt: skip
"""Programs of others, and of the shell: of their words only paths of ours are checked."""

NOT_RUN = {
    "torch.save": "needs torch",
    'torch.library.Library("torchvision"': "needs torch",
}
"""Python blocks that are compiled and not run: what they hold, and why."""

DEFAULTS = config.Config(steps=100, batch_size=64)
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


def test_commands_within_text() -> None:
    """``make NAME`` and the like in inline code; those with an ellipsis are parts of commands."""
    wrong, found = [], 0
    for page in PAGES:
        for line, token in inline(page):
            text = token.content.strip()
            if token.type != "code_inline" or not IN_TEXT.match(text) or "…" in text:
                continue
            found += 1
            try:
                for words in split_commands(text):
                    check_mention(words)
            except (AssertionError, ValueError, clip_lite_jax.errors.UserError) as error:
                wrong.append(f"{page.relative_to(ROOT)}:{line}: {text}: {error}")
    assert wrong == []
    assert found > 50


IN_TEXT = re.compile(r"make [a-z-]+$|python -m \S|pip install \S|clip-lite [a-z]|--config\.[a-z]")


def check_mention(words: Sequence[str]) -> None:
    """As `check_command`; a subcommand of ``clip-lite`` alone, or a field alone, is enough."""
    if words[:3] == ["python", "-m", "clip_lite_jax.main"]:
        words = ["clip-lite", "train", *words[3:]]
    if words[0].startswith("--config.") and words[1:] == [] and "=" not in words[0]:
        assert has_field(DEFAULTS, words[0].removeprefix("--config.")), "no such field"
        return
    if words[0] != "clip-lite":
        check_command(words)
        return
    parser, rest = cli._parser(), list(words[1:])
    while choices := subcommands(parser):
        assert rest, f"clip-lite has {', '.join(choices)}"
        name = rest.pop(0)
        if name.startswith("-"):
            break
        assert name in choices, f"clip-lite has no {name}"
        parser = choices[name]
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
        known = flag.startswith("--config.") or flag in parser._option_string_actions
        assert known, f"{' '.join(words)}: no {flag}"


def subcommands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return found[0].choices if found else {}


def check_command(words: Sequence[str]) -> None:
    """Raises unless the command exists, and takes these arguments."""
    program, *arguments = words
    if program.startswith("--config."):  # fields, to be added to a command
        overridden(words)
    elif program in ("clip-lite", ".venv/bin/clip-lite"):
        check_clip_lite(arguments)
    elif program == "make":
        check_make(arguments)
    elif program.startswith("launch/"):
        action = [] if "--dry_run" in arguments else ["--dry_run"]
        done = launch(program.removeprefix("launch/"), *action, *arguments)
        assert done.returncode == 0, done.stderr
    elif program in ("pip", ".venv/bin/pip") or list(words[1:3]) == ["-m", "pip"]:
        check_pip(arguments)
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    elif program == "sudo":
        check_command(arguments)
    else:
        assert program in OTHERS, f"{program} is not known: {' '.join(words)}"
    for word in words:
        path = re.sub(r"(\.py):\w+$", r"\1", word.rpartition("=")[2])
        if re.match(rf"(?:{'|'.join(sorted(TOP))})/", path):
            assert (ROOT / path).exists(), f"{path} is not in the repository"


TOP = {"benchmarks", "clip_lite_jax", "configs", "launch", "tests", "tools"}


def check_clip_lite(arguments: Sequence[str]) -> None:
    if arguments[-1:] == ["--help"]:
        check_mention(["clip-lite", *arguments])
        return
    try:
        known, rest = cli._parser().parse_known_args(arguments)
    except SystemExit as error:
        raise AssertionError(f"clip-lite does not take {arguments}") from error
    if not getattr(known, "takes_fields", False):
        assert rest == [], f"clip-lite {known.command} does not take {rest}"
    elif "config" in known:
        check_run(config.load_config(known.config, config.parse_overrides(rest)))
    elif "source" in known:
        data_config(known.source, rest)
    else:
        config.parse_overrides(rest)


def check_run(run: config.Config) -> None:
    """Raises where parts of a configuration do not go together, or options are not known."""
    check_combination(run.objective, run.negatives, run.batch_size, run.accumulate)
    build_model(run.model, run.data.image_size, 30_000, run.data.max_tokens, run.objective)


def overridden(words: Sequence[str]) -> config.Config:
    """A configuration with these fields set; rules between fields are not asked."""
    changed = DEFAULTS
    for name, value in config.parse_overrides(words).items():
        changed = config.override(changed, name, value)
    return changed


def check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, equals, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} *\??:?=" if equals else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"


def check_pip(arguments: Sequence[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    words = list(arguments[arguments.index("install") + 1 :])
    while words:
        word = words.pop(0)
        if word == "-r":
            assert (ROOT / words[0]).is_file(), words[0]
            words.pop(0)
        elif match := re.fullmatch(r"(?:\.|clip[-_]lite[-_]jax)(?:\[(.*)\])?", word):
            for extra in filter(None, (match[1] or "").split(",")):
                assert setup.has_option("options.extras_require", extra), f"no extra {extra}"
        elif not word.startswith("-"):
            name = re.split(r"[<>=\[]", word)[0]
            assert name in (ROOT / "setup.cfg").read_text(), f"{name} is not in setup.cfg"


def check_module(module: str, arguments: Sequence[str]) -> None:
    if module == "clip_lite_jax.main":
        check_clip_lite(["train", *arguments])
    elif module != "venv":
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert file.is_file(), f"{file.relative_to(ROOT)} is not there"
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert flag in flags_of(file), f"{module} has no {flag}"


@cache
def flags_of(file: Path) -> set[str]:
    calls = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call))
    named = (c.args for c in calls if getattr(c.func, "attr", "") == "add_argument")
    return {a.value for args in named for a in args if isinstance(a, ast.Constant)}


@pytest.fixture(scope="module")
def stand_ins(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that Python on the pages reads: small runs, pictures, a table."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "pictures").mkdir()
    for name, shape, colour in (("cat", "circle", "red"), ("tree", "triangle", "green")):
        draw(shape, colour).save(folder / f"{name}.png")
        draw(shape, colour).save(folder / "pictures" / f"{name}.png")
    (folder / "pairs.csv").write_text("image,caption\ncat.png,a cat\ntree.png,a tree\n")
    (folder / "runs").mkdir()
    for run in ("quickstart", "mine", "plain"):
        (folder / "runs" / run).symlink_to(finished_run)
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


def has_field(section: Any, name: str) -> bool:
    head, _, tail = name.partition(".")
    if not hasattr(section, head):
        return False
    value = getattr(section, head)
    return not tail or isinstance(value, dict) or has_field(value, tail)


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


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("warn|error", done.stderr, re.IGNORECASE), done.stderr
    page = (tmp_path / "site" / "reference" / "objectives.html").read_text()
    assert "E_P[sp(-T)]" in page  # the docstring of `jsd`
    for html in (tmp_path / "site").rglob("*.html"):
        assert not LOADS.search(html.read_text()), f"{html.name} loads something from elsewhere"


LOADS = re.compile(
    r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//'
    r'|<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(?:https?:)?//'
)


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
