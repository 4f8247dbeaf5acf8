"""A table of ten million rows: how long it takes to open, and how much memory.

``python -m benchmarks.many_rows`` writes a synthetic table and opens it in a process of its own.
The image files do not exist: what is timed is the table, up to the first batch of (bad) examples.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.provenance import provenance


def write_table(path: Path, rows: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for row in range(rows):
            name = f"images/{row // 1000:05d}/{row:08d}.jpg"
            writer.writerow([name, f"a picture of thing number {row} in the garden"])


def available_mib() -> float:
    """Memory that this machine has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) / 1024


def open_table(path: Path, workers: int) -> dict[str, Any]:
    """Seconds and MiB; runs alone in its process."""
    start = time.perf_counter()
    # Their import counts.
    from clip_lite_jax.config import DataConfig
    from clip_lite_jax.data.bad_examples import BadExamples
    from clip_lite_jax.data.inputs import Pixels, TowerInputs
    from clip_lite_jax.data.pipeline import TrainTransform, train_batches
    from clip_lite_jax.data.sources import build_sources
    from clip_lite_jax.data.tokenizer import Tokenizer, train_tokenizer

    config, bad = DataConfig(source=str(path), image_size=32, workers=workers), BadExamples()
    before = time.perf_counter()
    train = build_sources(config, bad)["train"]
    opened = time.perf_counter()
    tokenizer = Tokenizer(train_tokenizer(["a picture of thing number 1 in the garden"], 30), 24)
    transform = TrainTransform(train, TowerInputs(Pixels(config), tokenizer), config, bad)
    left = available_mib()
    batches = train_batches(transform, 256, 0, 0)
    drawn = np.concatenate([next(batches).index for _ in range(20)])
    done = time.perf_counter()
    # Evenly over the table: the mean distance of 5,120 rows from where even ones would be.
    even = (np.arange(len(drawn)) + 0.5) / len(drawn)
    return {
        "rows": len(train),
        "open_s": opened - before,
        "first_batches_s": done - start,
        "worker_mib": (left - available_mib()) / max(1, workers),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "unevenness": float(np.abs(np.sort(drawn) / len(train) - even).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=0, help="as data.workers")
    parser.add_argument("--open", type=Path, help="open this table, print JSON (for itself)")
    known = parser.parse_args()
    if known.open:
        print(json.dumps(open_table(known.open, known.workers)))
        sys.stdout.flush()
        os._exit(0)  # worker processes would be waited for
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        write_table(path, known.rows)
        command = [sys.executable, "-m", "benchmarks.many_rows", "--open", str(path)]
        command += ["--workers", str(known.workers)]
        for _ in range(3):
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
            print(done.stdout.decode().strip())
        print(f"{path.stat().st_size / 1e9:.2f} GB; {json.dumps(provenance())}")


if __name__ == "__main__":
    main()
