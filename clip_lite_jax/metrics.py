"""Where numbers go: ``metrics.jsonl``, TensorBoard, Weights & Biases, and a progress line."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from clip_lite_jax.config import Config, LogConfig, to_dict
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.files import METRICS_FILE, Appended, read_json_lines

log = logging.getLogger(__name__)


RATE = "images_per_second"
DATA_WAIT = "data_wait"
DATA_WAIT_SLOWEST, HOST_OVERHEAD_SLOWEST = "data_wait_slowest", "host_overhead_slowest"


class MetricWriter:
    """Scalars by step, under the same names everywhere.  Does nothing where `active` is False."""

    def __init__(
        self,
        workdir: Path,
        config: Config,
        start_step: int,
        active: bool,
        evaluated: bool = True,
    ) -> None:
        """Goes on after `start_step`; its evaluation is written again unless it is `evaluated`."""
        self.active = active
        if not active:
            return
        self._file = _reopen(workdir / METRICS_FILE, start_step, evaluated)
        self._tensorboard = _tensorboard(workdir, config.log, start_step)
        self._wandb = _wandb(workdir, config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        # At once: a killed run keeps every line it wrote.
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            self._tensorboard.write(step, values)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        if not self.active:
            return
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(workdir: Path) -> Iterator[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return read_json_lines(workdir / METRICS_FILE)


def seconds_per_step(lines: Iterable[Mapping[str, Any]], batch_size: int) -> float | None:
    """Mean time of a step by the logged rates, compilation and evaluation left out."""
    seconds = [batch_size / line[RATE] for line in lines if RATE in line]
    return sum(seconds) / len(seconds) if seconds else None


def _reopen(path: Path, start_step: int, evaluated: bool) -> Appended:
    """The file, without the lines that a resumed run is going to write again."""

    def stays(line: Mapping[str, Any]) -> bool:
        again = not evaluated and "learning_rate" not in line  # of an evaluation yet to come
        return bool(start_step) and line["step"] <= start_step - again

    lines = [line for line in read_metrics(path.parent) if stays(line)]
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewritten.replace(path)
    return Appended(path)


def _tensorboard(workdir: Path, config: LogConfig, start_step: int) -> "_TensorBoard | None":
    if not config.tensorboard:
        return None
    return _TensorBoard(workdir / "tensorboard", start_step + 1)


class _TensorBoard:
    """Event files.  tensorboardX's own writer leaves them to a thread, and where the disk is full
    that thread dies and whoever writes waits for it for ever."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """TensorBoard hides what a killed run wrote from `purge_step` on."""
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._events: EventsWriter | None = EventsWriter(str(folder / "events"))
        version, start = "brain.Event:2", SessionLog(status=SessionLog.START)
        self._write([Event(step=purge_step, file_version=version)])
        self._write([Event(step=purge_step, session_log=start)])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        scalars = (scalar(name, value) for name, value in values.items())
        self._write(Event(step=step, wall_time=now, summary=summary) for summary in scalars)

    def _write(self, events: Iterable[Any]) -> None:
        if self._events is None:
            return
        try:
            for event in events:
                self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            log.error(
                "%s: %s; no more is written there until the run starts again, %s has it all",
                self._folder,
                error,
                METRICS_FILE,
            )
            self._events = None

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def _wandb(workdir: Path, config: Config) -> Any:
    if config.log.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"log.wandb_project={config.log.wandb_project!r} needs Weights & Biases: "
            "pip install 'clip-lite-jax[wandb]'"
        ) from error
    return wandb.init(
        project=config.log.wandb_project,
        name=config.name,
        dir=str(workdir),
        id=workdir.resolve().name,
        resume="allow",
        config=to_dict(config),
    )


def device_memory() -> dict[str, float]:
    """GiB that are in use on this process's fullest device, now and at most; nothing on CPUs."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"device_memory_gib": "bytes_in_use", "device_memory_peak_gib": "peak_bytes_in_use"}
    return {
        name: max(stats[key] for stats in found) / 2**30
        for name, key in names.items()
        if all(key in stats for stats in found)
    }


FROM_THE_MACHINE = (
    RATE,
    "step_seconds",
    DATA_WAIT,
    DATA_WAIT_SLOWEST,
    HOST_OVERHEAD_SLOWEST,
    "flops_per_second",
    "mfu",
    "device_memory_gib",
    "device_memory_peak_gib",
)
"""Numbers in which two equal runs differ."""


class Progress:
    """A progress bar with images/s, the share of time spent waiting for data, and the time left.

    Rates are moving averages over steps; time spent between steps on evaluation is left out.
    """

    def __init__(self, start: int, steps: int, batch_size: int, active: bool) -> None:
        self.batch_size = batch_size
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not active,
            mininterval=0.5 if sys.stderr.isatty() else 20,  # a log file wants few lines
            dynamic_ncols=True,
        )
        self._flops, self._peak = 0.0, 0.0
        self._step_seconds: float | None = None
        self._wait_seconds = self._waited = 0.0
        self._block_seconds = self._blocked = 0.0
        self._since: float | None = None

    def costs(self, flops: float, peak: float | None) -> None:
        """A step takes so many FLOPs of a device, which makes at most so many a second."""
        self._flops, self._peak = flops, peak or 0.0

    def waited(self, seconds: float) -> None:
        """Counts time spent waiting for the batch of the step to come."""
        self._waited = seconds

    def blocked(self, seconds: float) -> None:
        """Counts time spent waiting for the devices; it may come several times in a step."""
        self._blocked += seconds

    def restart_clock(self) -> None:
        """Leaves the time until the next step out of the rates."""
        self._since = None

    def advance(self) -> None:
        """Counts one step."""
        now = time.perf_counter()
        if self._since is not None:  # the first step compiles, and is left out too
            seconds = now - self._since
            keep = 0.9 if self._step_seconds is not None else 0.0
            self._step_seconds = keep * (self._step_seconds or 0.0) + (1 - keep) * seconds
            self._wait_seconds = keep * self._wait_seconds + (1 - keep) * self._waited
            self._block_seconds = keep * self._block_seconds + (1 - keep) * self._blocked
        self._since, self._blocked = now, 0.0
        self._bar.update()

    @property
    def shares(self) -> tuple[float, float] | None:
        """Parts of a step in which this process waits for data, and in which it waits for nothing
        but is busy in Python (host overhead); None before there are rates."""
        if not self._step_seconds:
            return None
        data, devices = (
            seconds / self._step_seconds for seconds in (self._wait_seconds, self._block_seconds)
        )
        return data, max(1 - data - devices, 0.0)

    def rates(self, loss: float) -> dict[str, float]:
        """What changes with the machine; shows the most important on the bar.

        ``images_per_second`` of all devices; ``step_seconds``; ``data_wait``, the share of it;
        ``flops_per_second`` and ``mfu``, of the products on each device, and as a share of what it
        can do where that is known; ``device_memory_gib`` and its peak, of the fullest one.
        """
        if self._step_seconds is None:
            return {}
        rates = {
            RATE: self.batch_size / self._step_seconds,
            "step_seconds": self._step_seconds,
            DATA_WAIT: self._wait_seconds / self._step_seconds,
        }
        if self._flops:
            rates["flops_per_second"] = self._flops / self._step_seconds
        if self._flops and self._peak:
            rates["mfu"] = rates["flops_per_second"] / self._peak
        rates |= device_memory()
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {rates[RATE]:.0f} images/s, data wait {rates[DATA_WAIT]:.0%}",
            refresh=False,
        )
        return rates

    def close(self) -> None:
        self._bar.close()
