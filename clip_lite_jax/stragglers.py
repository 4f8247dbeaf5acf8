"""Which process of a run holds up the others.

All processes meet in every step, so each is as fast as the slowest.  Rates of process 0 do not show
which one that is: the others wait for it on their devices.
"""

import logging
import socket
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_lite_jax.metrics import DATA_WAIT_SLOWEST, HOST_OVERHEAD_SLOWEST, Progress

log = logging.getLogger(__name__)

NAME_BYTES = 64
"""Of a host's name, as all processes send equally much."""
MUCH = 0.1
"""Of a step: less than this is no matter."""
TIMES = 2.0
"""As long as the others, the middle one of them."""


def slowest(progress: Progress) -> dict[str, float]:
    """The largest shares of a step in which a process waits for data, or is busy in Python.

    To be called by all processes at once.  Process 0 warns of one that stands out.  Nothing for a
    run of one process, or before there are rates.
    """
    if jax.process_count() == 1:
        return {}
    shares, names = gather(progress.shares)
    if not np.isfinite(shares).all():
        return {}
    if jax.process_index() == 0:
        hosts = [bytes(name).rstrip(b"\0").decode(errors="replace") for name in names]
        for what, of_all in zip(("waits for data", "is busy in Python"), shares.T, strict=True):
            if message := straggler(what, of_all.tolist(), hosts):
                log.warning("%s", message)
    waiting, busy = shares.max(axis=0).tolist()
    return {DATA_WAIT_SLOWEST: waiting, HOST_OVERHEAD_SLOWEST: busy}


def gather(shares: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """The shares ``[P, 2]`` of P processes, NaN for None, and their hosts ``[P, NAME_BYTES]``."""
    own = np.array(shares or (np.nan, np.nan), np.float32)
    name = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
    return multihost_utils.process_allgather((own, np.frombuffer(name, np.uint8)))


def straggler(what: str, shares: Sequence[float], hosts: Sequence[str]) -> str:
    """What to say of the process with the largest share; nothing if it is like the others.

    It stands out with more than `MUCH`, and more than `TIMES` the median of the others.
    """
    slow = int(np.argmax(shares))
    others = float(np.median([*shares[:slow], *shares[slow + 1 :]]))
    if shares[slow] <= max(MUCH, TIMES * others):
        return ""
    return (
        f"process {slow} on {hosts[slow]} {what} for {shares[slow]:.0%} of a step, the others for "
        f"{others:.0%} (median): all {len(shares)} processes wait for it"
    )
