"""What a device sends and holds as devices are added, at as many pairs on each of them.

``python -m benchmarks.scaling`` compiles the loss alone and whole training steps for slices of TPUs
that are not there, and for fake CPU devices.  Nothing runs: bytes are read off the programs.  It
can be stopped and started again: what was compiled is kept.  TPUs need the TPU compiler, which
``make scaling`` unpacks; ``TPU_LIBRARY_PATH`` names another one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Lowered

from benchmarks import scaling_report
from benchmarks.objectives import lowered
from benchmarks.pages import places
from clip_lite_jax.apps.plan import Request, environment
from clip_lite_jax.apps.plan_process import build_target
from clip_lite_jax.apps.plan_program import count, memory_refused
from clip_lite_jax.apps.plan_step import abstract_step
from clip_lite_jax.config import (
    Config,
    CriticConfig,
    DataConfig,
    EncoderConfig,
    ModelConfig,
    NegativesConfig,
    ObjectiveConfig,
    Options,
)
from clip_lite_jax.errors import UserError
from clip_lite_jax.hlo import traffic
from clip_lite_jax.provenance import provenance
from clip_lite_jax.sharding import build_mesh

RESULTS = Path(__file__).parent / "results" / "scaling.json"
QUICK_RESULTS = Path("runs/scaling/quick.json")
LIBTPU = Path(__file__).parent.parent / ".work" / "libtpu" / "libtpu" / "libtpu.so"

LOSS, STEP = "loss", "step"

ALL_IN_MAIN_MEMORY = {"xla_vf_vmem_memory_space_assignment": False}
"""For TPUs: nothing is placed in the memory of the chip, of which the compiler does not tell."""

KEY = ("what", "method", "topology", "devices")


@dataclass(frozen=True)
class Method:
    """An objective with its negatives, as one would set them on many devices."""

    label: str
    objective: str
    negatives: NegativesConfig
    devices: int | None = None
    """How many share a block of lanes of negatives; None is all there are."""
    lanes: int = 8
    """Of a block, or one for each device where those are more."""
    in_steps: bool = False
    """Whole steps are compiled for it as well."""

    def on(self, devices: int, rows: int) -> NegativesConfig:
        """The negatives for so many devices with `rows` pairs each."""
        if self.negatives.name in ("all", "roll"):
            return self.negatives
        sharing = min(self.devices or devices, devices)
        return replace(self.negatives, block=rows * sharing, lanes=max(self.lanes, sharing))


def _one(name: str) -> NegativesConfig:
    return NegativesConfig(name=name, sides="both")


def _all(implementation: str) -> NegativesConfig:
    return NegativesConfig(name="all", sides="both", implementation=implementation)  # type: ignore[arg-type]


METHODS = (
    Method("jsd, shuffle, own rows", "jsd", _one("shuffle"), devices=1, lanes=1),
    Method("jsd, roll", "jsd", _one("roll")),
    Method("jsd, shuffle, 8 devices", "jsd", _one("shuffle"), devices=8, in_steps=True),
    Method("jsd, shuffle, all devices", "jsd", _one("shuffle")),
    Method("jsd, hard, 8 devices", "jsd", _one("hard"), devices=8),
    Method("jsd, importance, 8 devices", "jsd", _one("importance"), devices=8),
    Method("infonce, gather", "infonce", _all("gather"), in_steps=True),
    Method("infonce, ring", "infonce", _all("ring"), in_steps=True),
    Method("sigmoid, ring", "sigmoid", _all("ring")),
)


@dataclass(frozen=True)
class Sweep:
    """Sizes; `tpus` are topologies and `cpus` numbers of devices, by what is compiled for them."""

    tpus: dict[str, tuple[str, ...]]
    cpus: dict[str, tuple[str, ...]]
    rows: dict[str, int]
    """Pairs on each device."""
    width: int
    """Of embeddings."""
    model: ModelConfig
    data: DataConfig


SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP: Options = {"scan": True, "remat": "full"}

FULL = Sweep(
    tpus={
        LOSS: tuple(f"v5e:{sides}" for sides in SLICES),
        STEP: ("v5e:2x4", "v5e:8x8", "v5e:16x16"),
    },
    cpus={LOSS: ("1", "2", "4", "8", "16", "32", "64"), STEP: ("8", "64")},
    rows={LOSS: 1024, STEP: 128},
    width=512,
    # CLIP's text encoder beside the smallest of the common vision transformers.
    model=ModelConfig(
        image=EncoderConfig(name="vit_s16", options=DEEP),
        text=EncoderConfig(name="clip_text", options=DEEP),
        critic=CriticConfig(options={"width": 512, "hidden": 512}),
        dtype="bfloat16",
    ),
    data=DataConfig(source="pairs.csv", image_size=224, vocab_size=49_408, max_tokens=77),
)

QUICK = Sweep(
    tpus={LOSS: ("v5e:2x2", "v5e:2x4"), STEP: ("v5e:2x2",)},
    cpus={LOSS: ("2", "4", "8"), STEP: ("2",)},
    rows={LOSS: 64, STEP: 64},
    width=128,
    model=ModelConfig(
        image=EncoderConfig(name="convnet", options={"widths": [8, 16], "depths": [1, 1]}),
        text=EncoderConfig(name="transformer", options={"width": 16, "layers": 0}),
        critic=CriticConfig(options={"width": 128, "hidden": 16}),
    ),
    data=DataConfig(source="pairs.csv", image_size=16, vocab_size=64, max_tokens=8),
)


def step_config(sweep: Sweep, method: Method, devices: int) -> Config:
    """A run with `method`, of which one step is compiled."""
    rows = sweep.rows[STEP]
    return Config(
        name="scaling",
        steps=1000,
        batch_size=rows * devices,
        model=sweep.model,
        data=sweep.data,
        objective=ObjectiveConfig(name=method.objective),
        negatives=method.on(devices, rows),
    )


def measure(sweep: Sweep, what: str, method: Method, mesh: Mesh) -> dict[str, Any]:
    """One record of the results, all of it of one device."""
    wall, cpu = time.perf_counter(), time.process_time()
    record: dict[str, Any] = {"what": what, "method": method.label, "devices": mesh.size}
    options = None
    if what == LOSS:
        rows = sweep.rows[LOSS]
        negatives = method.on(mesh.size, rows)
        program = lowered(method.objective, negatives, rows * mesh.size, mesh, sweep.width)
        if mesh.devices.flat[0].platform == "tpu":
            options = ALL_IN_MAIN_MEMORY
    else:
        step = abstract_step(step_config(sweep, method, mesh.size), mesh)
        program = step.lowered
        record["parameters"] = count(step.state.params)
    record |= read(program, options)
    record["compile_seconds"] = round(time.perf_counter() - wall, 1)
    record["compile_cpu_seconds"] = round(time.process_time() - cpu, 1)
    return record


def read(program: Lowered, options: dict[str, Any] | None) -> dict[str, Any]:
    """What is sent and held; only what is missing where the TPU has too little memory."""
    try:
        compiled = program.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        refused = memory_refused(str(error))
        if refused is None:
            raise
        return {"refused_bytes": refused[0]}
    moved = traffic(str(compiled.as_text()))
    memory: Any = compiled.memory_analysis()
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "sent_bytes": {kind: round(size) for kind, size in moved.sent.items()},
        "exchanges": moved.count,
    }


def mesh_of(target: str, topology: str) -> Mesh:
    """The devices of a topology, or the first of the fake ones of this process."""
    if target == "tpu":
        return build_mesh(build_target(Request(topology)).devices)
    return build_mesh(jax.devices()[: int(topology)])


def run(
    before: dict[str, Any] | None, sweep: Sweep, target: str, only: str = ""
) -> Iterator[dict[str, Any]]:
    """Part of the results, again and again as it grows; records of `before` are kept."""
    part = before or {"command": "make scaling", "minutes": 0.0, "records": []}
    part |= {"provenance": provenance(), "rows": sweep.rows, "width": sweep.width}
    known = {tuple(record[key] for key in KEY) for record in part["records"]}
    sizes = sweep.tpus if target == "tpu" else sweep.cpus
    for what in (LOSS, STEP):
        for topology in sizes[what]:
            mesh = mesh_of(target, topology)
            for method in METHODS:
                wanted = method.in_steps or what == LOSS
                if not wanted or not re.search(only, method.label):
                    continue
                if (what, method.label, topology, mesh.size) in known:
                    continue
                record = {"topology": topology} | measure(sweep, what, method, mesh)
                part["records"].append(record)
                part["minutes"] += record["compile_seconds"] / 60
                print(*(record[key] for key in (*KEY, "compile_seconds")), "s", flush=True)
                yield part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--on", choices=("cpu", "tpu"), help="compile for these in this process")
    parser.add_argument("--quick", action="store_true", help=f"small sizes, into {QUICK_RESULTS}")
    parser.add_argument("--only", default="", metavar="REGEX", help="methods whose name it finds")
    parser.add_argument("--report", action="store_true", help="only tables and plot, of --out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, help="tables and plot go here")
    arguments = parser.parse_args()
    quick = QUICK_RESULTS if arguments.quick else None
    out, docs = places(arguments.out, arguments.docs, (RESULTS, scaling_report.DOCS), quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.on:
        compile_all(arguments, out)
        return
    if not arguments.report:
        for target in ("cpu", "tpu"):
            in_a_process(target, sys.argv[1:])
    scaling_report.write(json.loads(out.read_text()), docs)
    print(f"written to {out} and {docs}")


def compile_all(arguments: argparse.Namespace, out: Path) -> None:
    """The part of the results for one kind of devices, which this process sees."""
    results = json.loads(out.read_text()) if out.exists() else {}
    sweep = QUICK if arguments.quick else FULL
    for part in run(results.get(arguments.on), sweep, arguments.on, arguments.only):
        results[arguments.on] = part
        out.write_text(json.dumps(results, indent=1) + "\n")


def in_a_process(target: str, flags: Sequence[str]) -> None:
    """This command again, in a process that sees the devices of `target`."""
    os.environ.setdefault("TPU_LIBRARY_PATH", str(LIBTPU))
    largest = int(FULL.cpus[LOSS][-1])
    request = Request(FULL.tpus[LOSS][-1]) if target == "tpu" else Request(devices=largest)
    try:
        variables = environment(request)
    except UserError as error:
        raise SystemExit(str(error)) from error
    command = [sys.executable, "-m", "benchmarks.scaling", "--on", target, *flags]
    subprocess.run(command, env=variables, check=True)


if __name__ == "__main__":
    main()
