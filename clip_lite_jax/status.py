"""How a run is: ``status.json``, written by the loop of its process 0, read by `apps.status`.

It tells what no other file does: that the process is there, and how it ended.  A run that is killed
cannot say so; whoever reads the file finds that the process is gone.
"""

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from clip_lite_jax._version import __version__
from clip_lite_jax.errors import Interrupted
from clip_lite_jax.files import STATUS_FILE, write_atomic

log = logging.getLogger(__name__)

STARTING, COMPILING, TRAINING = "starting", "compiling", "training"
EVALUATING, SAVING = "evaluating", "saving"
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"
SPENT = (STARTING, COMPILING, TRAINING, EVALUATING, SAVING)
"""States that take time, which `Status` adds up over all attempts, in seconds."""
ENDED = (FINISHED, INTERRUPTED, FAILED)

BEAT_SECONDS, MAX_BEAT_SECONDS = 5.0, 60.0
"""Between two signs of life of a loop that goes round."""
SHARE = 1e-3
"""Of the time that signs of life may take where the folder is slow: they come less often then."""
LONGEST_MESSAGE = 1000
"""Characters; errors may list the ids of a whole batch."""


class Status:
    """Keeps ``status.json`` while it is entered; does nothing where `active` is False.

    There is no thread: a loop that hangs is one that gives no sign of life.  A file that cannot be
    written is no reason to end training.
    """

    def __init__(
        self,
        workdir: Path,
        steps: int,
        active: bool,
        sent: Callable[[bool], object] = lambda at_once: None,
    ) -> None:
        """`sent` is called when the file is written, and told whether that is of note."""
        self._sent = sent
        self._path = workdir / STATUS_FILE
        self._active = active
        self._content: dict[str, Any] = {"state": STARTING, "step": None, "steps": steps}
        self._due = 0.0
        self._evaluation = (0, 0.0)  # the step of one that runs, and when it began
        self._since = monotonic()
        self._warned = False

    def __enter__(self) -> "Status":
        if self._active:
            with contextlib.suppress(OSError):  # of which training will say more
                self._path.parent.mkdir(parents=True, exist_ok=True)
            before = _read(self._path)
            self._content |= _this_attempt(before)
            self._content["seconds"] = _seconds(before)
            self._since = monotonic()
            self.enter(STARTING)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.enter(FINISHED)
        elif isinstance(error, Interrupted):
            self._end(INTERRUPTED, error)
        elif isinstance(error, KeyboardInterrupt):
            self._end(INTERRUPTED, error, "ended at once by Ctrl-C, without a checkpoint")
        else:
            self._end(FAILED, error)

    def enter(self, state: str) -> None:
        """Says that the run does something else from now on."""
        if not self._active:
            return
        self._count()
        if self._content["state"] == EVALUATING and state not in (INTERRUPTED, FAILED):
            step, began = self._evaluation
            seconds = round(monotonic() - began, 3)
            self._content["evaluation"] = {"step": step, "time": now(), "seconds": seconds}
        elif state == EVALUATING:
            self._evaluation = (self._content["step"], monotonic())
        self._content |= {"state": state, "since": now()}
        self._write(of_note=True)

    def beat(self, step: int, skipped_steps: int = 0) -> None:
        """Says that the loop has come to `step`; to be called at every step, mostly for nothing."""
        if not self._active:
            return
        self._content |= {"step": step, "skipped_steps": skipped_steps}
        attempt = self._content["attempt"]
        if attempt["step"] is None:
            attempt["step"] = step
        if self._content["state"] != TRAINING:
            self.enter(TRAINING)
        elif monotonic() >= self._due:
            self._count()
            self._write()

    def _end(self, state: str, error: BaseException, message: str = "") -> None:
        first = message or str(error).strip().partition("\n")[0]
        self._content |= {"error": type(error).__name__, "message": first[:LONGEST_MESSAGE]}
        self.enter(state)

    def _count(self) -> None:
        """Adds the time since it was last counted to that of the state."""
        time, seconds = monotonic(), self._content["seconds"]
        state = self._content["state"]
        seconds[state] = round(seconds.get(state, 0.0) + time - self._since, 3)
        self._since = time

    def _write(self, of_note: bool = False) -> None:
        began = monotonic()
        self._content["time"] = now()
        try:
            write_atomic(self._path, json.dumps(self._content, indent=1))
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written, training goes on: %s", self._path, error)
            self._warned = True
        self._sent(of_note)
        took = monotonic() - began
        self._due = began + min(max(BEAT_SECONDS, took / SHARE), MAX_BEAT_SECONDS)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _this_attempt(before: dict[str, Any]) -> dict[str, Any]:
    """What does not change while a process runs; `before` is what the attempt before has left."""
    import jax  # not before: who reads the file does not wait for it

    began, attempt = before.get("began"), before.get("attempt")
    attempts = attempt.get("number") if isinstance(attempt, dict) else None
    return {
        "message": "",
        "error": "",
        "began": began if isinstance(began, str) else now(),
        "attempt": {
            "number": attempts + 1 if isinstance(attempts, int) else 1,
            "began": now(),
            "step": None,
        },
        "evaluation": before.get("evaluation"),
        "pid": os.getpid(),
        "process_began": process_began(os.getpid()),
        "host": socket.gethostname(),
        "machine": machine(),
        "processes": jax.process_count(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "command": sys.orig_argv,
        "folder": _current_folder(),
        "version": __version__,
    }


def _seconds(before: dict[str, Any]) -> dict[str, float]:
    """Time spent in each state by the attempts before."""
    found = before.get("seconds")
    counted = found.items() if isinstance(found, dict) else ()
    numbers = {k: float(v) for k, v in counted if isinstance(v, int | float) and v >= 0}
    return {state: numbers[state] for state in SPENT if state in numbers}


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it is not there any more
        return ""


def _read(path: Path) -> dict[str, Any]:
    """What another attempt has written; nothing where that is no use."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def process_began(pid: int) -> str | None:
    """When a process of this machine began, in its ticks, which tells a reused `pid`.

    None where there is no such process, or only what a killed one leaves to its parent; "" where
    the system does not say when.
    """
    try:
        # After the name of the program, which may hold anything: proc(5).
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # of somebody else
        pass
    return ""


def machine() -> str:
    """Where a process id means the same: this machine since its last start, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
