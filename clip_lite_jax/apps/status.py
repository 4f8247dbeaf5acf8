"""How a run is, live or dead, from the files in its folder; without jax, which takes seconds."""

import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_lite_jax import status as written
from clip_lite_jax.alarms import PATIENCE, problems
from clip_lite_jax.apps import status_files as files
from clip_lite_jax.apps.status_files import Fields, iso
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.files import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    SKIPPED_FILE,
    STATUS_FILE,
)

RUNNING, STALLED, SILENT, DIED = "running", "stalled", "silent", "died"
Saved = tuple[list[dict[str, Any]], list[str]]
NO_RUN, NEITHER = 2, 3
"""Exit statuses: there is no run; it neither runs nor is finished."""

QUIET = {
    written.STARTING: 24 * 3600.0,  # features of frozen encoders are computed then
    written.COMPILING: 2 * 3600.0,
    written.TRAINING: 900.0,
    written.EVALUATING: 2 * 3600.0,
    written.SAVING: 1800.0,  # where it fails it is tried again for minutes
}
"""Seconds without a sign of life that mean nothing yet where it is not known how long it takes."""
MARGIN = 3 * written.MAX_BEAT_SECONDS


@dataclass(frozen=True)
class Pace:
    """How long things take, in seconds, as far as it is known."""

    step: float | None
    evaluation: float | None

    def quiet(self, state: str) -> float:
        """Seconds without a sign of life that mean nothing yet."""
        if state == written.TRAINING and self.step is not None:
            return MARGIN + 10 * self.step
        if state == written.EVALUATING and self.evaluation is not None:
            return MARGIN + 3 * self.evaluation
        return QUIET.get(state, QUIET[written.TRAINING])


def status(workdir: Path, verify: bool = False, saved: Saved | None = None) -> dict[str, Any]:
    """What is to be said of a run, as plain data: `status_text.describe` makes text of it.

    With `verify` the files of all checkpoints are read and compared with their manifests; unless
    it is known what is `saved`, as by `status_files.checkpoints`, elsewhere.

    Raises:
      CheckpointError: there is no run in `workdir`.
    """
    if not any((workdir / n).exists() for n in (STATUS_FILE, CONFIG_FILE, CHECKPOINTS)):
        raise CheckpointError(
            f"{workdir} holds no run: there is no {STATUS_FILE}, {CONFIG_FILE} or {CHECKPOINTS} in "
            "it; give the --workdir of one"
        )
    now = float(int(time.time()))  # as what is written, in whole seconds
    run, problem = files.read(workdir / STATUS_FILE)
    config, _ = files.read(workdir / CONFIG_FILE)
    lines = files.last_lines(workdir / METRICS_FILE)
    numbers = files.latest(lines)
    pace = Pace(_step_seconds(config, numbers), run.number("evaluation", "seconds"))
    checkpoints, others = saved or files.checkpoints(workdir, verify)
    step = _step(run, numbers, checkpoints)
    steps = run.count("steps") or config.count("steps")
    found = {
        "workdir": str(workdir),
        "problem": problem,
        "step": step,
        "steps": steps,
        "seconds_per_step": pace.step,
        **_process(run, workdir, now, pace, step, steps),
        "message": run.text("message"),
        "error": run.text("error"),
        "began": iso(run.moment("began") or files.changed(workdir / CONFIG_FILE)),
        "attempt": {
            "number": run.count("attempt", "number"),
            "began": iso(run.moment("attempt", "began")),
            "step": run.count("attempt", "step"),
        },
        "processes": run.count("processes"),
        "devices": {"kind": run.text("devices", "kind"), "count": run.count("devices", "count")},
        "version": run.text("version"),
        "command": run.texts("command"),
        "folder": run.text("folder"),
        "training": numbers,
        "loss": files.trend(lines),
        "alarms": _alarms(config, lines),
        "evaluation": _evaluation(run, lines),
        "results": _results(workdir),
        "checkpoints": checkpoints,
        "no_checkpoints": others,
        "skipped_examples": files.count_lines(workdir / SKIPPED_FILE),
        "skipped_steps": run.count("skipped_steps"),
        "now": iso(now),
    }
    found["seconds_left"] = _seconds_left(found, config, pace)
    return found | {"exit_status": exit_status(found), "next": _next(found)}


def exit_status(found: dict[str, Any]) -> int:
    return 0 if found["verdict"] in (RUNNING, written.FINISHED) else NEITHER


def command_of(found: dict[str, Any]) -> list[str]:
    """What the run was started with, for a shell."""
    words = [shlex.quote(word) for word in found["command"]]
    if words and found["folder"]:
        words = ["cd", shlex.quote(found["folder"]), "&&", *words]
    return words


def _process(
    run: Fields, workdir: Path, now: float, pace: Pace, step: int | None, steps: int | None
) -> dict[str, Any]:
    """Whether the run goes on, and how that is known."""
    state, sign = run.text("state"), run.moment("time")
    if sign is None:  # of a version without status.json, or what lies there is no use
        state, sign = "", files.changed(workdir / METRICS_FILE) or files.changed(workdir)
    age, quiet = max(now - (sign or 0), 0.0), pace.quiet(state)
    pid, here, alive = run.count("pid"), False, None
    if pid and 0 < pid < 2**31 and run.text("host") == socket.gethostname():
        here = run.text("machine") == written.machine()
        if here:
            alive = written.process_began(pid) == run.text("process_began")
    complete = step is not None and steps is not None and step >= steps
    if state in written.ENDED:
        verdict = state
    elif alive is False:
        verdict = DIED
    elif age <= quiet and (state or not complete):
        verdict = RUNNING
    elif not state and complete:
        verdict = written.FINISHED
    else:
        verdict = STALLED if alive else SILENT
    return {
        "verdict": verdict,
        "state": state,
        "since": iso(run.moment("since")),
        "process": {"pid": pid, "host": run.text("host"), "here": here, "alive": alive},
        "last_sign": iso(sign),
        "last_sign_seconds": age,
        "quiet_seconds": quiet,
    }


def _step(run: Fields, numbers: dict[str, float], saved: list[dict[str, Any]]) -> int | None:
    """The newest step that anything tells of."""
    logged = int(numbers["step"]) if "step" in numbers else None
    known = [step for step in (run.count("step"), logged) if step is not None]
    return max(known) if known else (saved[0]["step"] if saved else None)


def _step_seconds(config: Fields, numbers: dict[str, float]) -> float | None:
    if numbers.get("step_seconds", 0.0) > 0:
        return numbers["step_seconds"]
    rate, batch = numbers.get("images_per_second", 0.0), config.count("batch_size")
    return batch / rate if batch and rate > 0 else None  # older versions say no more


def _seconds_left(found: dict[str, Any], config: Fields, pace: Pace) -> float | None:
    """Until the last step, evaluations included; None for a run that does not go on."""
    step, steps = found["step"], found["steps"]
    if found["verdict"] != RUNNING or pace.step is None or not steps or step is None:
        return None
    every = config.count("eval", "every") or steps
    evaluations = max(-(-steps // every) - step // every, 0)
    return max(steps - step, 0) * pace.step + evaluations * (pace.evaluation or 0.0)


def _alarms(config: Fields, lines: list[dict[str, float]]) -> list[str]:
    """What the log warns of, where it still holds."""
    logged = [line for line in lines if "loss" in line][-PATIENCE:]
    if len(logged) < PATIENCE:
        return []
    limits = config.get("model", "critic", "options", "temperature_range")
    pair = limits if isinstance(limits, list) else []
    low, high = [*map(files.finite, pair), None, None][:2]
    limited = (low, high) if low and high else None
    found = [problems(line, config.text("objective", "name"), limited) for line in logged]
    return [text for name, text in found[-1].items() if all(name in one for one in found)]


def _evaluation(run: Fields, lines: list[dict[str, float]]) -> dict[str, Any] | None:
    """Numbers of the newest evaluation, and when it was where status.json tells of the same one."""
    step, numbers = files.evaluation(lines)
    if step is None:
        return None
    same = run.count("evaluation", "step") == step
    return {
        "step": step,
        "time": iso(run.moment("evaluation", "time")) if same else None,
        "seconds": run.number("evaluation", "seconds") if same else None,
        "numbers": numbers,
    }


def _results(workdir: Path) -> dict[str, Any] | None:
    """The numbers on test data, under the names that they have in an evaluation."""
    results, problem = files.read(workdir / RESULTS_FILE)
    tests = results.get("test")
    if problem or not isinstance(tests, dict):
        return None
    numbers = {
        f"{name}/{key}": value
        for name, values in tests.items()
        for key, value in Fields(values).numbers().items()
    }
    time = files.changed(workdir / RESULTS_FILE)
    return {"step": results.count("step"), "time": iso(time), "numbers": numbers}


def _next(found: dict[str, Any]) -> str:
    """What the person who asks is to do; nothing where there is nothing to be done."""
    sealed = [one["step"] for one in found["checkpoints"] if one["sealed"] and not one["problem"]]
    where = f"goes on from step {sealed[0]:,}" if sealed else "begins anew: no checkpoint is there"
    several = ", on all hosts," if (found["processes"] or 1) > 1 else ""
    again = f"The same command{several} {where}."
    if found["verdict"] == written.FAILED and found["error"] == "NonFiniteError":
        return "See the message; the same command would come to the same step again."
    pid, host = found["process"]["pid"], found["process"]["host"]
    look = f"See on {host} whether process {pid} is there" if host else "See its log"
    return {
        RUNNING: "",
        written.FINISHED: _after_training(found),
        written.INTERRUPTED: again,
        written.FAILED: f"Mend what the message says; its log may say more. {again}",
        DIED: f"Its log, or the system's, may say why (killed, out of memory). {again}",
        STALLED: f"See its log. If it stays so, kill -9 {pid}. {again}",
        SILENT: f"{look}. If it does not run: {again[0].lower()}{again[1:]}",
    }[found["verdict"]]


def _after_training(found: dict[str, Any]) -> str:
    results = found["results"]
    if results is not None and results["step"] == found["step"]:
        return ""
    if found["process"]["alive"]:
        return "The process goes on: test data and the report are next."
    return f"There is no {RESULTS_FILE} of this step; the same command evaluates on test data."
