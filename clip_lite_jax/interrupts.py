"""Being asked to end: by a signal, by the clock, or by Google Cloud before it takes a machine.

All of it comes down to SIGTERM, which the loop looks for after every step: it saves, and ends with
a status of its own.  In a run of several processes one of them that is asked is enough.
"""

import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

METADATA = "http://{}/computeMetadata/v1/instance/{}?wait_for_change=true&timeout_sec=60"
"""Of Google Compute Engine: answers when the value changes, or after a minute."""
EVENTS = {"preempted": "FALSE", "maintenance-event": "NONE"}
"""Values of the metadata server while nothing is to happen."""


class Interrupts:
    """While it is entered, SIGTERM and Ctrl-C are requests to end; a second one ends at once."""

    def __init__(self, after_minutes: float | None = None) -> None:
        """`after_minutes` after it is entered it asks by itself."""
        self._reason = ""
        self._minutes = after_minutes
        self._handlers: dict[int, Any] = {}
        self._leaving = threading.Event()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_signal)}
            if jax.process_count() == 1:  # of several, jax has taken it (reached_preemption ...)
                self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)
        if self._minutes is not None:
            self._start(self._watch_clock, self._minutes)
        if _is_on_compute_engine():
            for name, quiet in EVENTS.items():
                self._start(self._watch_metadata, name, quiet)
        return self

    def __exit__(self, *exception: object) -> None:
        self._leaving.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> str:
        """Why the run is to end after `step` steps; nothing if it is not.

        To be called by all processes after every step: they agree on a step that none has passed.
        """
        if jax.process_count() == 1:
            return self._reason
        if not multihost_utils.reached_preemption_sync_point(step):
            return ""
        return self._reason or "another process was asked to end, or this one by SIGTERM"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._reason:
            raise KeyboardInterrupt
        self._reason = signal.Signals(number).name
        if number == signal.SIGINT:
            log.warning("ending after this step, with a checkpoint; Ctrl-C again ends at once")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # tells the others

    def _ask(self, reason: str) -> None:
        if not self._reason:
            log.warning("ending after this step, with a checkpoint: %s", reason)
            self._reason = reason
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def _start(self, watch: Any, *arguments: Any) -> None:
        threading.Thread(target=watch, args=arguments, name=watch.__name__, daemon=True).start()

    def _watch_clock(self, minutes: float) -> None:
        if not self._leaving.wait(60 * minutes):
            self._ask(f"checkpoint.stop_after_minutes={minutes:g} are over")

    def _watch_metadata(self, name: str, quiet: str) -> None:
        while not self._leaving.is_set():
            value = _metadata(name)
            if value is None:
                self._leaving.wait(60)
            elif value != quiet and not self._leaving.is_set():
                self._ask(f"{name} of this machine is {value}")
                return


def _is_on_compute_engine() -> bool:
    """Asks no network: where there is no metadata server that can take long."""
    product = Path("/sys/class/dmi/id/product_name")
    try:
        return "Google" in product.read_text() or "GCE_METADATA_HOST" in os.environ
    except OSError:
        return "GCE_METADATA_HOST" in os.environ


def _metadata(name: str) -> str | None:
    """The value once it changes, or after a minute; None where there is no answer."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        METADATA.format(host, name), headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return str(answer.read(100).decode()).strip()
    except (OSError, ValueError, urllib.error.URLError):
        return None
