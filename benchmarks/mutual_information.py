"""Estimates of mutual information by trained critics, where the truth is known.

``python -m benchmarks.mutual_information`` runs the Gaussian staircase, tasks of the benchmark of
Czyż et al. (arXiv 2306.11078) and the best critic of the staircase, and writes raw results, tables
and the plot.  Settings and `mi_report.HEADLINE` were chosen on seeds from 100 on; the tables show
others.  It can be stopped and started again: finished runs are kept.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import mi_report
from benchmarks.mi_classical import cca, ksg
from benchmarks.mi_tasks import (
    DIMENSIONS,
    LEVELS,
    STAIRCASE,
    TASKS,
    Task,
    gaussian_log_ratio,
    gaussian_pairs,
    normal_scores,
)
from benchmarks.mi_training import (
    BLOCK,
    CRITICS,
    GROUP,
    TRAININGS,
    Trainer,
    held_out_read_offs,
    make_held_out,
    make_trainer,
)
from benchmarks.pages import places
from clip_lite_jax.evaluators.information import certified_bound
from clip_lite_jax.files import write_atomic
from clip_lite_jax.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "mutual_information.json"
QUICK_RESULTS = Path("runs/mutual_information/quick.json")


@dataclass(frozen=True)
class Settings:
    """What a run costs."""

    levels: tuple[float, ...] = LEVELS
    seeds: tuple[int, ...] = (0, 1, 2)
    staircases: tuple[str, ...] = tuple(STAIRCASE)
    critics: tuple[str, ...] = tuple(CRITICS)
    trainings: tuple[str, ...] = tuple(TRAININGS)
    tasks: tuple[str, ...] = tuple(task.name for task in TASKS)
    steps: int = 4000  # per level
    held_out: int = 16 * BLOCK  # pairs
    task_steps: int = 2000
    task_checks: int = 8  # looks at the validation pairs
    oracle_samples: int = 4_000_000


QUICK = Settings(
    levels=LEVELS[:1],
    seeds=(100,),
    staircases=("plain",),
    critics=("concat",),
    trainings=("jsd_one", "mine"),
    tasks=("1v1-normal-0.75",),
    steps=50,
    held_out=2 * BLOCK,
    task_steps=50,
    task_checks=1,
    oracle_samples=100_000,
)

VALIDATION = 4 * BLOCK
TEST = 19 * BLOCK
SAMPLES = 10_000
"""Pairs of a task, VALIDATION and TEST among them; training has the rest."""

CURVE_POINTS = 20
"""Per level, of the plotted curves."""


SIDE_RUNS: dict[tuple[str, str], tuple[str, ...]] = {
    ("cubic, normal scores", "separable"): ("jsd_one", "dv", "infonce"),
    ("cubic, normal scores", "concat"): (),
}
"""The trainings of a staircase and critic that does not have them all."""


def staircase(settings: Settings, runs: Path) -> Iterator[dict[str, Any]]:
    """One record for each staircase, critic, training, seed and level."""
    for task in settings.staircases:
        for critic in settings.critics:
            for training in SIDE_RUNS.get((task, critic), settings.trainings):
                for seed in settings.seeds:
                    yield from kept(
                        runs / f"{task}-{critic}-{training}-{seed}.json",
                        [settings.levels, settings.steps, settings.held_out],
                        partial(climb, settings, task, critic, training, seed),
                    )


def climb(
    settings: Settings, task: str, critic: str, training: str, seed: int
) -> Iterator[dict[str, Any]]:
    """One record for each level.

    A critic climbs the levels one after the other, as in the literature; each step brings new
    pairs.  ``batch`` has mean and variance of read-offs over the last eighth of a level's batches.
    """
    draw = STAIRCASE[task]
    trainer = _staircase_trainer(task, critic, training, settings.steps)
    key, start = jax.random.split(jax.random.key(seed))
    state = trainer.init(start, DIMENSIONS, DIMENSIONS)
    for level in settings.levels:
        key, steps, fresh = jax.random.split(key, 3)
        information = jnp.array(level)
        began = time.perf_counter()
        state, batches = trainer.run(state, steps, information)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        pairs = draw(fresh, settings.held_out, information)
        yield {
            "task": task,
            "critic": critic,
            "training": training,
            "seed": seed,
            "level": level,
            "held_out": held_out_read_offs(_reader(critic)(state.params, *pairs)),
            "batch": _window(batches, settings.steps // 8),
            "curve": _curves(batches) if seed == settings.seeds[0] else None,
            "seconds": round(seconds, 2),
        }


@cache
def _staircase_trainer(task: str, critic: str, training: str, steps: int) -> Trainer:
    return make_trainer(CRITICS[critic], TRAININGS[training], STAIRCASE[task], steps, steps)


@cache
def _reader(critic: str) -> Callable[[Any, Array, Array], np.ndarray]:
    return make_held_out(CRITICS[critic])


def kept(
    file: Path, settings: Sequence[Any], make: Callable[[], Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The records that `make` yields, or that a run with the same settings left in `file`."""
    wanted = json.loads(json.dumps(settings))
    if file.exists():
        found = json.loads(file.read_text())
        if found["settings"] == wanted:
            return list(found["records"])
    records = [_finite(record) for record in make()]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"settings": wanted, "records": records}))
    print(file.stem, flush=True)
    return records


def _window(batches: dict[str, Array], width: int) -> dict[str, dict[str, float]]:
    last = {name: np.asarray(values[-width:], np.float64) for name, values in batches.items()}
    with np.errstate(all="ignore"):  # a critic that has left for infinity says so in the table
        stats = {name: {"mean": v.mean(), "variance": v.var(ddof=1)} for name, v in last.items()}
    if "jsd_loss" in stats:
        bound = certified_bound(stats.pop("jsd_loss")["mean"])
        stats["jsd_lower_bound"] = {"mean": bound, "variance": math.nan}
    return {name: {k: float(v) for k, v in stat.items()} for name, stat in stats.items()}


def _curves(batches: dict[str, Array]) -> dict[str, list[float]]:
    with np.errstate(all="ignore"):
        means = {
            name: [float(part.mean()) for part in np.array_split(np.asarray(v), CURVE_POINTS)]
            for name, v in batches.items()
        }
    if "jsd_loss" in means:
        means["jsd_lower_bound"] = [certified_bound(loss) for loss in means.pop("jsd_loss")]
    return {name: [round(v, 3) for v in values] for name, values in means.items()}


TASK_RUNS = (
    ("jsd_one", "standardised"),
    ("jsd_one", "normal scores"),
    ("nwj", "standardised"),
    ("mine", "standardised"),
    ("infonce", "standardised"),
)
"""Trainings and inputs on the tasks, all with the concat critic."""


def known_tasks(settings: Settings, runs: Path) -> Iterator[dict[str, Any]]:
    """One record for each task, seed and estimator."""
    for name in settings.tasks:
        task = next(task for task in TASKS if task.name == name)
        for seed in settings.seeds:
            yield from kept(
                runs / f"{name}-{seed}.json",
                [settings.task_steps, settings.task_checks],
                partial(estimate, settings, task, seed),
            )


def estimate(settings: Settings, task: Task, seed: int) -> Iterator[dict[str, Any]]:
    """One record for each estimator: 10 000 pairs, half of them for the test.

    A critic is read on the test pairs at the step that was best on the validation pairs.
    """
    x, y = task.sample(np.random.default_rng([seed, 2306]), SAMPLES)
    common = {"task": task.name, "information": task.information, "seed": seed}
    yield common | {"training": "cca", "values": {"cca": cca(x, y)}}
    yield common | {"training": "ksg", "values": {"ksg": ksg(x, y)}}
    read = _reader("concat")
    for name, inputs in TASK_RUNS:
        if name not in settings.trainings:
            continue
        chosen_by = TRAININGS[name].chosen_by
        trainer = _task_trainer(name, settings.task_steps, settings.task_checks)
        parts = _split(*(prepared(part, inputs) for part in (x, y)))
        key, start = jax.random.split(jax.random.key(seed))
        state = trainer.init(start, x.shape[1], y.shape[1])
        best, chosen = -math.inf, state.params
        for one in jax.random.split(key, settings.task_checks):
            state, _ = trainer.run(state, one, parts["training"])
            value = held_out_read_offs(read(state.params, *parts["validation"]), [chosen_by])
            if value[chosen_by] > best:
                best, chosen = value[chosen_by], state.params
        values = held_out_read_offs(read(chosen, *parts["test"]))
        yield common | {"training": name, "inputs": inputs, "values": values}


@cache
def _task_trainer(training: str, steps: int, checks: int) -> Trainer:
    chosen = TRAININGS[training]
    return make_trainer(CRITICS["concat"], chosen, draw_rows, steps // checks, steps)


def draw_rows(key: Array, count: int, source: tuple[Array, Array]) -> tuple[Array, Array]:
    """`count` different rows of a sample ``[N, dx], [N, dy]``."""
    rows = jax.random.choice(key, len(source[0]), (count,), replace=False)
    return source[0][rows], source[1][rows]


def prepared(points: np.ndarray, inputs: str) -> Array:
    """Coordinates ``[N, d]`` at unit variance, or as normal scores, by the training rows alone."""
    training = points[VALIDATION + TEST :]
    if inputs == "normal scores":
        return normal_scores(training)(jnp.asarray(points, jnp.float32))
    scaled = (points - training.mean(axis=0)) / training.std(axis=0)
    return jnp.asarray(scaled, jnp.float32)


def _split(x: Array, y: Array) -> dict[str, tuple[Array, Array]]:
    ends = {"validation": slice(VALIDATION), "test": slice(VALIDATION, VALIDATION + TEST)}
    ends["training"] = slice(VALIDATION + TEST, None)
    return {name: (x[rows], y[rows]) for name, rows in ends.items()}


ORACLE_SIZE = 100_000
"""Pairs that `oracle` draws at a time."""


def oracle(level: float, samples: int, seed: int = 0) -> dict[str, float]:
    """Read-offs of the best critic, T = log r, on the staircase; `samples` pairs and shufflings.

    ``_error`` is the standard error of the number before it, in nats.
    """
    keys = jax.random.split(jax.random.key(seed), max(1, samples // ORACLE_SIZE))
    moments = np.mean(
        [np.asarray(_oracle_moments(key, jnp.array(level)), np.float64) for key in keys], axis=0
    )
    count = len(keys) * ORACLE_SIZE
    mean, variance = moments[:, 0], (moments[:, 1] - moments[:, 0] ** 2) / count
    loss = float(mean[0] + mean[1])
    return {
        "level": level,
        "samples": count,
        "jsd_loss": loss,
        "jsd_loss_error": float(np.sqrt(variance[0] + variance[1])),
        "score_positive": float(mean[2]),
        "jsd_lower_bound": certified_bound(loss),
        "nwj_shifted": 1 + float(mean[2] + mean[3]),
        "nwj_shifted_error": float(np.sqrt(variance[2] + variance[3])),
    }


@jax.jit
def _oracle_moments(key: Array, information: Array) -> Array:
    """First and second moments ``[4, 2]`` of what the bounds average."""
    p, q, r = jax.random.split(key, 3)
    positive = gaussian_log_ratio(*gaussian_pairs(p, ORACLE_SIZE, information), information)
    x, y = (jax.random.normal(k, (ORACLE_SIZE, DIMENSIONS)) for k in (q, r))
    negative = gaussian_log_ratio(x, y, information)
    terms = jax.nn.softplus(-positive), jax.nn.softplus(negative), positive, -jnp.exp(negative)
    return jnp.stack([jnp.stack([t.mean(), jnp.square(t).mean()]) for t in terms])


def run(settings: Settings, runs: Path, command: str) -> dict[str, Any]:
    """All results, ready for JSON; numbers that are not finite become None."""
    oracles = [
        kept(
            runs / f"oracle-{level:.0f}.json",
            [settings.oracle_samples],
            lambda level=level: iter([oracle(level, settings.oracle_samples)]),  # type: ignore[misc]
        )[0]
        for level in settings.levels
    ]
    return {
        "command": command,
        "provenance": provenance(),
        "settings": asdict(settings) | {"batch": GROUP},
        "oracle": oracles,
        "tasks": list(known_tasks(settings, runs)),
        "staircase": list(staircase(settings, runs)),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"seconds, into {QUICK_RESULTS}")
    parser.add_argument("--report", action="store_true", help="tables and plot of --out, no run")
    parser.add_argument("--runs", type=Path, default=Path("runs/mutual_information"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, help="tables and plot go here")
    arguments = parser.parse_args()
    quick = QUICK_RESULTS if arguments.quick else None
    out, docs = places(arguments.out, arguments.docs, (RESULTS, mi_report.DOCS), quick)
    given = shlex.join(sys.argv[1:])
    command = f"python -m benchmarks.mutual_information {given}".strip()
    if not arguments.report:
        results = run(QUICK if arguments.quick else Settings(), arguments.runs, command)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results) + "\n")
    mi_report.write(json.loads(out.read_text()), docs)
    print(f"written to {out} and {docs}")


if __name__ == "__main__":
    main()
