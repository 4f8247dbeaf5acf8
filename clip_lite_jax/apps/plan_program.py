"""What a compiled training step needs and does, and the time that it takes at best."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from clip_lite_jax.apps.plan_step import AbstractStep, abstract_step
from clip_lite_jax.chips import Chip
from clip_lite_jax.config import Config
from clip_lite_jax.hlo import matmul_flops, traffic
from clip_lite_jax.hlo_collectives import Collective, collectives
from clip_lite_jax.hlo_memory import bytes_moved

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Work:
    """Of one step on one device."""

    flops: int
    bytes_moved: int
    """To and from the device's main memory."""
    sent: dict[str, int]
    """Bytes that leave the device, by kind of collective."""
    exchanges: dict[str, int]
    collectives: list[Collective]
    """The same by what it is for."""


@dataclass(frozen=True)
class Program:
    """A step after compilation."""

    needed: int
    """Bytes of a device's memory."""
    seconds: float
    """That it took to compile."""
    memory: dict[str, int]
    """What `needed` is made of; empty where the compiler gave up for lack of memory."""
    work: Work | None
    """None where the compiler gave up."""
    available: int | None = None
    """Bytes of memory that the compiler then said there are."""

    def fits(self, memory: int) -> bool:
        """Whether it runs on a device with so many bytes."""
        return self.work is not None and self.needed <= memory


@dataclass(frozen=True)
class Estimate:
    """A roofline: a step takes the longest of three times, each as if the other two took none."""

    utilization: float
    """Part of the peak at which products are made."""
    seconds: dict[str, float]
    """Of a step, by what takes it: ``compute``, ``memory``, ``network``."""
    bound: str
    """What takes longest."""
    steps_per_second: float
    images_per_second: float
    hours: float
    chip_hours: float
    cost: float | None
    """In USD, or None without a price."""


def compile_step(config: Config, mesh: Mesh) -> tuple[AbstractStep, Program]:
    """Compiles the training step of `config` for `mesh`.

    Raises:
      ConfigError: what does not go together, or sizes that do not divide.
    """
    start = time.perf_counter()
    step = abstract_step(config, mesh)
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = memory_refused(str(error))
        if refused is None:
            raise
        needed, available = refused
        return step, Program(needed, time.perf_counter() - start, {}, None, available)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    moved = traffic(text)
    memory = memory_of(step, compiled.memory_analysis())
    work = Work(
        matmul_flops(text),
        bytes_moved(text),
        {kind: round(size) for kind, size in moved.sent.items()},
        moved.count,
        collectives(text),
    )
    return step, Program(sum(memory.values()), seconds, memory, work)


def memory_refused(message: str) -> tuple[int, int] | None:
    """Bytes that a program needs and those there are, from a TPU compiler's refusal.

    None for any other error.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    sizes = re.findall(r"([\d.]+)([KMGT])\b", message)
    if len(sizes) < 2:
        return None
    needed, available = (round(float(number) * UNITS[unit]) for number, unit in sizes[:2])
    return needed, available


def memory_of(step: AbstractStep, analysis: Any) -> dict[str, int]:
    """Bytes on one device, by what they are for; their sum is what the device must have."""
    arguments = arguments_of(step)
    # An update in place: most of the new state lies where the old one lay.
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return arguments | {
        "padding of these": max(0, analysis.argument_size_in_bytes - sum(arguments.values())),
        "temporaries": analysis.temp_size_in_bytes + new,
        "program": analysis.generated_code_size_in_bytes,
    }


def arguments_of(step: AbstractStep) -> dict[str, int]:
    """Bytes on one of the devices of what a step takes, padding left out."""
    state = step.state
    parts = {
        "parameters": size(state.params),
        "optimizer state": size(state.opt_state),
        "moving average": size(state.ema),
        "batch statistics": size(state.model_state),
        "kept for negatives": size(state.target),
        "batch": size(step.batch),
    }
    return {name: value for name, value in parts.items() if value}


def size(tree: Any) -> int:
    """Bytes on one device of a tree of shapes that know their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parameters(params: Mapping[str, Any]) -> dict[str, int]:
    """How many, by tower and head."""
    return {name: count(tree) for name, tree in params.items()}


def estimate(
    work: Work,
    chip: Chip,
    config: Config,
    devices: int,
    utilization: float,
    price: float | None = None,
) -> Estimate:
    """The roofline of a run: products at `utilization` of the peak, the rest at full speed."""
    peak = chip.bfloat16_tflops if config.model.dtype == "bfloat16" else chip.float32_tflops
    seconds = {
        "compute": work.flops / (peak * 1e12 * utilization),
        "memory": work.bytes_moved / (chip.memory_gb_s * 1e9),
        "network": sum(work.sent.values()) / (chip.network_gb_s * 1e9),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    hours = seconds[bound] * config.steps / 3600
    return Estimate(
        utilization=utilization,
        seconds=seconds,
        bound=bound,
        steps_per_second=1 / seconds[bound],
        images_per_second=config.batch_size / seconds[bound],
        hours=hours,
        chip_hours=hours * devices,
        cost=None if price is None else hours * devices * price,
    )
