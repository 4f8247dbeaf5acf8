"""The process in which a plan is made: a request from standard input, a plan to standard output."""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from clip_lite_jax.apps.plan import Request
from clip_lite_jax.apps.plan_program import (
    Estimate,
    Program,
    arguments_of,
    compile_step,
    estimate,
    parameters,
)
from clip_lite_jax.apps.plan_search import Change, changed, changes, largest_batch
from clip_lite_jax.apps.plan_step import AbstractStep, learner_of, vocabulary
from clip_lite_jax.chips import TOPOLOGIES, Chip, chip_of
from clip_lite_jax.config import Config, from_dict
from clip_lite_jax.errors import ConfigError, UserError
from clip_lite_jax.sharding import build_mesh

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """The devices that a step is compiled for."""

    name: str
    devices: list[jax.Device]
    kind: str
    chip: Chip | None
    memory: int | None
    """Bytes that a program may use on one device; None if nobody said."""

    def mesh(self, config: Config) -> Mesh:
        return build_mesh(self.devices, config.mesh)


@dataclass(frozen=True)
class Attempt:
    """A compilation, and what was changed for it."""

    change: Change
    program: Program | None
    """None where the change does not go together with the rest."""
    fits: bool
    reason: str = ""


@dataclass(frozen=True)
class Batches:
    """What the search for the largest batch found."""

    largest: int
    too_large: int | None
    tried: dict[int, int]
    """Bytes needed, by batch."""


@dataclass(frozen=True)
class Plan:
    """All that is printed."""

    config: str
    target: str
    device_kind: str
    devices: int
    batch_size: int
    steps: int
    dtype: str
    vocabulary: int
    vocabulary_source: str
    notes: list[str]
    parameters: dict[str, int]
    memory: int | None
    program: Program
    fits: bool | None
    attempts: list[Attempt]
    """Changes that were tried because it does not fit; the last one fits, or none does."""
    planned: Program
    """What the estimate is of: `program`, or that of the change that fits."""
    estimate: Estimate | None
    batches: Batches | None


def main() -> None:
    given = json.loads(sys.stdin.read())
    try:
        config, request = from_dict(Config, given["config"]), Request(**given["request"])
        answer = asdict(make_plan(config, request))
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def make_plan(config: Config, request: Request) -> Plan:
    """Compiles the step, and others where it does not fit.

    Raises:
      ConfigError: no such topology, no accelerator, or a configuration that cannot run.
    """
    target = build_target(request)
    step, program = _compile(config, target)
    memory = target.memory
    if program.available is not None:
        memory = min(program.available, memory or program.available)
    fits = None if memory is None else program.fits(memory)
    notes = _notes(config)
    attempts: list[Attempt] = []
    planned, of = program, config
    if fits is False and memory is not None:
        attempts = _attempts(config, target, step, program.needed, memory)
        if attempts and attempts[-1].fits and attempts[-1].program:
            planned, of = attempts[-1].program, changed(config, attempts[-1].change)
        else:
            notes.append(_no_way(step, target, program.needed, memory, attempts))
    batches = None
    if memory is not None and (request.fit_batch or _attached(request)):
        batches = _largest_batch(config, target, step, program, memory)
    expected = None
    if planned.work and target.chip:
        expected = estimate(
            planned.work, target.chip, of, len(target.devices), request.utilization, request.price
        )
    size, source = vocabulary(config)
    return Plan(
        config=config.name,
        target=target.name,
        device_kind=target.kind,
        devices=len(target.devices),
        batch_size=config.batch_size,
        steps=config.steps,
        dtype=config.model.dtype,
        vocabulary=size,
        vocabulary_source=source,
        notes=notes,
        parameters=parameters(step.state.params),
        memory=memory,
        program=program,
        fits=fits,
        attempts=attempts,
        planned=planned,
        estimate=expected,
        batches=batches,
    )


def _attached(request: Request) -> bool:
    return request.topology is None and request.devices is None


def build_target(request: Request) -> Target:
    """The devices of a request, none of which is used.

    Raises:
      ConfigError: no such topology, or no accelerator and none named.
    """
    devices = _tpus(request.topology) if request.topology else jax.devices()
    kind = devices[0].device_kind
    if _attached(request) and devices[0].platform == "cpu":
        raise ConfigError(
            "no accelerator is attached: --topology NAME plans for TPUs that are not here "
            f"({', '.join(TOPOLOGIES)}), --devices N for N CPU devices"
        )
    chip = chip_of(kind)
    memory = round(chip.memory_gib * GIB) if chip else None
    if _attached(request):
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", memory)
    if request.memory_gib is not None:
        memory = round(request.memory_gib * GIB)
    name = request.topology or ("attached" if _attached(request) else "not there")
    return Target(name, list(devices), kind, chip, memory)


def _tpus(topology: str) -> list[jax.Device]:
    # A v4 chip is one device to programs on Cloud VMs; the compiler's default is one per core.
    whole = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **whole).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology {topology}: the TPU compiler knows no such one ({error}); some that it "
            f"knows are {', '.join(TOPOLOGIES)}"
        ) from error


def _compile(config: Config, target: Target) -> tuple[AbstractStep, Program]:
    devices = f"{len(target.devices)} × {target.kind} ({target.name})"
    _say(f"compiling for {devices}, batch {config.batch_size} ...")
    step, program = compile_step(config, target.mesh(config))
    _say(f"  {program.seconds:.0f} s, {program.needed / GIB:.2f} GiB")
    return step, program


def _say(line: str) -> None:
    """Compiling takes minutes; standard output is for the plan."""
    print(line, file=sys.stderr, flush=True)


def _attempts(
    config: Config, target: Target, step: AbstractStep, needed: int, memory: int
) -> list[Attempt]:
    """Changes until one fits; none where nothing of it helps."""
    given = sum(arguments_of(step).values())
    module = step.model.module
    towers = {"image": module.image_encoder, "text": module.text_encoder}
    remat = tuple(n for n, m in towers.items() if getattr(m, "remat", "full") != "full")
    attempts: list[Attempt] = []
    shrink = (needed - given) / (memory - given) if given < memory else None
    for change in changes(config, shrink, remat, len(target.devices) // config.mesh.replica):
        try:
            _, program = _compile(changed(config, change), target)
            attempts.append(Attempt(change, program, program.fits(memory)))
        except ConfigError as error:
            attempts.append(Attempt(change, None, False, str(error)))
        if attempts[-1].fits:
            break
    return attempts


def _largest_batch(
    config: Config, target: Target, step: AbstractStep, program: Program, memory: int
) -> Batches:
    tried = {config.batch_size: program}

    def with_batch(batch: int) -> Config:
        return replace(config, batch_size=batch)

    def allowed(batch: int) -> bool:
        try:
            learner_of(with_batch(batch), step.model, target.mesh(config))
        except ConfigError:
            return False
        return True

    def fits(batch: int) -> bool:
        try:
            if batch not in tried:
                tried[batch] = _compile(with_batch(batch), target)[1]
        except ConfigError:  # of an encoder, such as groups of batch statistics
            return False
        return tried[batch].fits(memory)

    unit = len(target.devices) * config.accumulate
    largest, too_large = largest_batch(fits, allowed, config.batch_size, unit)
    needed = {batch: found.needed for batch, found in sorted(tried.items())}
    return Batches(largest, too_large, needed)


def _no_way(
    step: AbstractStep, target: Target, needed: int, memory: int, attempts: list[Attempt]
) -> str:
    """What is left where no change of the configuration makes it fit."""
    given = sum(arguments_of(step).values())
    if given >= memory:
        return (
            f"parameters, optimizer state and batch alone take {given / GIB:.2f} GiB of every "
            "device: more devices with mesh.fsdp=all, a smaller model, optim.name=sgd, or devices "
            "with more memory"
        )
    times = 2 ** math.ceil(math.log2((needed - given) / (memory - given)))
    return (
        f"none of these is enough: a smaller batch_size, or {times} times as many devices, each "
        f"with {1 / times:g} of the rows"
    )


def _notes(config: Config) -> list[str]:
    notes = []
    for tower in ("image", "text"):
        encoder: Any = getattr(config.model, tower)
        if encoder.init_from:
            notes.append(
                f"model.{tower}.init_from={encoder.init_from} is not read: options that it states "
                "are those of the preset here"
            )
    return notes


if __name__ == "__main__":
    main()
