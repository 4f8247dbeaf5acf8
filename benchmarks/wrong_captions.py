"""Wrong captions found by the scores of critics: ``python -m benchmarks.wrong_captions``.

A fifth of the captions of held-out pairs are exchanged, and the AUROC says how well scores tell
which.  Learning rates are chosen on the validation splits with seeds of their own; test splits are
scored once per run.  Finished runs are kept, so that the command can be stopped and started again.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.one_negative import base_rate
from benchmarks.one_negative_train import Setting
from benchmarks.pages import places, write_tables
from benchmarks.wrong_captions_report import markdown, plot
from benchmarks.wrong_captions_train import (
    GALLERIES,
    METHODS,
    Gallery,
    MethodRuns,
    Pairs,
    load_pairs,
)
from clip_lite_jax.evaluators.bootstrap import drawn_groups
from clip_lite_jax.evaluators.calibration import (
    Calibration,
    Trials,
    quality,
    quality_with_intervals,
    reliability_rows,
    trials_of,
)
from clip_lite_jax.evaluators.pair_scores import contrasts, ranks_among
from clip_lite_jax.files import write_atomic
from clip_lite_jax.provenance import provenance

RESULTS = Path("benchmarks/results/wrong_captions.json")
PAGE = Path("docs/score.md")
PICTURE = Path("docs/wrong_captions.png")
FOLDER = Path("runs/wrong_captions")

STATISTICS = ("T", "contrast", "rank")


@dataclass(frozen=True)
class Plan:
    setting: Setting = field(default_factory=Setting)
    batch: int = 128
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Of `base_rate`."""
    selection_seeds: tuple[int, ...] = (100, 101, 102)
    seeds: tuple[int, ...] = tuple(range(10))
    methods: tuple[str, ...] = tuple(METHODS)
    share: float = 0.2
    """Of the captions that are exchanged."""
    draws: int = 20
    """Ways to choose and exchange them, the same for every model."""
    others: int = 256
    """Captions that a pair's own is ranked among, as by `clip-lite score`."""
    resamples: int = 1000


QUICK = Plan(
    setting=Setting(epochs=2, components=8, width=4, hidden=4),
    factors=(0.5, 1.0),
    selection_seeds=(100,),
    seeds=(0, 1),
    draws=2,
    resamples=50,
)


@dataclass(frozen=True)
class Draw:
    """One way to make captions wrong."""

    caption: np.ndarray  # [N] place in the gallery's captions
    wrong: np.ndarray  # bool [N]


def swap(
    groups: np.ndarray, captions: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Whose caption each of N pairs gets, ``[N]``; `share` of them another's.

    Those are deranged among themselves, and none gets a caption of its own group or an equal one.
    """
    count = len(groups)
    chosen = rng.choice(count, round(share * count), replace=False)

    def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (groups[a] == groups[b]) | (captions[a] == captions[b])

    given = rng.permutation(chosen)
    for _ in range(10_000):
        bad = np.flatnonzero(alike(chosen, given))
        if not len(bad):
            break
        # What may not stay where it is changes places with a random one.
        for place in bad:
            other = rng.integers(len(chosen))
            given[[place, other]] = given[[other, place]]
    else:
        raise ValueError(f"no exchange of {len(chosen)} captions keeps all of them wrong")
    result = np.arange(count)
    result[chosen] = given
    return result


def draws_of(gallery: Gallery, plan: Plan, seed: int) -> list[Draw]:
    """Each with one random caption of every image, of which a share is exchanged."""
    found = []
    first = np.searchsorted(gallery.owner, np.arange(len(gallery.groups)))
    counts = np.bincount(gallery.owner)
    for number in range(plan.draws):
        rng = np.random.default_rng((seed, number))
        caption = first + rng.integers(counts)
        source = swap(gallery.groups, gallery.captions[caption], plan.share, rng)
        found.append(Draw(caption[source], source != np.arange(len(source))))
    return found


def statistics(scores: np.ndarray, gallery: Gallery, draw: Draw, others: int) -> dict[str, Any]:
    """By each of `STATISTICS` a number ``[N]``, lower where a caption seems wrong.

    The other captions are a random sample of those in the data, wrong ones among them.
    """
    own = scores[np.arange(len(scores)), draw.caption]
    rng = np.random.default_rng(0)
    sample = rng.permutation(len(draw.caption))[:others]
    columns = draw.caption[sample]
    texts = gallery.captions[draw.caption]
    # What the data say belongs to a pair: its group, and the text it now has.
    valid = gallery.groups[:, None] != gallery.groups[sample][None, :]
    valid &= texts[:, None] != texts[sample][None, :]
    matrix = scores[:, columns]
    rank, count = ranks_among(own, matrix, valid)
    return {
        "T": own,
        "contrast": contrasts(own, matrix, valid),
        "rank": -rank / (count + 1),
    }


def auroc(score: np.ndarray, wrong: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Probability that a wrong pair scores below a right one, ties half: ``[R]``.

    Of scores ``[N]`` where pair i occurs `weight` ``[R, N]`` times.
    """
    weight = np.ones((1, len(score))) if weight is None else weight
    values, place = np.unique(score, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(values)))
    below, right = (
        np.add.reduceat((weight * kind)[:, order], starts, axis=1) for kind in (wrong, ~wrong)
    )
    wins = np.sum(right * (np.cumsum(below, axis=1) - below / 2), axis=1)
    return wins / (below.sum(axis=1) * right.sum(axis=1))


def mean_auroc(
    scores: np.ndarray, gallery: Gallery, draws: Iterable[Draw], others: int, weight: Any = None
) -> dict[str, np.ndarray]:
    """The mean over the draws, ``[R]`` by statistic."""
    found = [
        {
            name: auroc(values, draw.wrong, weight)
            for name, values in statistics(scores, gallery, draw, others).items()
        }
        for draw in draws
    ]
    return {name: np.mean([one[name] for one in found], axis=0) for name in STATISTICS}


def trials(scores: np.ndarray, gallery: Gallery, seed: int) -> Trials:
    """Real pairs, one random caption each, and derangements of them."""
    rng = np.random.default_rng(seed)
    first = np.searchsorted(gallery.owner, np.arange(len(gallery.groups)))
    caption = first + rng.integers(np.bincount(gallery.owner))
    return trials_of(scores[:, caption], gallery.groups, gallery.captions[caption])


def choose(plan: Plan, runs: MethodRuns, pairs: Pairs) -> tuple[float, dict[str, float]]:
    """The factor of the learning rate with the best validation AUROC of T; and all of them."""
    found = {}
    for factor in plan.factors:
        values = []
        for seed in plan.selection_seeds:
            scores = runs.scores(factor * base_rate(plan.batch), seed)
            for stages in GALLERIES.values():
                gallery = pairs.galleries[stages["validation"]]
                draws = draws_of(gallery, plan, 1)
                found_here = mean_auroc(scores[stages["validation"]], gallery, draws, plan.others)
                values.append(found_here["T"][0])
        found[factor] = float(np.mean(values))
    best = max(found, key=lambda factor: found[factor])
    return best, {f"{factor:g}": value for factor, value in found.items()}


def measure_method(
    plan: Plan, name: str, pairs: Pairs, kept: Path
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The row of a method, and AUROC of T of the resampled groups by gallery ``[seeds, R]``."""
    runs = MethodRuns(name, plan.setting, plan.batch, pairs, kept)
    factor, validation = choose(plan, runs, pairs)
    row: dict[str, Any] = {"name": name, "label": METHODS[name].label, "factor": factor}
    row |= {"validation": validation, "seconds": [], "galleries": {}}
    resampled: dict[str, dict[str, np.ndarray]] = {}
    models = [runs.scores(factor * base_rate(plan.batch), seed) for seed in plan.seeds]
    row["seconds"] = [float(scores["seconds"]) for scores in models]
    for label, stages in GALLERIES.items():
        gallery = pairs.galleries[stages["test"]]
        draws = draws_of(gallery, plan, 2)
        weight = drawn_groups(gallery.groups, plan.resamples, 3)
        each: dict[str, list[float]] = {statistic: [] for statistic in STATISTICS}
        boot: dict[str, list[np.ndarray]] = {statistic: [] for statistic in STATISTICS}
        calibrations = []
        for scores in models:
            test = scores[stages["test"]]
            plain = mean_auroc(test, gallery, draws, plan.others)
            drawn = mean_auroc(test, gallery, draws, plan.others, weight)
            for statistic in STATISTICS:
                each[statistic].append(float(plain[statistic][0]))
                boot[statistic].append(drawn[statistic])
            calibrations.append(_calibration(scores, stages, pairs, plan))
        for later in calibrations[1:]:  # one is drawn, and the file stays small
            del later["points"]
        resampled[label] = {statistic: np.array(boot[statistic]) for statistic in STATISTICS}
        row["galleries"][label] = {"auroc": each, "calibration": calibrations}
        print(f"{name:16} {label:16} AUROC {np.mean(each['T']):.4f}", flush=True)
    return row, resampled


def _calibration(
    scores: dict[str, np.ndarray], stages: dict[str, str], pairs: Pairs, plan: Plan
) -> dict[str, Any]:
    """Fitted on validation pairs, judged on test pairs."""
    fit = trials(scores[stages["validation"]], pairs.galleries[stages["validation"]], 4)
    read = trials(scores[stages["test"]], pairs.galleries[stages["test"]], 5)
    calibration = fit.fit()
    resamples = min(plan.resamples, 200)
    return {
        "scale": calibration.scale,
        "shift": calibration.shift,
        "before": quality(Calibration(), read),
        "after": quality_with_intervals(calibration, read, resamples=resamples),
        "points": {
            "before": reliability_rows(Calibration(), read),
            "after": reliability_rows(calibration, read),
        },
    }


def compare(
    plan: Plan, rows: list[dict[str, Any]], resampled: dict[str, Any]
) -> list[dict[str, Any]]:
    """Differences of AUROC between all methods: same exchanges, same resampled groups and seeds.

    Intervals draw groups and, independently, seeds with replacement.
    """
    rng = np.random.default_rng(6)
    seeds = rng.integers(len(plan.seeds), size=(plan.resamples, len(plan.seeds)))
    take = np.arange(plan.resamples)

    def drawn(name: str, gallery: str, statistic: str) -> np.ndarray:
        values = resampled[name][gallery][statistic]  # [seeds, R]
        return values[seeds, take[:, None]].mean(axis=1)

    found = []
    for gallery in GALLERIES:
        for statistic in STATISTICS:
            for i, a in enumerate(rows):
                values = a["galleries"][gallery]["auroc"][statistic]
                low, high = np.quantile(drawn(a["name"], gallery, statistic), (0.025, 0.975))
                own = {"a": a["name"], "b": None, "gallery": gallery, "statistic": statistic}
                found.append(own | _estimate(float(np.mean(values)), low, high))
                for b in rows[i + 1 :]:
                    theirs = b["galleries"][gallery]["auroc"][statistic]
                    difference = drawn(a["name"], gallery, statistic)
                    difference = difference - drawn(b["name"], gallery, statistic)
                    low, high = np.quantile(difference, (0.025, 0.975))
                    mean = float(np.mean(values) - np.mean(theirs))
                    found.append(own | {"b": b["name"]} | _estimate(mean, low, high))
    return found


def _estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", default=str(FOLDER / "features"), help="a feature cache")
    parser.add_argument("--runs", type=Path, default=FOLDER / "cells", help="finished runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="the tables go here")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few small runs")
    arguments = parser.parse_args()
    quick = FOLDER / "quick.json" if arguments.quick else None
    out, page = places(arguments.out, arguments.page, (RESULTS, PAGE), quick)
    picture = arguments.plot or (out.with_suffix(".png") if quick else PICTURE)
    plan = QUICK if arguments.quick else Plan()
    kept = arguments.runs / ("quick" if arguments.quick else "full")
    pairs = load_pairs(arguments.features, FOLDER / "workdir", plan.setting.components)
    rows, resampled = [], {}
    for name in plan.methods:
        row, resampled[name] = measure_method(plan, name, pairs, kept)
        rows.append(row)
    results = {
        "command": shlex.join(["python", "-m", "benchmarks.wrong_captions", *sys.argv[1:]]),
        "provenance": provenance(),
        "plan": asdict(plan),
        "rows": rows,
        "compared": compare(plan, rows, resampled),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(results, indent=1) + "\n")
    results = json.loads(out.read_text())
    write_tables(page, {"wrong captions": markdown(results)})
    plot(results, picture)
    print(f"written to {out}, {page} and {picture}")


if __name__ == "__main__":
    main()
