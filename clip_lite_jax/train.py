"""Training: set-up, then one visible loop."""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_lite_jax.alarms import Alarms
from clip_lite_jax.batch import Batch
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.chips import peak_flops
from clip_lite_jax.config import Config
from clip_lite_jax.data.image_ops import check_resampling
from clip_lite_jax.data.pipeline import TrainTransform, train_batches
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import CheckpointError, Interrupted, NonFiniteError
from clip_lite_jax.evaluators import Evaluator
from clip_lite_jax.interrupts import Interrupts
from clip_lite_jax.learner import build_learner
from clip_lite_jax.metrics import MetricWriter, Progress
from clip_lite_jax.mirror import Mirror
from clip_lite_jax.optim import build_schedule
from clip_lite_jax.profiling import Profile
from clip_lite_jax.run import Run, build_run, restore_or_init
from clip_lite_jax.sharding import pieces_of_process, put_batch
from clip_lite_jax.status import COMPILING, EVALUATING, SAVING, Status
from clip_lite_jax.stragglers import slowest
from clip_lite_jax.train_state import TrainState
from clip_lite_jax.train_step import (
    EncodeFns,
    TrainStep,
    compiled,
    make_encode_fns,
    make_train_step,
    use_compilation_cache,
)

log = logging.getLogger(__name__)


def train(config: Config, workdir: Path, mirror: Mirror | None = None) -> Run:
    """Trains to `config.steps`, going on from the newest checkpoint in `workdir` if there is one.

    A `mirror` keeps what is in `workdir`, its folder, in a bucket.

    Raises:
      ConfigError, DataError: what is asked for cannot run.
      NonFiniteError: the loss or the gradient is no longer finite.
      CheckpointError: checkpoints cannot be read, or not be written time and again.
      Interrupted: it was asked to end, by a signal or the clock, and has saved where it was.
    """
    mirror = mirror or Mirror(workdir)
    mirror.check(config)
    active = jax.process_index() == 0
    with Status(workdir, config.steps, active, mirror.send_soon) as status:
        check_resampling(config.data.augment)
        use_compilation_cache()
        return _train(config, workdir, status, mirror)


def _train(config: Config, workdir: Path, status: Status, mirror: Mirror) -> Run:
    run = build_run(config, workdir)
    config = run.config  # with what model.*.init_from states
    run.warn_of_cut_captions()
    learner = build_learner(
        run.model,
        config.objective,
        config.negatives,
        config.batch_size,
        run.mesh,
        config.seed,
        config.accumulate,
    )
    checkpoints = Checkpoints(workdir, config.checkpoint, mirror)
    state, optimizer = restore_or_init(run, checkpoints)
    train_step = make_train_step(
        learner,
        optimizer,
        run.mesh,
        config.optim.ema_decay,
        config.mesh,
        skip_non_finite=config.optim.non_finite == "skip",
    )
    bind = make_encode_fns(run.model, run.mesh)
    inputs = run.inputs(state.params, state.model_state)
    evaluators = run.evaluators("validation", inputs)
    start = int(state.step)
    evaluated = _step_evaluated(checkpoints)
    batches = train_batches(
        TrainTransform(
            run.sources["train"],
            inputs,
            config.data,
            run.bad,
            second=config.objective.visual_weight + config.objective.textual_weight > 0,
        ),
        config.batch_size,
        config.seed,
        start,
        *pieces_of_process(run.mesh),
        config.accumulate,
    )
    writer = MetricWriter(workdir, config, start, run.is_writer, evaluated == start)
    progress = Progress(start, config.steps, config.batch_size, run.is_writer)
    pending = PendingMetrics(
        config,
        run.sources["train"],
        writer,
        progress,
        checkpoints,
        getattr(run.model.module.critic, "temperature_range", None),
    )
    log.info("%d training examples, %d parameters", len(run.sources["train"]), _size(state.params))

    # The order within a step is fixed: evaluate, save, take a batch, step, log.  A checkpoint of
    # step k thus comes after everything that was logged about k, and before the batch of step k is
    # taken, so a resumed run repeats nothing and misses nothing.
    with (
        Interrupts(config.checkpoint.stop_after_minutes) as interrupts,
        Profile(workdir, config.log.profile) as profile,
        closing(progress),
        closing(writer),
        checkpoints,
    ):
        for step in range(start, config.steps + 1):
            status.beat(step, pending.skipped)
            last = step == config.steps
            stop = "" if last else interrupts.requested(step)
            evaluation = (last or step % config.eval.every == 0) and step != evaluated
            numbers: dict[str, float] = {}
            if evaluation and not stop:  # who has been asked to end may not have the time
                pending.write_all()
                status.enter(EVALUATING)
                numbers = _evaluated(evaluators, bind(state.eval_params, state.model_state))
                writer.write(step, numbers | slowest(progress))
                checkpoints.look_for_best(numbers)
                progress.restart_clock()
            if (last or stop or checkpoints.due(step)) and step > start:
                pending.write_all()  # a state that is not finite is noticed before it is saved
                status.enter(SAVING)
                meta = replace(run.meta, evaluated=not (evaluation and stop))
                checkpoints.save_or_retry(state, meta, numbers, wait=bool(last or stop))
            if stop:
                raise _interrupted(step, config.steps, stop, checkpoints.latest_step() == step)
            if last:
                break
            waiting = time.perf_counter()
            batch = next(batches)
            progress.waited(time.perf_counter() - waiting)
            on_devices = put_batch(run.mesh, batch, config.accumulate > 1)
            if step == start:
                status.enter(COMPILING)
                train_step = _compiled(run, train_step, state, on_devices, progress)
            profile.at(step)
            # Nothing is to come to the devices or to leave them that nobody sent.
            with (
                jax.profiler.StepTraceAnnotation("train", step_num=step),
                jax.transfer_guard("disallow"),
            ):
                state, metrics = train_step(state, on_devices)
            # The step runs in the background: numbers of earlier steps are read meanwhile, and the
            # next batch comes to the devices.
            pending.add(step + 1, metrics, batch)

    return run


def _compiled(
    run: Run, train_step: TrainStep, state: TrainState, batch: Any, progress: Progress
) -> TrainStep:
    """The step, compiled now; tells what it costs."""
    log.info("the step is compiled, which may take a while")
    found = compiled(train_step, state, batch, run.mesh)
    kind = run.mesh.devices.flat[0].device_kind
    progress.costs(found.flops, peak_flops(kind, run.config.model.dtype))
    log.info(
        "compiled in %.0f s for %d × %s: %.1f GFLOP a step and device, %.2f GiB of temporaries",
        found.seconds,
        run.mesh.size,
        kind,
        found.flops / 1e9,
        found.temporaries / 2**30,
    )
    return found.step


def _step_evaluated(checkpoints: Checkpoints) -> int | None:
    """The step that a run goes on from, evaluated before it was saved unless it was in a hurry."""
    own = checkpoints.latest_step()
    return own if own is not None and checkpoints.meta(own).evaluated else None


def _interrupted(step: int, steps: int, reason: str, saved: bool) -> Interrupted:
    kept = "a checkpoint" if saved else "nothing to save yet"
    return Interrupted(
        f"ended at step {step} of {steps} ({reason}), with {kept}; the same command goes on from "
        "there"
    )


def _evaluated(evaluators: Mapping[str, Evaluator], fns: EncodeFns) -> dict[str, float]:
    """The numbers of all evaluators, by the name of each."""
    return {
        f"{name}/{key}": value
        for name, evaluator in evaluators.items()
        for key, value in evaluator.run(fns).items()
    }


AHEAD = 1
"""Steps that wait on the devices behind the one that runs: enough to keep them busy, and no more
batches in their memory."""


class PendingMetrics:
    """Metrics still on the devices.  Reading them one step late keeps the devices busy."""

    def __init__(
        self,
        config: Config,
        source: Source,
        writer: MetricWriter,
        progress: Progress,
        checkpoints: Checkpoints,
        temperature_range: tuple[float, float] | None,
    ) -> None:
        self.every, self.source = config.log.every, source
        self.alarms = Alarms(config.objective.name, temperature_range)
        self.skipped, self.max_skipped = 0, config.optim.max_skipped
        # All of them now: later they would wait on the devices behind the step that runs, and the
        # next step would wait for that.
        schedule = build_schedule(config.optim, config.steps)
        self.learning_rates = np.asarray(schedule(jnp.arange(config.steps)))
        self.writer, self.progress, self.checkpoints = writer, progress, checkpoints
        self.waiting: list[tuple[int, dict[str, jax.Array], Batch]] = []

    def add(self, step: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        """Takes the metrics of the step just started; writes the older ones every so often."""
        if len(self.waiting) >= self.every:
            self.write_all()
        self.waiting.append((step, metrics, batch))
        if len(self.waiting) > AHEAD:
            self._wait_for(self.waiting[-1 - AHEAD][1])
        self.progress.advance()

    def _wait_for(self, metrics: Any) -> None:
        began = time.perf_counter()
        jax.block_until_ready(metrics)
        self.progress.blocked(time.perf_counter() - began)

    def write_all(self) -> None:
        """Waits for what is pending, checks it, and writes the lines that are due.

        Raises:
          NonFiniteError: with the step, the ids of its batch and the last good checkpoint.
        """
        self._wait_for([metrics for _, metrics, _ in self.waiting])
        for step, metrics, batch in self.waiting:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            watched = ("loss", "gradient_norm", "parameter_norm")
            if not all(math.isfinite(values[name]) for name in watched):
                self._skip_or_stop(step, values, batch)
                values = {name: x for name, x in values.items() if math.isfinite(x)}  # as in JSON
            if step % self.every == 0:
                values["learning_rate"] = float(self.learning_rates[step - 1])
                self.alarms.look(step, values)
                values |= self.progress.rates(values.get("loss", math.nan))
                self.writer.write(step, values)
        self.waiting.clear()

    def _skip_or_stop(self, step: int, values: dict[str, float], batch: Batch) -> None:
        self.skipped += 1
        if values.get("skipped") and self.skipped <= self.max_skipped:
            log.warning(
                "step %d was skipped, %d of at most %d: loss=%s, gradient norm=%s",
                step,
                self.skipped,
                self.max_skipped,
                values["loss"],
                values["gradient_norm"],
            )
        else:
            self._stop(step, values, batch)

    def _stop(self, step: int, values: dict[str, float], batch: Batch) -> None:
        try:
            self.checkpoints.wait()
        except CheckpointError as error:  # the lesser evil
            log.error("%s", error)
        good = self.checkpoints.latest_step()
        last_good = "none" if good is None else f"step {good}"
        ids = [self.source.metadata(int(index)).id for index in batch.index.ravel()]
        raise NonFiniteError(
            f"step {step}: loss={values['loss']}, gradient norm={values['gradient_norm']}, "
            f"parameter norm={values['parameter_norm']}. Last good checkpoint: {last_good}. Start "
            "again in another --workdir with a lower optim.learning_rate or optim.clip_norm; the "
            f"examples of this step were: {', '.join(ids)}"
        )


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
