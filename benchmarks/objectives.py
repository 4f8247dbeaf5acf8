"""What objectives and their negatives cost: time, memory, and what devices send each other.

``python -m benchmarks.objectives`` measures on CPU devices, and with ``--tpu`` what the compiler
makes of the same programs for TPUs, of which none is needed; ``benchmarks/requirements-tpu.txt``
says in which environment.  Every call writes its part of the results, the tables and the plot.
It can be stopped and started again: what was measured is kept.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered

from benchmarks import objectives_report
from benchmarks.pages import places
from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.hlo import matmul_flops, traffic
from clip_lite_jax.negatives import Pairs, build_sampler
from clip_lite_jax.objectives import STREAMED, build_objective
from clip_lite_jax.provenance import provenance
from clip_lite_jax.sharding import batch_sharding, build_mesh, replicated

RESULTS = Path(__file__).parent / "results" / "objectives.json"
QUICK_RESULTS = Path("runs/objectives/quick.json")
WIDTH = 256

SETTINGS = (
    *((8, batch) for batch in (1024, 4096, 256)),
    *((devices, 128 * devices) for devices in (2, 4)),
    *((1, batch) for batch in (256, 1024, 4096)),
    (8, 16384),
)
"""Devices and pairs of a whole batch, those that matter most first."""

TPU_SETTINGS = (
    *(("v5e:2x4", batch) for batch in (1024, 4096)),
    ("v5e:2x2", 512),
    ("v5e:4x4", 2048),
    ("v5e:4x8", 4096),
    ("v5e:2x4", 16384),
)
"""Topologies of 8, 4, 16 and 32 devices."""

QUICK = ((2, 128), (4, 256))

MAX_TIMED_BYTES = 6 * 2**30
"""Temporary bytes of all devices together above which nothing is timed."""
MAX_TIMED_SECONDS = 12.0
"""CPU seconds after which no further repetition starts."""
REPETITIONS = 5

KEY = ("topology", "case", "devices", "batch")


@dataclass(frozen=True)
class Case:
    label: str
    objective: str
    negatives: NegativesConfig


def _all(objective: str, implementation: str) -> Case:
    negatives = NegativesConfig(name="all", sides="both", implementation=implementation)  # type: ignore[arg-type]
    return Case(f"{objective}, all, {implementation}", objective, negatives)


CASES = (
    Case("jsd, roll", "jsd", NegativesConfig(name="roll", sides="both")),
    Case("jsd, shuffle", "jsd", NegativesConfig(name="shuffle", sides="both")),
    Case("jsd, hard, lane", "jsd", NegativesConfig(name="hard", sides="both")),
    Case("jsd, importance, lane", "jsd", NegativesConfig(name="importance", sides="both")),
    Case(
        "jsd, importance, block",
        "jsd",
        NegativesConfig(name="importance", sides="both", pool="block"),
    ),
    *(_all(name, how) for name in ("infonce", "sigmoid") for how in ("dense", "gather", "ring")),
)


@flax.struct.dataclass
class Cosine:
    """The scores of `models.critics.DotCritic`, for embeddings of unit length."""

    log_temperature: Any
    bias: Any

    def pairs(self, image: Array, text: Array) -> Array:
        return jnp.sum(image * text, axis=-1) / jnp.exp(self.log_temperature) + self.bias

    def matrix(self, image: Array, text: Array) -> Array:
        cosine = jnp.einsum("...nd,...md->...nm", image, text)
        return cosine / jnp.exp(self.log_temperature) + self.bias


@flax.struct.dataclass
class Inputs:
    critic: Cosine
    image: Any  # [B, D]
    text: Any  # [B, D]


def inputs(batch: int, width: int = WIDTH) -> tuple[Inputs, Pairs, Array]:
    """Embeddings of unit length, with nothing masked, and the step's key."""
    image, text = jax.random.normal(jax.random.key(0), (2, batch, width))
    image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    critic = Cosine(jnp.log(jnp.float32(0.07)), jnp.float32(0))
    own = jnp.arange(batch, dtype=jnp.int32)
    group = jnp.stack([own, own + batch], axis=1)
    pairs = Pairs(None, None, group, jnp.ones(batch, bool))
    return Inputs(critic, image, text), pairs, jax.random.key(0)


def shardings(mesh: Mesh) -> tuple[Inputs, NamedSharding, NamedSharding]:
    """How `inputs` lie on the devices."""
    rows, whole = batch_sharding(mesh), replicated(mesh)
    return Inputs(Cosine(whole, whole), rows, rows), rows, whole


def lowered(
    objective: str, negatives: NegativesConfig, batch: int, mesh: Mesh, width: int = WIDTH
) -> Lowered:
    """The loss and its gradient by the embeddings and the critic, ready to compile."""
    sampler = build_sampler(negatives, batch, mesh, STREAMED[objective])
    of_scores = build_objective(objective)

    def loss(learned: Inputs, pairs: Pairs, key: Array) -> Array:
        given = pairs.replace(image=learned.image, text=learned.text)  # type: ignore[attr-defined]
        return of_scores(sampler(key, jnp.zeros((), jnp.int32), given, learned.critic).scores)[0]

    shapes = jax.eval_shape(lambda: inputs(batch, width))
    places = shardings(mesh)
    function = jax.jit(
        jax.value_and_grad(loss), in_shardings=places, out_shardings=(places[2], places[0])
    )
    return function.lower(*shapes)


def compiled(case: Case, batch: int, mesh: Mesh) -> Any:
    # The lanes are one of the rules of the draw: no fewer than devices, and 8 by default.
    negatives = replace(case.negatives, lanes=max(8, mesh.size))
    return lowered(case.objective, negatives, batch, mesh).compile()


def measure(case: Case, batch: int, mesh: Mesh, timed: bool) -> dict[str, Any]:
    """One record of the results; bytes and operations are those of one device."""
    start = time.perf_counter()
    program = compiled(case, batch, mesh)
    seconds = time.perf_counter() - start
    text = program.as_text()
    moved = traffic(text)
    memory = program.memory_analysis()
    record = {
        "case": case.label,
        "devices": mesh.size,
        "batch": batch,
        "compile_seconds": round(seconds, 2),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "sent_bytes": {kind: round(value) for kind, value in moved.sent.items()},
        "exchanges": moved.count,
        "matmul_flops": matmul_flops(text),
        "reported_flops": program.cost_analysis()["flops"],
    }
    if timed and memory.temp_size_in_bytes * mesh.size <= MAX_TIMED_BYTES:
        placed = jax.device_put(inputs(batch), shardings(mesh))
        record |= repeated(lambda: jax.block_until_ready(program(*placed)))
    return record


def repeated(function: Callable[[], Any]) -> dict[str, list[float]]:
    """Wall and CPU seconds of several calls, the first one left out.

    On a machine that others use as well only the latter say what the program takes.
    """
    function()
    wall: list[float] = []
    cpu: list[float] = []
    while len(cpu) < REPETITIONS and sum(cpu) < MAX_TIMED_SECONDS:
        start, used = time.perf_counter(), time.process_time()
        function()
        wall.append(round(time.perf_counter() - start, 6))
        cpu.append(round(time.process_time() - used, 6))
    return {"wall_seconds": wall, "cpu_seconds": cpu}


def cpu_meshes(settings: Iterable[tuple[int, int]]) -> Iterator[tuple[str, Mesh, int]]:
    """Topology, mesh and batch: the first CPU devices."""
    for devices, batch in settings:
        yield "cpu", build_mesh(jax.devices()[:devices]), batch


def tpu_meshes(settings: Iterable[tuple[str, int]]) -> Iterator[tuple[str, Mesh, int]]:
    """Topology, mesh and batch: TPUs that are not there."""
    from jax.experimental import topologies

    for name, batch in settings:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
        yield name, build_mesh(devices), batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tpu", action="store_true", help="compile for TPUs, measure no time")
    parser.add_argument("--quick", action="store_true", help=f"small sizes, into {QUICK_RESULTS}")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
    parser.add_argument("--report", action="store_true", help="only tables and plot, of --out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, help="tables and plot go here")
    arguments = parser.parse_args()
    quick = QUICK_RESULTS if arguments.quick else None
    out, docs = places(arguments.out, arguments.docs, (RESULTS, objectives_report.DOCS), quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}
    if not arguments.report:
        set_up(arguments.tpu)
        name = "tpu" if arguments.tpu else "cpu"
        cases = [case for case in CASES if re.search(arguments.only, case.label)]
        for part in run(results.get(name), cases, arguments.tpu, arguments.quick):
            results[name] = part
            out.write_text(json.dumps(results, indent=1) + "\n")
    objectives_report.write(results, docs)
    print(f"written to {out} and {docs}")


def set_up(tpu: bool) -> None:
    """Makes the devices, before jax looks for any."""
    jax.config.update("jax_platforms", "cpu")
    if tpu:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        return
    jax.config.update("jax_num_cpu_devices", 8)
    # Devices that share a core wait long for each other.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}"


def run(
    before: dict[str, Any] | None, cases: Sequence[Case], tpu: bool = False, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Part of the results, again and again as it grows; records of `before` are kept."""
    if tpu:
        meshes = tpu_meshes(TPU_SETTINGS[:1] if quick else TPU_SETTINGS)
    else:
        meshes = cpu_meshes(QUICK if quick else SETTINGS)
    command = "python -m benchmarks.objectives" + (" --tpu" if tpu else "")
    part = before or {"command": command, "width": WIDTH, "minutes": 0.0, "records": []}
    part["provenance"] = provenance()
    known = {tuple(record[key] for key in KEY) for record in part["records"]}
    for topology, mesh, batch in meshes:
        for case in cases:
            if (topology, case.label, mesh.size, batch) in known:
                continue
            start = time.perf_counter()
            record = {"topology": topology} | measure(case, batch, mesh, timed=not tpu)
            part["records"].append(record)
            part["minutes"] += (time.perf_counter() - start) / 60
            print(*(record[key] for key in KEY), record.get("cpu_seconds"), flush=True)
            yield part


if __name__ == "__main__":
    main()
