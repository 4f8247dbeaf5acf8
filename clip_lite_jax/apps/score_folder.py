"""The folder that `clip-lite score` writes to: its own, or an empty one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_lite_jax.apps.encoding import only_one
from clip_lite_jax.errors import ConfigError, UserError
from clip_lite_jax.files import read_json, write_atomic

MARK_FILE = "score.json"
FORMAT = "clip-lite score 1"


@contextmanager
def folder_of_scores(folder: Path) -> Iterator[None]:
    """Makes a folder and marks it; keeps other processes from writing to it meanwhile.

    Raises:
      ConfigError: it holds something else, which stays untouched, or it cannot be written.
    """
    _check(folder)
    with only_one(folder):
        _check(folder)
        write_atomic(folder / MARK_FILE, json.dumps({"format": FORMAT}) + "\n")
        yield


def _check(folder: Path) -> None:
    try:
        others = [other.name for other in folder.iterdir() if other.name != ".lock"]
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error.strerror}") from error
    if others and not _is_marked(folder):
        raise ConfigError(
            f"--out {folder} is not empty ({min(others)}), and `clip-lite score` has not made it: "
            "choose another folder"
        )


def _is_marked(folder: Path) -> bool:
    try:
        known = read_json(folder / MARK_FILE)
    except UserError:
        return False
    return isinstance(known, dict) and known.get("format") == FORMAT
