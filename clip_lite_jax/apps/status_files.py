"""The files of a run, read while it writes them, whole or not, and whoever has written them."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from clip_lite_jax.files import CHECKPOINTS
from clip_lite_jax.manifest import MANIFEST, problem_of

LARGEST = 2**20
"""Bytes of a file that is read whole: ours have a few thousand."""
LONGEST = 1000
"""Characters of a text."""
TAIL = 4 * 2**20
"""Bytes of ``metrics.jsonl`` that are read, at its end."""
WINDOW = 50
"""Lines of which a mean of the loss is taken."""
EVALUATIONS = ("retrieval/", "information/")


class Fields:
    """Values of JSON that anybody may have written: each is of its type, or else is not there."""

    def __init__(self, content: object) -> None:
        self.content = content

    def get(self, *names: str) -> object:
        value = self.content
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def text(self, *names: str) -> str:
        value = self.get(*names)
        return value[:LONGEST] if isinstance(value, str) else ""

    def texts(self, *names: str) -> list[str]:
        value = self.get(*names)
        is_it = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return list(value) if is_it else []  # type: ignore[call-overload]

    def count(self, *names: str) -> int | None:
        value = self.get(*names)
        is_it = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
        return int(value) if is_it else None  # type: ignore[call-overload]

    def number(self, *names: str) -> float | None:
        return finite(self.get(*names))

    def moment(self, *names: str) -> float | None:
        """A date and time, as seconds since 1970."""
        try:
            return datetime.fromisoformat(self.text(*names)).timestamp()
        except (ValueError, OverflowError, OSError):
            return None

    def numbers(self) -> dict[str, float]:
        items = self.content.items() if isinstance(self.content, dict) else ()
        found = ((name, finite(value)) for name, value in items)
        return {name: value for name, value in found if value is not None}


def finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def iso(moment: float | None) -> str | None:
    """Seconds since 1970 as date and time, in UTC."""
    if moment is None:
        return None
    try:
        return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None


def read(path: Path) -> tuple[Fields, str]:
    """The content of a small file of JSON, and what is wrong with it; without a file neither."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            return Fields(None), f"{path.name} is not used: more than {LARGEST:,} bytes"
        content = json.loads(data)
    except FileNotFoundError:
        return Fields(None), ""
    except (OSError, ValueError, RecursionError) as error:
        return Fields(None), f"{path.name} is not used: {error}"
    if not isinstance(content, dict):
        return Fields(None), f"{path.name} is not used: {type(content).__name__}, not an object"
    return Fields(content), ""


def changed(path: Path) -> float | None:
    """When a file was last written, in seconds since 1970; None where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def last_lines(path: Path) -> list[dict[str, float]]:
    """The numbers of the last lines of ``metrics.jsonl``, `TAIL` bytes of them at most."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL, 0))
            lines = file.read(TAIL).split(b"\n")
    except OSError:
        return []
    parsed = []
    for line in lines[size > TAIL :]:  # the first is cut, as may be the last
        try:
            numbers = Fields(json.loads(line)).numbers()
        except (ValueError, RecursionError):
            continue
        if "step" in numbers:
            parsed.append(numbers)
    return parsed


def count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(part.count(b"\n") for part in iter(lambda: file.read(2**20), b""))
    except OSError:
        return 0


def latest(lines: Sequence[dict[str, float]]) -> dict[str, float]:
    """The newest value of every number of training among the last `WINDOW` lines."""
    found: dict[str, float] = {}
    for line in lines[-WINDOW:]:
        found |= {name: value for name, value in line.items() if not name.startswith(EVALUATIONS)}
    return found


def evaluation(lines: Iterable[dict[str, float]]) -> tuple[int | None, dict[str, float]]:
    """Step and numbers of the newest evaluation."""
    for line in reversed(list(lines)):
        numbers = {name: x for name, x in line.items() if name.startswith(EVALUATIONS)}
        if numbers:
            return int(line["step"]), numbers
    return None, {}


def trend(lines: Sequence[dict[str, float]]) -> dict[str, Any] | None:
    """Where the loss goes: the mean of the newest lines beside that of as many before them.

    It is flat where they differ by less than twice the standard error of their difference.
    """
    losses = [line["loss"] for line in lines if "loss" in line][-2 * WINDOW :]
    half = len(losses) // 2
    if half < 2:
        return None
    old, new = losses[-2 * half : -half], losses[-half:]
    error = math.sqrt((variance(old) + variance(new)) / half)
    difference = fmean(new) - fmean(old)
    goes = "flat" if abs(difference) <= 2 * error else "rising" if difference > 0 else "falling"
    return {"direction": goes, "lines": half, "mean": fmean(new), "mean_before": fmean(old)}


def checkpoints(workdir: Path, verify: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The checkpoints, the newest first, and the names of folders that are none.

    With `verify` every file of a sealed one is read, and ``problem`` says what is wrong with it.
    """
    try:
        names = os.listdir(workdir / CHECKPOINTS)
    except OSError:
        return [], []
    steps = sorted((n for n in names if n.isascii() and n.isdecimal()), key=int, reverse=True)
    found = (_checkpoint(workdir / CHECKPOINTS / name, verify) for name in steps)
    others = sorted(n for n in names if ".damaged" in n or ".orbax-checkpoint-tmp" in n)
    return [one for one in found if one is not None], others


def _checkpoint(folder: Path, verify: bool) -> dict[str, Any] | None:
    """What is to be said of one; None where it has just been deleted."""
    sealed = changed(folder / MANIFEST)
    try:
        problem = problem_of(folder) if verify and sealed is not None else ""
    except (OSError, AttributeError, TypeError, ValueError, LookupError) as error:
        problem = f"{MANIFEST} or a file of it cannot be read: {error}"
    time = changed(folder) if sealed is None else sealed
    if time is None:
        return None
    return {
        "step": int(folder.name),
        "time": iso(time),
        "bytes": _size(folder),
        "sealed": sealed is not None,
        "problem": problem,
    }


def _size(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):  # which passes over what is deleted meanwhile
        for name in names:
            try:
                size += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return size
