"""Whether a command of the documentation exists and takes its arguments.

Each is parsed by what would run it: `clip_lite_jax.cli` and the configuration, the Makefile,
setup.cfg, the source of a module, or a launch script with ``--dry_run``.
"""

import argparse
import ast
import configparser
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from doc_blocks import ROOT
from launch_scripts import launch

from clip_lite_jax import cli, config
from clip_lite_jax.combinations import check_combination
from clip_lite_jax.commands import evaluate
from clip_lite_jax.commands.arguments import data_config
from clip_lite_jax.models import build_model

DEFAULTS = config.Config(steps=100, batch_size=64)

OTHERS = {
    "apt-get", "cd", "docker", "gcloud", "git", "hf", "mkdir", "nvidia-smi", "python", "source",
    "ssh-add", ".venv/bin/pre-commit",
}  # fmt: skip
"""Programs of others, and of the shell: of their words only paths of ours are checked."""


PASS_ON = ("clip_lite_jax.apps.open_clip_model",)
"""Modules that hand their arguments to a program of others."""


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


TOP = {"benchmarks", "clip_lite_jax", "configs", "launch", "notebooks", "tests", "tools"}


def check_clip_lite(arguments: Sequence[str]) -> None:
    if arguments[-1:] == ["--help"]:
        check_mention(["clip-lite", *arguments])
        return
    try:
        known, rest = cli._parser().parse_known_args(arguments)
    except SystemExit as error:
        if error.code == 0:  # it has printed a list
            return
        raise AssertionError(f"clip-lite does not take {arguments}") from error
    if not getattr(known, "takes_fields", False):
        assert rest == [], f"clip-lite {known.command} does not take {rest}"
    elif "config" in known:
        check_run(config.load_config(known.config, config.parse_overrides(rest)))
    elif "source" in known:
        data_config(known.source, rest)
    elif known.command == "eval":
        evaluate._requests(known.tasks, rest)
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
        flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        for flag in flags if module not in PASS_ON else ():
            assert flag in flags_of(file), f"{module} has no {flag}"


@cache
def flags_of(file: Path) -> set[str]:
    calls = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call))
    named = (c.args for c in calls if getattr(c.func, "attr", "") == "add_argument")
    return {a.value for args in named for a in args if isinstance(a, ast.Constant)}


def has_field(section: Any, name: str) -> bool:
    head, _, tail = name.partition(".")
    if not hasattr(section, head):
        return False
    value = getattr(section, head)
    return not tail or isinstance(value, dict) or has_field(value, tail)
