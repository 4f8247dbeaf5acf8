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


def newest_sound(
    folder: Folder,
    finished: Callable[[], Sequence[Folder]],
    problem_of: Callable[[Folder], str],
    set_aside: Callable[[Folder], object] | None,
) -> int | None:
    """The newest step without a problem; None where there is no checkpoint at all.

    Process 0 looks for all.  `finished` are the sealed ones, in their order.  What is damaged and
    newer than the sound one is `set_aside`.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged.
    """
    newest = NONE
    if jax.process_index() == 0:
        newest = _look(finished(), problem_of, set_aside)
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if newest == ALL_DAMAGED:
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged; the log says how. Bring one back from a "
            "copy, or start again in another --workdir"
        )
    return None if newest == NONE else newest


def _look(
    finished: Sequence[Folder],
    problem_of: Callable[[Folder], str],
    set_aside: Callable[[Folder], object] | None,
) -> int:
    for path in reversed(finished):
        problem = problem_of(path)
        if not problem:
            return int(path.name)
        log.error("checkpoint %s is not used: %s", path, problem)
        if set_aside is not None and path != finished[0]:
            set_aside(path)
    return ALL_DAMAGED if finished else NONE
