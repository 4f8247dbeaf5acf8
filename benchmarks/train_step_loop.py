"""What the training loop costs over the step it runs, for `train_step`.

`clip_lite_jax.train.train` itself runs, with its input pipeline, metrics and progress.  Its batches
come through a gate, which hands out some, lets the loop get into its stride, and takes the time of
the next ones; between two such turns the loop stands still at the gate, and the gate runs the same
compiled step by itself.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from clip_lite_jax import train as training
from clip_lite_jax.batch import Batch
from clip_lite_jax.config import Config
from clip_lite_jax.sharding import put_batch
from clip_lite_jax.train_step import Compiled, TrainStep
from configs.quickstart import get_config

KINDS = ("bare", "ready", "whole")
"""The step by itself; the loop with batches that are ready; the loop with its input pipeline."""

READY = 8
"""Batches that are used again and again where no input pipeline is to work."""


class Over(Exception):
    """All turns are over; what the loop would do at its end is not of interest."""


class Gate:
    """Batches for the loop, in turns of `settle` steps that do not count and `steps` that do."""

    def __init__(self, turns: int, settle: int, steps: int) -> None:
        self.turns, self.settle, self.steps = turns, settle, steps
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        """Of a step, one number for each turn."""
        self.work: dict[str, list[float]] = {kind: [] for kind in KINDS}
        """The same, of all cores together: what other programs do on them is not in it."""
        self.waited: list[float] = []
        """Of `seconds` of the whole loop, how much the loop waited for its batch."""
        self.step: TrainStep | None = None
        self.state: Any = None
        self.mesh: Any = None

    def compiled(self, *arguments: Any) -> Compiled:
        """`train_step.compiled`; keeps the step, its mesh, and a copy of the loop's first state."""
        found = COMPILED(*arguments)
        _, state, _, self.mesh = arguments
        self.step, self.state = found.step, jax.tree.map(jnp.copy, state)
        return found

    def train_batches(self, *arguments: Any) -> Iterator[Batch]:
        batches = TRAIN_BATCHES(*arguments)
        ready = [next(batches) for _ in range(READY)]
        yield from ready  # the step is compiled for the first of them
        on_devices = [put_batch(self.mesh, batch) for batch in ready]
        for _ in range(self.turns):
            self._bare(on_devices)
            yield from self._turn("ready", itertools.cycle(ready))
            yield from self._turn("whole", batches)
        raise Over

    def _turn(self, kind: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield from itertools.islice(batches, self.settle)
        start, waited = clocks(), 0.0
        for _ in range(self.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            yield batch
        self._count(kind, start)
        if kind == "whole":
            self.waited.append(waited / self.steps)

    def _count(self, kind: str, start: tuple[float, float]) -> None:
        now = clocks()
        self.seconds[kind].append((now[0] - start[0]) / self.steps)
        self.work[kind].append((now[1] - start[1]) / self.steps)

    def _bare(self, batches: list[Batch]) -> None:
        """The step on batches that lie on the devices; as far ahead as the loop."""
        assert self.step is not None
        running: list[Any] = []
        start = clocks()
        for number in range(self.settle + self.steps):
            if number == self.settle:
                start = clocks()
            self.state, metrics = self.step(self.state, batches[number % len(batches)])
            running.append(metrics)
            if len(running) > training.AHEAD:
                jax.block_until_ready(running.pop(0))
        self._count("bare", start)
        jax.block_until_ready(running)


def clocks() -> tuple[float, float]:
    """Seconds that have passed, and seconds that the cores worked for this process."""
    return time.perf_counter(), time.process_time()


COMPILED, TRAIN_BATCHES = training.compiled, training.train_batches


def overhead(config: Config, turns: int, settle: int = 8, steps: int = 20) -> dict[str, Any]:
    """Seconds of a step in each turn, by kind, and of the whole loop what it waited for its batch.

    Nothing is evaluated or saved while the time is taken.
    """
    gate = Gate(turns, settle, steps)
    long = 10 * (READY + 2 * turns * (settle + steps))
    config = replace(
        config,
        steps=max(long, config.steps),
        eval=replace(config.eval, every=max(long, config.steps)),
        checkpoint=replace(config.checkpoint, every=max(long, config.steps)),
    )
    with (
        tempfile.TemporaryDirectory() as workdir,
        mock.patch.object(training, "compiled", gate.compiled),
        mock.patch.object(training, "train_batches", gate.train_batches),
        suppress(Over),
    ):
        training.train(config, Path(workdir))
    return {
        "seconds": gate.seconds,
        "work": gate.work,
        "waited": gate.waited,
        "turns": turns,
        "steps": steps,
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(overhead(get_config(), **json.loads(sys.argv[1]))))
