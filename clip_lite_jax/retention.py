"""Which checkpoints there are, and which stay: the newest, the best, and every so many."""

import itertools
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from clip_lite_jax.config import CheckpointConfig
from clip_lite_jax.manifest import MANIFEST, numbers_of

log = logging.getLogger(__name__)


def folders_of_steps(folder: Path) -> list[Path]:
    """The folders of steps, in their order."""
    paths = [path for path in folder.glob("*") if path.name.isdigit()]
    return sorted(paths, key=lambda path: int(path.name))


def sealed(folder: Path) -> dict[int, dict[str, float]]:
    """The steps that are sealed, in their order, and the numbers of their evaluations."""
    paths = [path for path in folders_of_steps(folder) if (path / MANIFEST).exists()]
    return {int(path.name): numbers_of(path) for path in paths}


def kept(steps: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int]:
    """Those of the `steps`, in their order, that stay.

    Of equally good ones the newest is the best; a number that is not finite is none.
    """
    stay = set(list(steps)[-config.keep :])
    if config.keep_every is not None:
        stay |= {step for step in steps if step % config.keep_every == 0}
    if config.best is not None:
        sign = 1 if config.best_is == "highest" else -1
        values = {
            step: sign * numbers[config.best]
            for step, numbers in steps.items()
            if math.isfinite(numbers.get(config.best, math.nan))
        }
        if values:
            stay.add(max(values, key=lambda step: (values[step], step)))
    return stay


def delete_all_but(stay: set[int], folder: Path) -> None:
    """Deletes the folders of all other steps."""
    for path in folders_of_steps(folder):
        if int(path.name) not in stay:
            # Without it what a kill leaves of the rest does not count.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)


def finished(folder: Path, tidy: bool) -> list[Path]:
    """The sealed ones, in their order; with `tidy` others move out of the way."""
    if tidy:
        for path in folder.glob("*.orbax-checkpoint-tmp*"):  # of a save that was cut short
            shutil.rmtree(path)
    found = []
    for path in folders_of_steps(folder):
        if (path / MANIFEST).exists():
            found.append(path)
        elif tidy:
            log.warning("checkpoint %s was not finished, and is not used", path)
            set_aside(path)
    return found


def set_aside(path: Path) -> None:
    """Renames what is damaged, beside others of it."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    path.rename(next(name for name in names if not name.exists()))
