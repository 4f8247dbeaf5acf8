"""Prompts and names of classes for zero-shot classification: OpenAI's, or a user's."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from clip_lite_jax.errors import ConfigError

FILE = Path(__file__).parent / "prompts.json"
MAX_BYTES = 10_000_000
"""Of a list that a user gives; 100,000 long lines."""


@cache
def published() -> Mapping[str, Any]:
    """What CLIP's authors published, in ``prompts.json``: ``templates`` by the name of their set,
    ``imagenet``, the name of each ``wnid``; and ``source``, ``licence`` and ``notice``."""
    content: Mapping[str, Any] = json.loads(FILE.read_text("utf-8"))
    return content


def templates(name: str) -> tuple[str, ...]:
    """The prompts of a published set, or those of a file, one on each line, ``{}`` for the class.

    Raises:
      ConfigError: neither a set nor a file, or a line without ``{}``.
    """
    sets = published()["templates"]
    if name in sets:
        return tuple(sets[name])
    if not Path(name).is_file():
        raise ConfigError(
            f"prompts={name!r}: choose from {', '.join(sets)}, or give a file with one a line"
        )
    found = tuple(_lines("prompts", name))
    if wrong := [line for line in found if "{}" not in line]:
        raise ConfigError(f"prompts={name!r}: no {{}} for the class in {wrong[0]!r}")
    return found


def with_digest(path: str, content: Iterable[str]) -> str:
    """For a protocol: the name of a file with a digest of what it says, which two files of one name
    do not share."""
    digest = hashlib.blake2b("\n".join(content).encode(errors="surrogatepass"), digest_size=6)
    return f"{Path(path).name} {digest.hexdigest()}"


def names_from_file(path: str) -> dict[str, list[str]]:
    """Names by class: a line is ``name``, or ``class=name``; a class may have several lines.

    Raises:
      ConfigError: no such file, or an empty name.
    """
    found: dict[str, list[str]] = {}
    for line in _lines("classes", path):
        label, equals, name = line.partition("=")
        label, name = label.strip(), name.strip() if equals else line
        if not label or not name:
            raise ConfigError(f"classes={path!r}: {line!r} is no name, nor class=name")
        found.setdefault(label, []).append(name)
    return found


def names_of(classes: Sequence[str]) -> dict[str, list[str]]:
    """OpenAI's name of a ``wnid``; else the class itself, underscores as spaces."""
    known = published()["imagenet"]
    return {label: [known.get(label) or label.replace("_", " ").strip()] for label in classes}


def shown(classes: Sequence[str]) -> list[str]:
    """Classes as tables name them: a ``wnid`` together with OpenAI's name."""
    known = published()["imagenet"]
    return [f"{label} {known[label]}" if label in known else label for label in classes]


def _lines(field: str, path: str) -> list[str]:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}={path!r} cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{field}={path!r}: over {MAX_BYTES:,} bytes are no list of names")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{field}={path!r} is empty")
    return lines
