"""What one negative per pair is worth, by batch size: ``python -m benchmarks.one_negative``.

Frozen towers, a trained projection per side, equal examples seen.  The learning rate of every row
is chosen on the validation galleries with seeds of its own; the test galleries are ranked once per
run.  Finished runs are kept, so that the command can be stopped and started again.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frozen_features import FEATURES_FILE, Features, load_features
from benchmarks.one_negative_methods import RECIPES, Recipe
from benchmarks.one_negative_report import BEST, FULL, REFERENCE, markdown, plot
from benchmarks.one_negative_train import Setting, Task, Trainer, build_task
from benchmarks.pages import places, write_tables
from clip_lite_jax.files import read_json_lines, write_atomic
from clip_lite_jax.provenance import provenance

RESULTS = Path("benchmarks/results/one_negative.json")
PAGE = Path("docs/one_negative.md")
PICTURE = Path("docs/one_negative.png")
CELLS = Path("runs/one_negative/cells.jsonl")
QUICK_RESULTS = Path("runs/one_negative/quick.json")


@dataclass(frozen=True)
class Plan:
    setting: Setting = field(default_factory=Setting)
    batches: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    selected: tuple[int, ...] = (4, 16, 64, 256, 512, 1024)
    """Batch sizes at which the factor is chosen; interpolated between them, constant beyond."""
    costed: tuple[int, ...] = (64, 512)
    """Batch sizes at which a step's memory is read from its compiled program."""
    factors: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Of `base_rate`."""
    selection_seeds: tuple[int, ...] = tuple(range(100, 104))
    seeds: tuple[int, ...] = tuple(range(32))
    contenders: tuple[str, ...] = ("jsd_hard_memory", "infonce_importance_memory")
    """Rows of one negative of which validation picks one for every batch size; these, and those
    that all are compared with, are run with all seeds."""
    fewer: int = 12
    """Seeds of the other rows, the first of them."""
    recipes: tuple[str, ...] = tuple(RECIPES)


QUICK = Plan(
    setting=Setting(epochs=2, components=4, width=4, hidden=4),
    batches=(4, 8),
    selected=(4,),
    costed=(8,),
    factors=(0.5, 1.0),
    selection_seeds=(100,),
    seeds=(0, 1, 2),
    fewer=2,
    recipes=("infonce", "sigmoid", "jsd_hard_memory", "infonce_importance_memory", "jsd_hard"),
)


def seeds_of(plan: Plan, name: str) -> tuple[int, ...]:
    every = name in (REFERENCE, FULL, *plan.contenders)
    return plan.seeds if every else plan.seeds[: plan.fewer]


def base_rate(batch: int) -> float:
    """The square-root rule: 1e-2 at a batch of 64."""
    return 1e-2 * (batch / 64) ** 0.5


def interpolated(batch: int, known: dict[int, float]) -> float:
    """A number that is known at some batch sizes, linear in the logarithm of the size."""
    sizes = sorted(known)
    return float(np.interp(np.log(batch), np.log(sizes), [known[size] for size in sizes]))


class Cells:
    """Finished runs, one line each, by the settings that made them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = {cell["key"]: cell for cell in read_json_lines(path)}

    def get(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        name = json.dumps(key, sort_keys=True)
        if name not in self.done:
            cell = {"key": name, **measure()}
            with self.path.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            self.done[name] = cell
        return self.done[name]


class RowRuns:
    """All runs of one recipe at one batch size; compiled when the first is needed."""

    def __init__(self, plan: Plan, name: str, batch: int, task: Task, cells: Cells) -> None:
        self.recipe: Recipe = RECIPES[name]
        self.trainer = Trainer(plan.setting, self.recipe, batch, task)
        self.key = {"setting": asdict(plan.setting), "recipe": asdict(self.recipe), "batch": batch}
        self.cells = cells
        self.train: Callable[[int, float], tuple[Any, float]] | None = None

    def run(self, seed: int, factor: float, stage: str) -> dict[str, Any]:
        """R@1 of one run on the galleries of a stage, and its seconds without compilation."""

        def measure() -> dict[str, Any]:
            rate = factor * base_rate(self.trainer.batch)
            if self.train is None:
                self.train = self.trainer.compile()
            params, seconds = self.train(seed, rate)
            return {"top_1": self.trainer.top_1(params, stage), "seconds": round(seconds, 3)}

        return self.cells.get(self.key | {"seed": seed, "factor": factor, "stage": stage}, measure)

    def temporaries(self) -> int:
        key = self.key | {"what": "temporaries"}
        return int(self.cells.get(key, lambda: {"bytes": self.trainer.temporaries()})["bytes"])


def choose(plan: Plan, runs: dict[int, RowRuns]) -> dict[int, tuple[float, float]]:
    """(best mean over the selection seeds, its factor) at each of `plan.selected`."""

    def score(batch: int, factor: float) -> float:
        cells = (runs[batch].run(s, factor, "validation") for s in plan.selection_seeds)
        return float(np.mean([cell["top_1"] for cell in cells]))

    return {b: max((score(b, factor), factor) for factor in plan.factors) for b in plan.selected}


def measure_row(plan: Plan, name: str, task: Task, cells: Cells) -> dict[str, Any]:
    """One row of the table, its numbers by batch size."""
    sizes = sorted({*plan.batches, *plan.selected})
    runs = {batch: RowRuns(plan, name, batch, task, cells) for batch in sizes}
    found = choose(plan, runs)
    validation = {batch: score for batch, (score, _) in found.items()}
    log_factor = {batch: float(np.log(factor)) for batch, (_, factor) in found.items()}
    recipe = RECIPES[name]
    by_batch: dict[int, dict[str, Any]] = {}
    for batch in plan.batches:
        row, factor = runs[batch], float(np.exp(interpolated(batch, log_factor)))
        runs_of_row = [row.run(seed, factor, "test") for seed in seeds_of(plan, name)]
        by_batch[batch] = {
            "factor": factor,
            "validation": interpolated(batch, validation),
            "top_1": [float(np.mean(cell["top_1"])) for cell in runs_of_row],
            "galleries": [cell["top_1"] for cell in runs_of_row],
            "seconds": float(np.median([cell["seconds"] for cell in runs_of_row])),
            "scored": recipe.scored(batch),
            "back_propagated": recipe.back_propagated(batch),
            "temporaries": row.temporaries() if batch in plan.costed else None,
        }
        print(f"{name:26} {batch:5} {np.mean(by_batch[batch]['top_1']):.4f}", flush=True)
    return {"name": name, "label": recipe.label, "batches": by_batch}


def best_on_validation(plan: Plan, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One more row: at every batch size that of the contenders which validation prefers."""
    contenders = [row for row in rows if row["name"] in plan.contenders]
    if len(contenders) < 2:
        return []
    best = {
        batch: max(contenders, key=lambda row: row["batches"][batch]["validation"])
        for batch in plan.batches
    }
    cells = {batch: row["batches"][batch] | {"row": row["label"]} for batch, row in best.items()}
    label = "one chosen negative, by validation"
    return [{"name": BEST, "label": label, "batches": cells}]


def measure(plan: Plan, features: Features, kept: Path) -> Iterator[dict[str, Any]]:
    task = build_task(features, plan.setting.components)
    cells = Cells(kept)
    for name in plan.recipes:
        yield measure_row(plan, name, task, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", type=Path, default=FEATURES_FILE)
    parser.add_argument("--cells", type=Path, default=CELLS, help="where finished runs are kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="the tables go here")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", help="some of the batch sizes")
    parser.add_argument("--rows", nargs="+", choices=RECIPES, help="some of the rows")
    parser.add_argument(
        "--quick", action="store_true", help=f"a few small runs, into {QUICK_RESULTS}"
    )
    arguments = parser.parse_args()
    if arguments.rows and not {REFERENCE, FULL} <= set(arguments.rows):
        parser.error(f"--rows needs {REFERENCE} and {FULL}: the others are compared with them")
    quick = QUICK_RESULTS if arguments.quick else None
    out, page = places(arguments.out, arguments.page, (RESULTS, PAGE), quick)
    picture = arguments.plot or (out.with_suffix(".png") if quick else PICTURE)
    plan = QUICK if arguments.quick else Plan()
    plan = replace(
        plan,
        batches=tuple(arguments.batches or plan.batches),
        recipes=tuple(arguments.rows or plan.recipes),
    )
    rows = list(measure(plan, load_features(arguments.features), arguments.cells))
    rows += best_on_validation(plan, rows)
    results = {
        "command": shlex.join(["python", "-m", "benchmarks.one_negative", *sys.argv[1:]]),
        "provenance": provenance(),
        "plan": asdict(plan),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(results, indent=1) + "\n")
    results = json.loads(out.read_text())
    write_tables(page, {"results": markdown(results)})
    plot(results, picture)
    print(f"written to {out}, {page} and {picture}")


if __name__ == "__main__":
    main()
