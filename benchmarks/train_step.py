"""Training, whole: ``python -m benchmarks.train_step``.

What the training loop costs over the compiled step that it runs, at the size of the quickstart;
and pairs in a second of our steps beside open_clip's, which trains the same towers on the same
machine in turns with ours.  With ``--gpu`` a ResNet-50 and CLIP's text transformer in bfloat16,
and what our step spends its time on.  open_clip runs in the environment ``.venv-peers`` of the
Makefile, unless ``--torch`` names another.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import places, write_tables
from benchmarks.step_worker import CLOCKS, Worker
from benchmarks.train_step_cases import CPU, QUICK, Case, on_gpu
from benchmarks.train_step_tables import tables

RESULTS = Path(__file__).parent / "results" / "train_step.json"
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
QUICK_RESULTS = Path("runs/train_step/quick.json")
PEERS = Path(".venv-peers/bin/python")
PARTS = ("loop", "steps", "jitter")

PAUSE = 0.3
"""Seconds between turns, in which the threads of the framework before come to rest."""
OURS = {"ours, JSD": {"loss": "jsd"}, "ours, InfoNCE": {"loss": "infonce"}}


def theirs(gpu: bool, compiled: bool) -> dict[str, dict[str, bool]]:
    """Ways in which open_clip trains; the fastest counts."""
    ways = {"open_clip, channels_last": {"channels_last": True, "compiled": False}}
    if not gpu:
        ways = {"open_clip": {"channels_last": False, "compiled": False}} | ways
    if compiled:
        # For CPUs the compiler chooses layouts by itself.
        ways["open_clip, compiled"] = {"channels_last": gpu, "compiled": True}
    return ways


Start = Callable[[], Worker]


def measure(
    case: Case,
    start: Mapping[str, Start],
    ways: Mapping[str, dict[str, Any]],
    rounds: int,
    clock: str = "wall",
) -> dict[str, Any]:
    """Seconds of a step of every way, by turns, and what its process says of it.

    Args:
      start: starts the process of a project, by the first word of a way.
      ways: options of what is built, by name; in the order of the turns.
    """
    found: dict[str, Any] = {name: {"seconds": []} for name in ways}
    with ExitStack() as stack:
        workers = {project: make() for project, make in start.items()}
        for worker in workers.values():
            stack.callback(worker.close)
        of = {name: workers[name.split(",")[0]] for name in ways}

        def build(project: str) -> None:
            for name, options in ways.items():
                if name.split(",")[0] == project:
                    losses = of[name].build(name, **options, **case.options)
                    found[name] |= {"losses": losses, "facts": of[name].ask("facts", name)}
                    of[name].ask("rest", name)

        with ThreadPoolExecutor() as pool:  # compiling takes longer than all turns
            list(pool.map(build, workers))
        # One that does not fit, or does not compile, says so.
        running = [name for name in ways if "failed" not in found[name]["facts"]]
        for _ in range(rounds):
            for name in running:
                time.sleep(PAUSE)
                of[name].seconds(1, name)  # wakes the threads
                taken = float(np.median(of[name].seconds(2, name, clock)))
                found[name]["seconds"].append(taken / case.steps)
                of[name].ask("rest", name)
        for name in running:
            if name.startswith("ours") and case.traced:
                found[name]["trace"] = of[name].ask("trace", name)
    return found


def summary(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Pairs in a second, the fastest of open_clip, and ratios to it over turns (quartiles)."""
    rates = {
        name: case.batch / float(np.median(way["seconds"]))
        for name, way in found.items()
        if way["seconds"]
    }
    peers = [name for name in rates if name.startswith("open_clip")]
    fastest = max(peers, key=rates.__getitem__, default=None)
    ratios = {}
    for name in rates:
        if name.startswith("ours") and fastest:
            turns = np.divide(found[fastest]["seconds"], found[name]["seconds"])
            ratios[name] = np.quantile(turns, (0.25, 0.5, 0.75)).tolist()
    return {"rates": rates, "fastest": fastest, "ratios": ratios}


def compare(case: Case, given: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    """One case.  On a GPU the projects take turns where both fit into its memory at once."""
    share = ("0.45" if case.together else "0.92") if gpu else ""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": share} if gpu else {"JAX_PLATFORMS": "cpu"}
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.train_step_jax"],
        "open_clip": [str(given.torch), "-m", "benchmarks.train_step_torch"],
    }
    if given.cores:
        pinned = ["taskset", "-c", ",".join(map(str, range(given.cores)))]
        commands = {project: pinned + command for project, command in commands.items()}
    start: dict[str, Start] = {
        project: lambda command=command: Worker(command, environment)  # type: ignore[misc]
        for project, command in commands.items()
    }
    ways = OURS | theirs(gpu, not given.no_compile)
    groups = [list(start)] if case.together else [[project] for project in start]
    found: dict[str, Any] = {}
    for group in groups:
        chosen = {name: way for name, way in ways.items() if name.split(",")[0] in group}
        found |= measure(case, {p: start[p] for p in group}, chosen, given.rounds, given.clock)
    record = {"label": case.label, "case": case.options, "rounds": given.rounds}
    record |= {"clock": given.clock, "cores": given.cores}
    return record | {"ways": found} | summary(case, found)


def loop_overhead(turns: int, quick: bool) -> dict[str, Any]:
    """Of the loop over its step, in a process of its own."""
    sizes = {"turns": 2, "settle": 2, "steps": 3} if quick else {"turns": turns, "settle": 8}
    command = [sys.executable, "-m", "benchmarks.train_step_loop", json.dumps(sizes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def jitter(gpu: bool) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.train_step_jax", "--jitter"]
    environment = os.environ | ({} if gpu else {"JAX_PLATFORMS": "cpu"})
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=dict(environment)
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def surroundings() -> dict[str, Any]:
    """Where all this ran; asked in a process of its own, for it takes hold of a GPU."""
    script = (
        "import json; from clip_lite_jax.provenance import provenance as p; print(json.dumps(p()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    )
    facts = dict(json.loads(done.stdout.splitlines()[-1]))
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(
            query, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return facts


def run(given: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Measures what is asked for; hands each part over when it is done."""
    place = "gpu" if given.gpu else "cpu"
    facts = {"provenance": surroundings()}
    if "loop" in given.parts and not given.gpu:
        save({"loop": loop_overhead(given.turns, given.quick) | facts})
    if "jitter" in given.parts:
        save({f"jitter {place}": {"sizes": jitter(given.gpu)} | facts})
    if "steps" in given.parts:
        cases: Sequence[Case] = CPU
        if given.gpu:
            cases = [on_gpu(batch, together=batch <= given.together) for batch in given.batches]
        if given.quick:
            cases = QUICK
        records = []
        for case in cases:
            records.append(compare(case, given, given.gpu))
            last = records[-1]
            print(last["label"], last["rates"], last["ratios"], flush=True)
            save({f"steps {place}": {"records": records} | facts})


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--gpu", action="store_true", help="the large case, on the GPU that is here"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--torch", type=Path, default=PEERS, help="Python of open_clip")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each way to train")
    parser.add_argument("--turns", type=int, default=20, help="of the loop and the step by itself")
    parser.add_argument("--batches", type=int, nargs="+", default=(256, 512), help="on the GPU")
    parser.add_argument(
        "--together", type=int, default=256, help="largest batch of which two fit into the GPU"
    )
    parser.add_argument("--cores", type=int, help="on how many to train; all, unless told")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="of a step; on a busy machine 'work', with --cores 1",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help=f"small cases, into {QUICK_RESULTS}")
    parser.add_argument("--tables", action="store_true", help="write the tables again, no more")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path)
    return parser.parse_args(given)


def main() -> None:
    given = arguments()
    quick = QUICK_RESULTS if given.quick else None
    out, docs = places(given.out, given.docs, (RESULTS, DOCS), quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}

    def save(part: dict[str, Any]) -> None:
        results.update(part)
        out.write_text(json.dumps(results, indent=1) + "\n")
        write_tables(docs, tables(results))

    if given.tables:
        save({})
    else:
        run(given, save)
    print(f"written to {out} and {docs}")


if __name__ == "__main__":
    main()
