"""Which checkpoint a run goes on from: the newest that is as it was when it was sealed."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.places import Place

Folder = TypeVar("Folder", bound=Place)

log = logging.getLogger(__name__)

NONE, ALL_DAMAGED = -1, -2


class GoneError(Exception):
    """A checkpoint that its run has deleted since it was listed."""


def newest_sound(
    folder: Folder,
    finished: Callable[[], Sequence[Folder]],
    problem_of: Callable[[Folder], str],
    set_aside: Callable[[Folder], object] | None,
) -> int | None:
    """The newest step without a problem; None where there is no checkpoint at all.

    Process 0 looks for all.  `finished` are the sealed ones, in their order; they are listed again
    where `problem_of` raises `GoneError`.  What is damaged and newer than the sound one is
    `set_aside`.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged.
    """
    newest = NONE
    if jax.process_index() == 0:
        newest = _look(finished, problem_of, set_aside)
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if newest == ALL_DAMAGED:
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged; the log says how. Bring one back from a "
            "copy, or start again in another --workdir"
        )
    return None if newest == NONE else newest


def _look(
    finished: Callable[[], Sequence[Folder]],
    problem_of: Callable[[Folder], str],
    set_aside: Callable[[Folder], object] | None,
) -> int:
    found = finished()
    for path in reversed(found):
        try:
            problem = problem_of(path)
        except GoneError:
            return _look(finished, problem_of, set_aside)
        if not problem:
            return int(path.name)
        log.error("checkpoint %s is not used: %s", path, problem)
        if set_aside is not None and path != found[0]:
            set_aside(path)
    return ALL_DAMAGED if found else NONE
