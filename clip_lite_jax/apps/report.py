"""The report of a run: one HTML file that holds everything it shows, to read offline or to send on.

What was measured comes from ``results.json`` (the test splits, evaluated once), or, before there is
one, from the latest validation numbers in ``metrics.jsonl``.  Example searches, the breakdown by
category and the histogram are made from the newest checkpoint on the same examples.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.agreement import check_same_data
from clip_lite_jax.apps.report_commands import commands
from clip_lite_jax.apps.report_cost import cost
from clip_lite_jax.apps.report_data import Health, data_health
from clip_lite_jax.apps.report_errors import build_errors
from clip_lite_jax.apps.report_gallery import build_gallery, shorten
from clip_lite_jax.apps.report_information import information_curves
from clip_lite_jax.apps.report_map import embedding_map
from clip_lite_jax.apps.report_pages import environment
from clip_lite_jax.apps.report_plots import curves, histogram
from clip_lite_jax.apps.report_tables import (
    categories,
    comparison,
    directions,
    information,
    measured,
)
from clip_lite_jax.apps.report_tasks import tasks_of_model, tasks_of_run
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import Config, from_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.evaluate import read_results
from clip_lite_jax.evaluators.information import Information, matched_and_shuffled
from clip_lite_jax.evaluators.retrieval import Retrieval
from clip_lite_jax.files import REPORT_FILE, write_atomic
from clip_lite_jax.inference import load
from clip_lite_jax.metrics import read_metrics, seconds_per_step
from clip_lite_jax.objectives import OPTIMAL_CRITIC
from clip_lite_jax.provenance import provenance
from clip_lite_jax.run import CONFIG_FILE, SKIPPED_FILE, Run, build_run

SKIPPED_SHOWN = 20


def write_report(workdir: Path, name: str = "") -> Path:
    """Writes ``report.html`` into a run's workdir and returns its path.

    `name` is what the report calls the workdir, where that is a copy of what a bucket holds.

    Raises:
      CheckpointError: no run there, or one without a checkpoint.
      ConfigError, DataError: the run's data are no longer what they were.
    """
    run, step = _open_run(workdir)
    config = run.config
    lines = list(read_metrics(workdir))
    results = read_results(workdir)
    held_out = measured(results, step, lines)
    health = data_health(run.sources, run.tokenizer, config.data)
    spent = cost(workdir, lines, results, step, config.batch_size, len(run.sources["train"]))
    of_model, unread = tasks_of_model(workdir, step)
    context = {
        "config": config,
        "workdir": name or workdir,
        "training": _training(health, step, lines, config.batch_size),
        "health": health,
        "cost": spent,
        "tasks": [*tasks_of_run(results, held_out.numbers, held_out.stage), *of_model],
        "unread_tasks": unread,
        "measured": held_out,
        "provenance": results["provenance"] if results else provenance(),
        "directions": directions(held_out.numbers),
        "information": information(held_out.numbers),
        "optimum": OPTIMAL_CRITIC[config.objective.name],
        "comparison": comparison(config, held_out),
        "plots": curves(lines, config.objective.name, config.negatives.name == "hard"),
        "information_plot": information_curves(lines, config),
        "examples": _examples(run, held_out.stage),
        "skipped": _skipped(workdir),
        "commands": commands(config, name or workdir),
    }
    html = environment().get_template("report.html.j2").render(context)
    path = workdir / REPORT_FILE
    if run.is_writer:
        write_atomic(path, html)
    return path


def _open_run(workdir: Path) -> tuple[Run, int]:
    """The run of a workdir and the step of its newest checkpoint."""
    file = workdir / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{workdir} holds no run: there is no {CONFIG_FILE} in it")
    with Checkpoints.open(workdir) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise CheckpointError(f"{workdir} holds no finished checkpoint yet: nothing to report")
        run = build_run(from_dict(Config, json.loads(file.read_text())), workdir)
        check_same_data(workdir, run.meta, checkpoints.meta(step))
    return run, step


@dataclass(frozen=True)
class Training:
    """How long and on how much."""

    step: int
    images: int
    captions: int
    """Of those images that were looked at."""
    all_looked_at: bool
    seconds: float | None
    """Time in steps, compilation and evaluation left out; None if no rate was logged."""


def _training(
    health: Health, step: int, lines: Sequence[Mapping[str, Any]], batch_size: int
) -> Training:
    train = health.splits[0]
    seconds = seconds_per_step(lines, batch_size)
    return Training(
        step,
        train.images,
        train.captions,
        train.looked_at == train.images,
        None if seconds is None else seconds * step,
    )


def _examples(run: Run, stage: str) -> dict[str, Any]:
    """What is shown of single held-out examples, from the newest checkpoint."""
    model = load(run.workdir, run.config.eval.batch_size)
    fns, inputs = model.fns, run.inputs(model.params, model.model_state)
    shown: dict[str, Any] = {
        "galleries": [], "categories": {}, "errors": [], "scores": None, "map": None
    }  # fmt: skip
    for name, evaluator in run.evaluators(stage, inputs, tasks=False).items():
        gallery = name.removeprefix("retrieval/")
        of = evaluator.pairs if isinstance(evaluator, Information) else evaluator
        assert isinstance(of, Retrieval)
        images, texts = of.embedded(fns)
        scores = of.scores_of(fns, images, texts)
        shown["map"] = shown["map"] or embedding_map(of, images, texts)
        if isinstance(evaluator, Information):
            shown["scores"] = _score_histogram(scores)
        else:
            shown["galleries"].append(build_gallery(gallery, of, scores))
            shown["categories"][gallery] = categories(of, scores)
            shown["errors"].append(build_errors(gallery, of, scores))
    return shown


def _score_histogram(scores: np.ndarray) -> dict[str, Any]:
    """From scores ``[N, N]`` of N pairs: the diagonal is matched, the rest shuffled."""
    matched, shuffled = matched_and_shuffled(scores)
    return {
        "plot": histogram(matched, shuffled),
        "matched": len(matched),
        "shuffled": len(shuffled),
        "matched_right": float(np.mean(matched > 0)),
        "shuffled_right": float(np.mean(shuffled < 0)),
    }


def _skipped(workdir: Path) -> dict[str, Any]:
    reasons = BadExamples(workdir / SKIPPED_FILE).reasons  # each process lists what it has met
    some = itertools.islice(reasons.items(), SKIPPED_SHOWN)
    shown = [(shorten(id, 120), shorten(reason, 200)) for id, reason in some]
    return {"count": len(reasons), "shown": shown}
