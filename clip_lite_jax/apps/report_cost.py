"""What a run has cost: time, passes over the data, operations and memory, as far as it was logged.

Energy and price are not told: nothing here measures them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.apps.status_files import finite, read
from clip_lite_jax.files import STATUS_FILE
from clip_lite_jax.metrics import DATA_WAIT, RATE, seconds_per_step
from clip_lite_jax.status import COMPILING, EVALUATING, SAVING, SPENT, STARTING, TRAINING

NAMES = {
    STARTING: "Start: data, weights, features",
    COMPILING: "Compiling the step",
    TRAINING: "Steps",
    EVALUATING: "Evaluation while training",
    SAVING: "Saving checkpoints",
}


@dataclass(frozen=True)
class Part:
    """Some of the time."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Cost:
    parts: list[Part]
    """Of the wall time of all attempts; nothing for runs that did not write it down."""
    seconds: float | None
    """Their sum."""
    step_seconds: float | None
    """A step by the logged rates."""
    waiting: float | None
    """Share of the steps' time in which they waited for data."""
    evaluation: float | None
    """Seconds of the test evaluation, where results say so."""
    pairs: int
    epochs: float
    pairs_per_second: float | None
    flops_per_step: float | None
    """Of one device."""
    flops: float | None
    """Of all steps and devices."""
    mfu: float | None
    """Mean share of what the devices can do."""
    memory: float | None
    """Most GiB in use on the fullest device."""
    devices: int | None
    kind: str
    processes: int | None
    attempts: int | None


def cost(
    workdir: Path,
    lines: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any] | None,
    step: int,
    batch_size: int,
    examples: int,
) -> Cost:
    """Of a run that has come to `step`, on training data of so many `examples`."""
    status, _ = read(workdir / STATUS_FILE)
    spent = {state: seconds for state in SPENT if (seconds := status.number("seconds", state))}
    total = sum(spent.values())
    parts = [Part(NAMES[state], seconds, seconds / total) for state, seconds in spent.items()]
    step_seconds = seconds_per_step(lines, batch_size)
    a_step = _flops_per_step(lines)
    devices = status.count("devices", "count")
    return Cost(
        parts=parts,
        seconds=total or None,
        step_seconds=step_seconds,
        waiting=_weighted(lines, DATA_WAIT),
        evaluation=finite((results or {}).get("seconds")),
        pairs=step * batch_size,
        epochs=step * batch_size / max(1, examples),
        pairs_per_second=None if step_seconds is None else batch_size / step_seconds,
        flops_per_step=a_step,
        flops=None if a_step is None else a_step * step * (devices or 1),
        mfu=_weighted(lines, "mfu"),
        memory=max(_values(lines, "device_memory_peak_gib"), default=None),
        devices=devices,
        kind=status.text("devices", "kind"),
        processes=status.count("processes"),
        attempts=status.count("attempt", "number"),
    )


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for line in lines if (value := finite(line.get(key))) is not None]


def _weighted(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of shares of a step, weighted by how long the step took."""
    found = [
        (value, 1 / rate)
        for line in lines
        if (value := finite(line.get(key))) is not None and (rate := finite(line.get(RATE)))
    ]
    if not found:
        return None
    values, weights = np.array(found).T
    return float(np.sum(values * weights) / np.sum(weights))


def _flops_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    found = [
        rate * seconds
        for line in lines
        if (rate := finite(line.get("flops_per_second"))) is not None
        and (seconds := finite(line.get("step_seconds"))) is not None
    ]
    return float(np.median(found)) if found else None
