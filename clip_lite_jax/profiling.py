"""Traces of some steps, for TensorBoard's profiler, XProf and Perfetto."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)

FOLDER = "profile"


class Profile:
    """While it is entered, the steps of a span are traced into ``WORKDIR/profile``."""

    def __init__(self, workdir: Path, span: tuple[int, int] | None) -> None:
        """`span` is the first step that is traced, and the first that is not any more."""
        self._folder = workdir / FOLDER
        self._first, self._end = span or (-1, -1)
        self._running = False

    def at(self, step: int) -> None:
        """To be called before every step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._end:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            log.info("profile: %s (tensorboard --logdir, with its profile plugin)", self._folder)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
