"""``clip-lite report RUN RUN …``: runs side by side in one HTML file, read from what they wrote.

Ranks of single queries are in ``results.json``, so that neither models nor data are needed: test
data are not evaluated once more for a comparison, and runs in buckets compare as others do.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clip_lite_jax.apps.compare_plots import overlays
from clip_lite_jax.apps.compare_tables import (
    INCOMPARABLE,
    OTHER_PROTOCOL,
    cost_rows,
    differences,
    notes,
    number_rows,
    paired_rows,
)
from clip_lite_jax.apps.report_cost import Cost, cost
from clip_lite_jax.apps.report_pages import environment
from clip_lite_jax.apps.report_tables import Measured, measured
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import Config, from_dict, to_dict
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.evaluate import read_results
from clip_lite_jax.evaluators.retrieval import Queries
from clip_lite_jax.files import CONFIG_FILE, write_atomic
from clip_lite_jax.metrics import read_metrics

MOST = 26
"""Configurations, which have a letter each."""

SAME_ANYWAY = (
    "name",
    "seed",
    "log",
    "checkpoint",
    "mesh",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "data.max_bad_share",
    "data.strict",
    "data.feature_cache",
    "eval.batch_size",
    "eval.every",
    "resume_from",
)
"""Fields in which runs of one configuration may differ: none changes what is learned on average."""


@dataclass(frozen=True)
class Run:
    """What is read of one run."""

    name: str
    config: Config
    values: Mapping[str, Any]
    """Its configuration, by dotted name."""
    step: int
    fingerprint: str
    """Of the data."""
    lines: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any] | None
    held_out: Measured
    cost: Cost

    @cached_property
    def queries(self) -> dict[str, Queries]:
        """By evaluator, of the test split; nothing where the results are of another step."""
        found = (self.results or {}).get("queries") if self.held_out.stage == "test" else None
        items = found.items() if isinstance(found, dict) else ()
        read = {name: Queries.from_json(values) for name, values in items}
        return {name: queries for name, queries in read.items() if queries is not None}


@dataclass(frozen=True)
class Group:
    """Runs of one configuration on one data set, with several seeds or one."""

    letter: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @property
    def label(self) -> str:
        """For a legend."""
        return f"{self.letter} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.letter


def write_comparison(runs: Sequence[tuple[str, Path]], out: Path) -> Path:
    """Writes the comparison of runs, by name and folder, and returns its path.

    Raises:
      CheckpointError: one of them holds no run with a checkpoint.
      ConfigError: one is given twice, two are of one seed, or there are too many configurations.
    """
    names = [name for name, _ in runs]
    folders = [folder.resolve() for _, folder in runs]
    if twice := sorted(
        {
            n
            for n, folder in zip(names, folders, strict=True)
            if names.count(n) > 1 or folders.count(folder) > 1
        }
    ):
        raise ConfigError(f"{', '.join(twice)}: given twice, and a run is no seed of itself")
    groups = grouped([read_run(name, folder) for name, folder in runs])
    numbers = number_rows(groups)
    context = {
        "groups": groups,
        "notes": notes(groups),
        "differences": differences(groups),
        "numbers": [
            (of, list(rows)) for of, rows in itertools.groupby(numbers, key=lambda row: row.of)
        ],
        "marks": {
            "incomparable": any(row.mark == INCOMPARABLE for row in numbers),
            "protocol": any(row.mark == OTHER_PROTOCOL for row in numbers),
        },
        "paired": paired_rows(groups),
        "plots": overlays(groups),
        "costs": cost_rows(groups),
        "command": " ".join(["clip-lite report", *names, "--out", str(out)]),
    }
    html = environment().get_template("compare.html.j2").render(context)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, html)
    return out


def read_run(name: str, folder: Path) -> Run:
    """Raises `CheckpointError` where there is no run with a checkpoint."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{name} holds no run: there is no {CONFIG_FILE} in it")
    config = from_dict(Config, json.loads(file.read_text()))
    results, lines = read_results(folder), list(read_metrics(folder))
    with Checkpoints.open(folder) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise CheckpointError(f"{name} holds no finished checkpoint yet: nothing to compare")
        fingerprint = checkpoints.meta(step).data_fingerprint
    # How many examples were trained on is not in any file: passes over them are left out here.
    return Run(
        name=name,
        config=config,
        values=_flat(to_dict(config)),
        step=step,
        fingerprint=fingerprint,
        lines=lines,
        results=results,
        held_out=measured(results, step, lines),
        cost=cost(folder, lines, results, step, config.batch_size, 1),
    )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but the seed, and in what changes nothing, are one group.

    Raises:
      ConfigError: too many groups, or two runs of one seed, whose spread is not that of seeds.
    """
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        telling = {name: value for name, value in run.values.items() if not _same_anyway(name)}
        key = json.dumps([run.fingerprint, run.step, telling], sort_keys=True, default=str)
        found[key].append(run)
    if len(found) > MOST:
        raise ConfigError(f"{len(found)} configurations at once: at most {MOST} fit side by side")
    for members in found.values():
        _check_seeds(members)
    return [
        Group(chr(ord("A") + number), sorted(members, key=lambda run: run.config.seed))
        for number, members in enumerate(found.values())
    ]


def _check_seeds(members: Sequence[Run]) -> None:
    """Raises `ConfigError` where two runs of one configuration have one seed, as copies have."""
    by_seed: dict[int, list[str]] = defaultdict(list)
    for run in members:
        by_seed[run.config.seed].append(run.name)
    for seed, names in by_seed.items():
        if len(names) > 1:
            raise ConfigError(
                f"{' and '.join(names)} have the same configuration, data, step and seed={seed}: "
                "they are no two seeds; give one of them"
            )


def _same_anyway(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in SAME_ANYWAY)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a configuration by dotted name; lists are leaves, but those of named things,
    as galleries are."""
    named = isinstance(values, list) and all(isinstance(v, dict) and "name" in v for v in values)
    if named and values:
        values = {item["name"]: item for item in values}
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return found
