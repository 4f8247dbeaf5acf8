"""JSD with one negative against InfoNCE: same data, model, optimizer and number of steps.

``python -m benchmarks.compare`` trains every row of `ROWS` with every seed, evaluates each run once
on the test splits, and writes the table that reports show beside a run of the same configuration.
It can be stopped and started again: finished runs are kept.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import table as markdown_table
from clip_lite_jax.apps.report_tables import COMPARE_FILE, over_seeds
from clip_lite_jax.config import Config, NegativesConfig, ObjectiveConfig, load_config
from clip_lite_jax.evaluate import evaluate
from clip_lite_jax.metrics import read_metrics, seconds_per_step
from clip_lite_jax.provenance import provenance
from clip_lite_jax.train import train

CONFIG = "configs/quickstart.py"


@dataclass(frozen=True)
class Row:
    label: str
    objective: str
    negatives: NegativesConfig


def rows(config: Config) -> list[Row]:
    """The rows of the table; `hard` as the configuration has it, or with its defaults."""
    chosen = config.negatives
    hard = chosen if chosen.name == "hard" else NegativesConfig(name="hard", sides="both")
    # The same sides for all: with both, `all` is CLIP's symmetric loss.
    return [
        Row("JSD, one shuffled negative", "jsd", replace(hard, name="shuffle")),
        Row("JSD, one hard negative", "jsd", hard),
        Row("InfoNCE, all of the batch", "infonce", replace(hard, name="all")),
    ]


def measure(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains and evaluates one run; a finished one of the same configuration is read back."""
    results = evaluate(train(config, workdir))
    flat = {f"{name}/{k}": v for name, values in results["test"].items() for k, v in values.items()}
    seconds = seconds_per_step(read_metrics(workdir), config.batch_size)
    return {
        "train_seconds": None if seconds is None else round(seconds * config.steps, 1),
        "commit": results["provenance"]["commit"],
        "test": flat,
    }


def compare(config: Config, seeds: list[int], folder: Path, command: str) -> dict[str, Any]:
    """The table, ready for JSON; every number is a list over `seeds`."""
    table = []
    for row in rows(config):
        runs = []
        for seed in seeds:
            changed = replace(
                config,
                seed=seed,
                objective=ObjectiveConfig(name=row.objective),
                negatives=row.negatives,
            )
            name = f"{row.objective}-{row.negatives.name}-{seed}"
            runs.append(measure(changed, folder / name))
        names = runs[0]["test"].keys()
        table.append(
            {
                "label": row.label,
                "objective": row.objective,
                "negatives": row.negatives.name,
                "seeds": seeds,
                "commits": sorted({run["commit"] for run in runs}),
                "train_seconds": [run["train_seconds"] for run in runs],
                "test": {name: [run["test"][name] for run in runs] for name in names},
            }
        )
    return {
        "config_name": config.name,
        "command": command,
        "provenance": provenance(),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "rows": table,
    }


def markdown(table: dict[str, Any]) -> str:
    """The table of R@10 as in ``docs/results.md``: mean and standard deviation over the seeds."""
    first = table["rows"][0]["test"]
    columns = [key for key in first if key.endswith("_r10")]
    names = [key.removeprefix("retrieval/").removesuffix("_r10") for key in columns]
    heads = [name.replace("/", ", ").replace("_to_", " → ").replace("_", " ") for name in names]
    lines = [["run", "training", *heads], ["---"] * (len(columns) + 2)]
    for row in table["rows"]:
        values = [row["test"][key] for key in columns]
        cells = [_mean_and_deviation(v) for v in values]
        lines.append([row["label"], f"{np.median(row['train_seconds']):.0f} s", *cells])
    lines.append(["chance", "", *(f"{first[key + '_chance'][0]:.3f}" for key in columns)])
    return markdown_table(lines)


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean, deviation = over_seeds(values) or (math.nan, None)
    return f"{mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="where runs go")
    parser.add_argument("--out", type=Path, default=COMPARE_FILE)
    arguments = parser.parse_args()
    config = load_config(CONFIG)
    given = shlex.join(sys.argv[1:])
    command = f"python -m benchmarks.compare {given}" if given else "make compare"
    table = compare(config, arguments.seeds, arguments.runs, command)
    arguments.out.write_text(json.dumps(table, indent=1) + "\n")
    print(markdown(table))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
