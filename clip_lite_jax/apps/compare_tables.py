"""The tables of a comparison of runs: what differs, what was measured, and paired differences."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_lite_jax.apps.report_pages import duration, flop
from clip_lite_jax.apps.report_tables import ends_of, number, over_seeds, percent
from clip_lite_jax.evaluators.bootstrap import mean_interval, wilson
from clip_lite_jax.evaluators.retrieval import DIRECTIONS, Queries

if TYPE_CHECKING:
    from clip_lite_jax.apps.compare import Group, Run

COMPARED_RECALLS = (1, 10)
INCOMPARABLE, OTHER_PROTOCOL = "†", "‡"
LONGEST = 120
"""Characters of a value of a configuration."""


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, and what stands below it."""

    text: str
    below: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    cells: list[Cell]
    of: str = ""
    """What the row belongs to: a gallery and its direction."""
    chance: str = ""
    mark: str = ""
    """`INCOMPARABLE`, `OTHER_PROTOCOL` or nothing."""


def differences(groups: Sequence["Group"]) -> list[Row]:
    """The fields of the configuration in which groups differ."""
    names = sorted({name for group in groups for name in group.first.values})
    rows = []
    for name in names:
        if name == "seed" or name.startswith(("log.", "checkpoint.")):
            continue
        cells = [_setting(group.first.values, name) for group in groups]
        if len(set(cells)) > 1:
            rows.append(Row(name, [Cell(cell) for cell in cells]))
    return rows


def _setting(values: Any, name: str) -> str:
    if name not in values:
        return "–"
    value = values[name]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def notes(groups: Sequence["Group"]) -> list[str]:
    """What keeps the groups from being compared, in plain words."""
    found = []
    data = _parted(groups, lambda run: run.fingerprint)
    if len(data) > 1:
        found.append(
            "Not the same data: " + "; ".join(" and ".join(ls) for ls in data.values()) + " have "
            "other training pairs or held-out ones. Where galleries are not the same either, their "
            "numbers are marked † and do not compare."
        )
    stages = _parted(groups, lambda run: run.held_out.stage)
    if len(stages) > 1:
        found.append(
            f"Not the same split: {' and '.join(stages['validation'])} have no test numbers, and "
            "show validation numbers, which do not compare with test numbers (marked †)."
        )
    measured = {name for group in groups for run in group.runs for name in run.held_out.numbers}
    read_off = ["information"] if "information" in measured else []
    for gallery in _galleries(groups) + read_off:
        asked = _parted(groups, lambda run, g=gallery: _protocol(run, g))  # type: ignore[misc]
        if len(asked) > 1:
            ways = "; ".join(f"{' and '.join(letters)}: {way}" for way, letters in asked.items())
            found.append(f"Not the same protocol on {_title(gallery)}: {ways}.")
    for group in groups:
        if group.first.step < group.first.config.steps:
            found.append(
                f"{group.letter} is not finished: step {group.first.step:,} of "
                f"{group.first.config.steps:,}."
            )
    seen = _parted(groups, lambda run: run.cost.pairs)
    if len(seen) > 1:
        counts = "; ".join(f"{' and '.join(of)}: {pairs:,}" for pairs, of in seen.items())
        found.append(f"Not the same budget, in pairs seen: {counts}.")
    return found


def _parted(groups: Sequence["Group"], key: Callable[["Run"], Any]) -> dict[Any, list[str]]:
    """The letters of the groups by what `key` says of their first run."""
    parts: dict[Any, list[str]] = {}
    for group in groups:
        parts.setdefault(key(group.first), []).append(group.letter)
    return parts


def _protocol(run: "Run", evaluator: str) -> str:
    """How a gallery is searched, or of which pairs information is read off; "not there" for a run
    that has none of that name."""
    if evaluator == "information":
        return _information_protocol(run)
    for gallery in run.config.eval.retrieval:
        if f"retrieval/{gallery.name}" == evaluator:
            split = getattr(gallery, run.held_out.stage)
            size = "all" if gallery.max_images is None else f"at most {gallery.max_images}"
            one = ", one per group" if gallery.one_per_group else ""
            return f"captions {gallery.captions}, {size} images of {split}{one}"
    return "not there"


def _information_protocol(run: "Run") -> str:
    if "information" not in run.held_out.numbers:
        return "not there"
    settings = run.config.eval
    test = run.held_out.stage == "test"
    split = settings.information_test_split if test else settings.information_split
    captions = "joined" if run.config.data.captions == "joined" else "first"  # as `run` has it
    pairs = run.held_out.numbers["information"].get("pairs")
    most = settings.max_information_pairs
    size = f"at most {most:,}" if pairs is None else f"{pairs:,.0f}"
    return f"captions {captions}, {size} pairs of {split}"


def _galleries(groups: Sequence["Group"]) -> list[str]:
    names = (name for group in groups for run in group.runs for name in run.held_out.numbers)
    return [name for name in dict.fromkeys(names) if name.startswith("retrieval/")]


def _title(evaluator: str) -> str:
    name = evaluator.removeprefix("retrieval/").replace("_", " ")
    return name[:1].upper() + name[1:]


def same_gallery(one: "Run", other: "Run", evaluator: str) -> bool:
    """Whether both have the same queries and candidates in a gallery."""
    if one.held_out.stage != other.held_out.stage:
        return False
    if evaluator in one.queries and evaluator in other.queries:
        return one.queries[evaluator].ids == other.queries[evaluator].ids
    return one.fingerprint == other.fingerprint


def _mark(runs: Sequence["Run"], evaluator: str) -> str:
    """What is to be said of a row of numbers of these runs."""
    have = [run for run in runs if evaluator in run.held_out.numbers]
    if not all(same_gallery(have[0], run, evaluator) for run in have):
        return INCOMPARABLE
    return OTHER_PROTOCOL if len({_protocol(run, evaluator) for run in have}) > 1 else ""


def number_rows(groups: Sequence["Group"]) -> list[Row]:
    """Final numbers with their intervals, or over seeds mean and standard deviation."""
    rows = []
    for gallery in _galleries(groups):
        mark = _mark([group.first for group in groups], gallery)
        for direction in DIRECTIONS:
            of = f"{_title(gallery)}, {direction.replace('_to_', ' → ')}"
            for metric, name in (("r1", "R@1"), ("r10", "R@10"), ("map", "mAP")):
                key = f"{direction}_{metric}"
                chance = groups[0].first.held_out.numbers.get(gallery, {}).get(f"{key}_chance")
                row = _row(groups, gallery, key, name, of, percent, mark)
                if row is not None:
                    rows.append(replace(row, chance="" if chance is None else percent(chance)))
    mark = _mark([group.first for group in groups], "information")
    for key, name in (
        ("true_information", "true information"),
        ("jsd_lower_bound", "certified bound"),
        ("nwj_lower_bound", "NWJ bound"),
        ("infonce_lower_bound", "InfoNCE bound"),
        ("calibrated_jsd_lower_bound", "certified bound, calibrated"),
        ("calibrated_nwj_lower_bound", "NWJ bound, calibrated"),
    ):
        row = _row(groups, "information", key, name, "Information, nats", number, mark)
        if row is not None:
            rows.append(row)
    return rows


def _row(
    groups: Sequence["Group"],
    evaluator: str,
    key: str,
    name: str,
    of: str,
    show: Callable[[float], str],
    mark: str,
) -> Row | None:
    cells, found = [], False
    for group in groups:
        values = [run.held_out.numbers.get(evaluator, {}) for run in group.runs]
        numbers = [value[key] for value in values if key in value]
        mean = over_seeds(numbers)
        found |= mean is not None
        if mean is None:
            cells.append(Cell("–"))
        elif mean[1] is not None:
            spread = f"{100 * mean[1]:.1f}" if show is percent else show(mean[1])
            cells.append(Cell(f"{show(mean[0])} ± {spread}", f"{len(numbers)} seeds"))
        else:
            ends = ends_of(values[0], key)
            below = "" if ends is None else f"{show(ends[0])} to {show(ends[1])}"
            cells.append(Cell(show(mean[0]), below))
    return Row(name, cells, of, mark=mark) if found else None


@dataclass(frozen=True)
class Paired:
    """How a group differs from the first on the same queries."""

    of: str
    letters: str
    cells: list[Cell]
    """By `COMPARED_RECALLS`."""
    queries: int
    seeds: str
    telling: list[bool]
    """Whether the interval leaves out 0."""


@dataclass(frozen=True)
class PairedRows:
    rows: list[Paired]
    missing: list[str]
    """Why there is no difference of some."""


def paired_rows(groups: Sequence["Group"]) -> PairedRows:
    """Each group minus the first, query by query, with intervals over the groups of queries."""
    rows, missing = [], []
    first = groups[0]
    for other in groups[1:]:
        letters = f"{other.letter} − {first.letter}"
        silent = [run.name for group in (first, other) for run in group.runs if not run.queries]
        if silent:
            missing.append(
                f"{letters}: no ranks of single queries in the results of {', '.join(silent)}. "
                "Runs that were evaluated by an earlier version, or not on test data, have none; "
                "without its results.json a finished run is evaluated again by its own command."
            )
            continue
        for gallery in first.first.queries:
            every = [run.queries.get(gallery) for group in (first, other) for run in group.runs]
            if any(q is None or q.ids != first.first.queries[gallery].ids for q in every):
                missing.append(f"{letters}: {_title(gallery)} has other queries or candidates.")
                continue
            counts = len(first.runs), len(other.runs)
            seeds = "one seed each" if counts == (1, 1) else f"{counts[1]} and {counts[0]} seeds"
            rows += [
                _paired(
                    [run.queries[gallery] for run in first.runs],
                    [run.queries[gallery] for run in other.runs],
                    direction,
                    f"{_title(gallery)}, {direction.replace('_to_', ' → ')}"
                    + (f" {mark}" if (mark := _mark([first.first, other.first], gallery)) else ""),
                    letters,
                    seeds,
                )
                for direction in DIRECTIONS
            ]
    return PairedRows(rows, missing)


def _paired(
    before: Sequence[Queries],
    after: Sequence[Queries],
    direction: str,
    of: str,
    letters: str,
    seeds: str,
) -> Paired:
    cells, telling = [], []
    some = before[0]
    clusters = some.groups if direction == "image_to_text" else some.groups[some.owner]
    for k in COMPARED_RECALLS:
        difference = paired_difference(before, after, direction, k)
        low, high = difference_interval(difference, clusters)
        cells.append(Cell(points(float(np.mean(difference))), f"{points(low)} to {points(high)}"))
        telling.append(low > 0 or high < 0)
    return Paired(of, letters, cells, len(clusters), seeds, telling)


def paired_difference(
    before: Sequence[Queries], after: Sequence[Queries], direction: str, k: int
) -> np.ndarray:
    """Of each query ``[N]`` the share of seeds that find it after, minus the share before."""
    one, other = (
        np.mean([queries.ranks[direction] <= k for queries in some], axis=0)
        for some in (before, after)
    )
    return np.asarray(other - one)


def difference_interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """95 %, of the mean of differences ``[N]`` from -1 to 1, over clusters ``[N]``.

    Where all are 0, they can be as large, either way, as the share of those that are not may be.
    """
    if not values.any():
        _, most = wilson(0.0, len(np.unique(clusters)))
        return -most, most
    if np.all(values == -1):
        low, high = mean_interval(-values, clusters)
        return -high, -low
    return mean_interval(values, clusters)


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    value = round(100 * share, 1)
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(value):.1f}"


def cost_rows(groups: Sequence["Group"]) -> list[Row]:
    """What the runs cost, on average over seeds."""
    asked: list[tuple[str, Callable[[Run], float | None], Callable[[float], str]]] = [
        ("Pairs seen", lambda run: run.cost.pairs, lambda value: f"{value:,.0f}"),
        ("Pairs a second", lambda run: run.cost.pairs_per_second, lambda value: f"{value:,.0f}"),
        (
            "Steps, by the logged rates",
            lambda run: None if run.cost.step_seconds is None else run.cost.step_seconds * run.step,
            duration,
        ),
        ("Of which waiting for data", lambda run: run.cost.waiting, percent),
        ("Wall time of all", lambda run: run.cost.seconds, duration),
        ("Operations, products only", lambda run: run.cost.flops, flop),
        ("Memory of the fullest device, GiB", lambda run: run.cost.memory, lambda v: f"{v:.3g}"),
    ]
    rows = []
    for name, read, show in asked:
        values = [[v for run in g.runs if (v := read(run)) is not None] for g in groups]
        if any(values):
            cells = [Cell(show(float(np.mean(some))) if some else "–") for some in values]
            rows.append(Row(name, cells))
    devices = [f"{g.first.cost.devices or '?'} × {g.first.cost.kind or 'unknown'}" for g in groups]
    rows.append(Row("Devices", [Cell(device) for device in devices]))
    return rows
