"""Whether a long run grows: ``python -m benchmarks.soak`` trains for two hours and looks on.

A small quickstart runs through the public command, with evaluation and checkpoints, in a process of
its own.  Every half minute its own memory is read (anonymous pages, of the process and its
children, from Linux' ``/proc``; pages of libraries are shared with whatever else runs, and change
with that).  After a warm-up a line is laid through the samples by least squares, memory over steps;
its slope must be below `LIMIT`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.pages import places, table, write_tables
from clip_lite_jax.metrics import METRICS_FILE
from clip_lite_jax.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "soak.json"
DOCS = Path(__file__).parent.parent / "docs" / "long_runs.md"
QUICK_RESULTS = Path("runs/soak/quick.json")

OWN = "pss_anon"
LIMIT = 1.0
"""MiB that a run may grow by in a thousand steps."""
WARM_UP = 0.2
"""Part of the samples that is left out: caches and buffers fill."""
BLOCKS = 12
"""Neighbouring samples are alike, so the interval is of the means of so many blocks of them."""

SETTINGS = {
    "steps": "100000000",
    "batch_size": "16",
    "data.image_size": "32",
    "data.threads": "2",
    "model.image.options": '{"widths": [8, 16], "depths": [1, 1]}',
    "model.text.options": '{"width": 32, "layers": 0}',
    "model.critic.options": '{"width": 32, "hidden": 32}',
    "negatives.block": "16",
    "negatives.lanes": "2",
    "eval.every": "1000",
    "checkpoint.every": "500",
    "log.every": "20",
}
ENDED = 75
"""Status of a run that the clock has ended."""


def command(workdir: Path, minutes: float) -> list[str]:
    settings = SETTINGS | {"checkpoint.stop_after_minutes": f"{minutes:g}"}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    run = ["--config", "configs/quickstart.py", "--workdir", str(workdir)]
    return [sys.executable, "-m", "clip_lite_jax.main", *run, *overrides]


def tree(pid: int) -> list[int]:
    """A process and all that come of it."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in path.read_text().split()]
        except OSError:  # a thread that ended meanwhile
            continue
    return [pid, *(found for child in children for found in tree(child))]


def usage(pid: int) -> dict[str, float]:
    """MiB, threads and open files of a process and its children."""
    found = {"pss": 0.0, "pss_anon": 0.0, "rss": 0.0, "threads": 0, "files": 0}
    for one in tree(pid):
        folder = Path(f"/proc/{one}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
            threads, files = len(list((folder / "task").iterdir())), len(os.listdir(folder / "fd"))
        except OSError:  # a child that ended meanwhile
            continue
        sizes = {line.partition(":")[0].lower(): int(line.split()[1]) / 1024 for line in lines}
        for name in ("pss", "pss_anon", "rss"):
            found[name] += sizes.get(name, 0.0)
        found["threads"] += threads
        found["files"] += files
    return found


def last_step(workdir: Path) -> int:
    """The newest step in ``metrics.jsonl``, of which only the end is read."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut short
            continue
    return 0


def watch(workdir: Path, minutes: float, every: float) -> list[dict[str, float]]:
    """Runs the command to its end and samples it; raises `SystemExit` if it does not end well."""
    workdir.mkdir(parents=True)
    samples = []
    with (workdir / "log").open("w") as log:
        process = subprocess.Popen(command(workdir, minutes), stdout=log, stderr=log)
        begun = time.monotonic()
        try:
            while True:
                try:
                    status = process.wait(every)
                    break
                except subprocess.TimeoutExpired:
                    seconds = round(time.monotonic() - begun, 1)
                    sample = {"seconds": seconds, "step": last_step(workdir), **usage(process.pid)}
                    samples.append(sample)
                    print(json.dumps(sample), flush=True)
        finally:
            process.kill()
    if status != ENDED:
        raise SystemExit(f"the run ended with status {status}: see {workdir / 'log'}")
    return samples


def slope_of(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """MiB of own memory in a thousand steps, with its 95 % interval, after the warm-up.

    Least squares over all samples; the interval by Student's t over means of blocks.
    """
    warm = [s for s in samples if s["step"] > 0]
    warm = warm[int(len(warm) * WARM_UP) : -1]  # at the last it may be ending
    quarter = max(1, len(warm) // 4)
    steps = np.array([s["step"] for s in warm]) / 1000
    memory = np.array([s[OWN] for s in warm])
    blocks = min(BLOCKS, len(warm) // 2)
    if blocks < 3:
        raise SystemExit(f"{len(warm)} samples after the warm-up are too few for a slope")
    x, y = (
        np.array([part.mean() for part in np.array_split(values, blocks)])
        for values in (steps, memory)
    )
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, blocks - 2) * fit.stderr)
    return {
        "slope": float(stats.linregress(steps, memory).slope),
        "interval": [float(fit.slope - half), float(fit.slope + half)],
        "ends": [_typical(part) for part in (warm[:quarter], warm[-quarter:])],
        "lowest": float(memory.min()),
        "highest": float(memory.max()),
        "from_step": int(warm[0]["step"]),
        "to_step": int(warm[-1]["step"]),
        "samples": len(warm),
    }


def _typical(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians: while a checkpoint is written there are more threads and files."""
    names = (OWN, "threads", "files")
    return {name: float(np.median([sample[name] for sample in samples])) for name in names}


def report(results: dict[str, Any]) -> str:
    found, made = results["found"], results["provenance"]
    low, high = found["interval"]
    first, last = found["ends"]
    lines = [
        ("what", "measured"),
        ("---", "---"),
        ("minutes", f"{results['minutes']:g}"),
        ("steps", f"{found['to_step']:,}"),
        ("evaluations", f"{found['to_step'] // int(SETTINGS['eval.every']):,}"),
        ("checkpoints", f"{found['to_step'] // int(SETTINGS['checkpoint.every']):,}"),
        ("own memory, median of the first quarter", f"{first[OWN]:.1f} MiB"),
        ("of the last quarter", f"{last[OWN]:.1f} MiB"),
        ("least and most", f"{found['lowest']:.1f} and {found['highest']:.1f} MiB"),
        ("slope", f"{found['slope']:+.3f} MiB in 1,000 steps"),
        ("its 95 % interval", f"{low:+.3f} to {high:+.3f}"),
        ("threads, in the same quarters", f"{first['threads']:.0f} and {last['threads']:.0f}"),
        ("open files", f"{first['files']:.0f} and {last['files']:.0f}"),
    ]
    return (
        f"{table(lines)}\n\n`{results['command']}`, commit {made['commit']}, {made['machine']} "
        f"({results['cores']} used), jax {made['jax']}, {made['date']}; {found['samples']} samples "
        f"from step {found['from_step']:,} on."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between samples")
    parser.add_argument("--workdir", type=Path, default=Path("runs/soak"), help="must be new")
    parser.add_argument("--out", type=Path, help=f"results (default {RESULTS})")
    parser.add_argument("--page", type=Path, help=f"page to write to (default {DOCS})")
    parser.add_argument("--quick", action="store_true", help="results and page beside the run")
    given = parser.parse_args(arguments)
    quick = QUICK_RESULTS if given.quick else None
    out, page = places(given.out, given.page, (RESULTS, DOCS), quick)
    workdir = given.workdir / time.strftime("%Y%m%d-%H%M%S")
    made = provenance()  # before anybody changes the code
    samples = watch(workdir, given.minutes, given.every)
    results = {
        "command": "python -m benchmarks.soak"
        + (
            f" --minutes {given.minutes:g}"
            if given.minutes != parser.get_default("minutes")
            else ""
        ),
        "minutes": given.minutes,
        "settings": SETTINGS,
        "limit": LIMIT,
        "cores": len(os.sched_getaffinity(0)),
        "found": slope_of(samples),
        "provenance": made,
        "samples": samples,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(page, {"soak": report(results)})
    print(report(results))
    if results["found"]["interval"][1] >= LIMIT:
        raise SystemExit(f"memory may grow by more than {LIMIT:g} MiB in 1,000 steps")


if __name__ == "__main__":
    main()
