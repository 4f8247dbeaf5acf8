"""Processes of our own on this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.connection import wait
from typing import Any


def process_pool(
    processes: int, begin: Callable[..., None] | None = None, *given: Any
) -> ProcessPoolExecutor:
    """Processes that work for this one, and end with it, even where it is killed.

    Each calls ``begin(*given)`` first.  They are not forked, because jax has threads; what they are
    given travels by pickling.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, _begin, (begin, *given))


def _begin(begin: Callable[..., None] | None, *given: Any) -> None:
    end_with_parent()
    # Ctrl-C reaches all processes of a terminal; this one says what has happened for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if begin is not None:
        begin(*given)


@cache
def end_with_parent() -> None:
    """Ends this process when the one that started it has ended, even if it was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)  # the pool's own queue never tells: every worker holds both of its ends

    threading.Thread(target=watch, daemon=True).start()
