"""Processes of our own on this machine."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
    _end_with_parent()
    if begin is not None:
        begin(*given)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # the pool's own queue never tells: every worker holds both of its ends

    threading.Thread(target=watch, daemon=True).start()
