"""What several commands read from their arguments."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lite_jax.errors import ConfigError

if TYPE_CHECKING:
    from clip_lite_jax.config import DataConfig
    from clip_lite_jax.places import Place

Subparsers = argparse._SubParsersAction  # it has no public name


def place_of(name: str) -> "Place":
    """The folder of a run: a path or a URL."""
    from clip_lite_jax.places import place

    return place(checked(name))


def local(name: str) -> Path:
    """The folder of a run to read; of one in a bucket a copy."""
    from clip_lite_jax.mirror import local_copy

    return local_copy(checked(name))


def folder_here(option: str, path: Path) -> None:
    """Raises `ConfigError` where a folder to write to was given as a URL."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):  # a path has one slash of a URL's two
        raise ConfigError(f"{option} {path}: write to a folder of this machine")


def checked(name: str) -> str:
    """A path or a URL; raises `ConfigError` where it was meant to be one."""
    if re.match(r"[A-Za-z][\w+.-]+:/(?!/)", name):  # C:/ is a disk
        scheme, _, rest = name.partition(":/")
        raise ConfigError(
            f"{name} is no URL, which has two slashes: {scheme}://{rest}; if it is a folder, "
            f"write ./{name}"
        )
    return name


def data_config(source: str, rest: Sequence[str]) -> "DataConfig":
    """The source with the fields that the command line gives."""
    from clip_lite_jax.config import DataConfig, override, parse_overrides

    data = DataConfig() if source == "mixture" else DataConfig(source=source)
    for name, value in parse_overrides(rest).items():
        if not name.startswith("data."):
            raise ConfigError(f"--config.{name}: only fields of data count here")
        data = override(data, name.removeprefix("data."), value, "data.")
    if source == "mixture" and not data.mixture:
        raise ConfigError("mixture: name its parts with --config.data.mixture='{...}'")
    return data


def positive(text: str) -> int:
    """A whole number above 0, as a type of argparse's."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
