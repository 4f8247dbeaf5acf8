"""A step of our encoders beside PyTorch's, in turns: ``python -m benchmarks.encoders``.

Each case runs on the same machine, weights (`generated`) and inputs, in float32, in one process for
each framework.  The processes take turns, so that a machine that slows down slows down both.  The
losses of the first three steps must agree before anything is timed.  PyTorch runs in the
environment ``.venv-peers`` of the Makefile; where it has several ways to do a case, the
fastest counts.  Every case is written when it is done, in place of its older numbers.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import places, table, write_tables
from benchmarks.step_worker import Worker
from clip_lite_jax.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "encoders.json"
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
QUICK_RESULTS = Path("runs/encoders/quick.json")
PEERS = Path(".venv-peers/bin/python")

PAUSE = 0.3
"""Seconds between turns, in which the threads of the framework before come to rest."""
TOLERANCE = 1e-3
"""Largest relative difference of the losses."""


@dataclass(frozen=True)
class Case:
    name: str
    size: int  # side of the image in pixels, or tokens
    batch: int
    train: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}, {self.size}, batch {self.batch}"


CASES = (
    *(Case("resnet18", size, batch) for size, batch in ((96, 32), (224, 16))),
    *(Case("resnet50", size, batch) for size, batch in ((96, 32), (224, 8))),
    *(Case("vit_s16", size, batch) for size, batch in ((96, 64), (224, 16))),
    Case("efficientnet_lite0", 224, 32, train=False),
    Case("minilm", 16, 64, train=False),
)
QUICK = (Case("resnet18", 32, 4), Case("minilm", 8, 2, train=False))


def variants(case: Case, compiled: bool) -> list[str]:
    """Ways in which PyTorch does a case."""
    images = [] if case.name == "minilm" or case.name.startswith("vit") else ["channels_last"]
    return ["", *images, *(["compile"] if compiled else [])]


def compare(case: Case, workers: dict[str, Worker], rounds: int) -> dict[str, Any]:
    """Medians of seconds for a step, and quartiles of the ratio over rounds."""
    setting = {"name": case.name, "size": case.size, "batch": case.batch, "train": case.train}
    values = {}
    for name, worker in workers.items():
        variant = {} if name == "ours" else {"variant": name.removeprefix("torch").lstrip(", ")}
        values[name] = worker.build(**setting, **variant)
    for name, found in values.items():
        difference = np.max(np.abs(np.divide(found, values["ours"]) - 1))
        if not difference < TOLERANCE:
            raise SystemExit(f"{case.label}: {name} gives {found}, ours {values['ours']}")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            time.sleep(PAUSE)
            worker.seconds(1)  # wakes the threads
            seconds[name].append(float(np.median(worker.seconds(2))))
    medians = {name: float(np.median(found)) for name, found in seconds.items()}
    fastest = min((name for name in medians if name != "ours"), key=lambda name: medians[name])
    ratios = np.divide(seconds[fastest], seconds["ours"])
    return setting | {
        "losses": values,
        "seconds": medians,
        "fastest": fastest,
        "ratio": np.quantile(ratios, (0.25, 0.5, 0.75)).tolist(),
        "rounds": rounds,
    }


def run(
    cases: Iterable[Case], python: Path, rounds: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    torch = [str(python), "-m", "benchmarks.encoders_torch"]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    version = subprocess.run(
        [str(python), "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for case in cases:
        commands = {"ours": [sys.executable, "-m", "benchmarks.encoders_jax"]}
        for variant in variants(case, compiled):
            commands["torch" + (f", {variant}" if variant else "")] = torch
        workers = {name: Worker(command, quiet) for name, command in commands.items()}
        try:
            record = compare(case, workers, rounds)
        finally:
            for worker in workers.values():
                worker.close()
        print(case.label, record["seconds"], record["ratio"], flush=True)
        yield record | {"torch": version, "provenance": provenance()}


def merged(old: Iterable[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with a new one in place of an older one of its case, in the order of `CASES`."""

    def case(record: dict[str, Any]) -> Case:
        return Case(record["name"], record["size"], record["batch"], record["train"])

    records = {case(record): record for record in (*old, new)}
    return sorted(records.values(), key=lambda r: (*CASES, *QUICK).index(case(r)))


def tables(results: dict[str, Any]) -> dict[str, str]:
    lines: list[Sequence[str]] = [
        (
            "encoder",
            "what",
            "pixels or tokens",
            "batch",
            "ours, ms",
            "PyTorch, ms",
            "of it",
            "ratio",
        ),
        ("---",) * 8,
    ]
    for record in results["records"]:
        fastest = record["fastest"]
        low, middle, high = record["ratio"]
        lines.append(
            (
                f"`{record['name']}`",
                "training step" if record["train"] else "features",
                str(record["size"]),
                str(record["batch"]),
                f"{1000 * record['seconds']['ours']:.0f}",
                f"{1000 * record['seconds'][fastest]:.0f}",
                fastest.removeprefix("torch").lstrip(", ") or "as it is",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
            )
        )
    last = results["records"][-1]
    facts = last["provenance"]
    commits = ", ".join(sorted({record["provenance"]["commit"] for record in results["records"]}))
    origin = (
        f"`{results['command']}`, commit {commits}, {facts['machine']}, jax {facts['jax']}, "
        f"torch {last['torch']}, {facts['date']}; {last['rounds']} turns."
    )
    return {"encoders": f"{table(lines)}\n\n{origin}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--torch", type=Path, default=PEERS, help="Python of an environment with it"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help=f"small cases, into {QUICK_RESULTS}")
    parser.add_argument(
        "--only", default="", help="cases whose label holds this; nothing is written"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    quick = QUICK_RESULTS if given.quick else None
    out, docs = places(given.out, given.docs, (RESULTS, DOCS), quick)
    cases = [case for case in (QUICK if quick else CASES) if given.only in case.label]
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {"records": []}
    results["command"] = "python -m benchmarks.encoders"
    for record in run(cases, given.torch, given.rounds, not given.no_compile):
        results["records"] = merged(results["records"], record)
        out.write_text(json.dumps(results, indent=1) + "\n")
        write_tables(docs, tables(results))
    print(f"written to {out} and {docs}")


if __name__ == "__main__":
    main()
