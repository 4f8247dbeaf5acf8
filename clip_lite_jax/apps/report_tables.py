"""The tables of a report: what was measured, against chance and against published runs."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.config import Config
from clip_lite_jax.evaluators.bootstrap import wilson
from clip_lite_jax.evaluators.retrieval import RECALLS, Retrieval

COMPARE_FILE = Path(__file__).parent.parent / "results" / "compare.json"
CATEGORIES_SHOWN = 30

Numbers = Mapping[str, Mapping[str, float]]
"""Metrics by evaluator."""


@dataclass(frozen=True)
class Measured:
    """Held-out numbers and where they come from."""

    stage: str
    """``test`` or ``validation``."""
    step: int
    numbers: Numbers
    why_validation: str


def measured(
    results: Mapping[str, Any] | None, step: int, lines: Sequence[Mapping[str, Any]]
) -> Measured:
    """The test numbers of the checkpoint of `step`, or else the latest validation numbers."""
    if results is None:
        why = "the run has no results.json yet"
    elif results["step"] != step:
        why = f"results.json is of step {results['step']:,}, the newest checkpoint of step {step:,}"
    elif not results["test"]:
        why = "the data have no test split of two examples or more"
    else:
        return Measured("test", step, results["test"], "")
    numbers: dict[str, dict[str, float]] = defaultdict(dict)
    for line in lines:
        for key, value in line.items():
            evaluator, slash, metric = key.rpartition("/")
            if slash:
                numbers[evaluator][metric] = value
                step = line["step"]
    return Measured("validation", step, dict(numbers), why)


@dataclass(frozen=True)
class Recall:
    """R@k of one direction against chance."""

    k: int
    value: float
    chance: float
    queries: int
    images: int
    measured: tuple[float, float] | None = None
    """Its bootstrap interval over groups, if the numbers have one."""

    @property
    def hits(self) -> int:
        return round(self.value * self.queries)

    @property
    def ratio(self) -> float:
        return self.value / self.chance

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share.

        As measured; by `wilson` in older runs, which have none, or none with a width at 0 and 1.
        Images count as independent, several captions of one image do not.
        """
        if self.measured is not None and self.measured[0] < self.measured[1]:
            return self.measured
        return wilson(self.value, self.images)


@dataclass(frozen=True)
class Direction:
    """One row of the retrieval table."""

    gallery: str
    text_to_image: bool
    queries: int
    candidates: int
    recalls: list[Recall]
    median_rank: float
    average_precision: float | None = None
    average_precision_interval: tuple[float, float] | None = None

    @property
    def headline(self) -> Recall:
        """The widest recall that is still a search: one that looks at a quarter at most."""
        telling = [recall for recall in self.recalls if 4 * recall.k <= self.candidates]
        return telling[-1] if telling else self.recalls[0]


def directions(numbers: Numbers) -> list[Direction]:
    """Two rows for every gallery: text → image and image → text."""
    rows = []
    for evaluator, values in numbers.items():
        kind, _, gallery = evaluator.partition("/")
        if kind != "retrieval":
            continue
        images, captions = int(values["images"]), int(values["captions"])
        for name, queries, candidates in (
            ("text_to_image", captions, images),
            ("image_to_text", images, captions),
        ):
            recalls = [
                Recall(
                    k,
                    values[f"{name}_r{k}"],
                    values[f"{name}_r{k}_chance"],
                    queries,
                    images,
                    ends_of(values, f"{name}_r{k}"),
                )
                for k in RECALLS
            ]
            rows.append(
                Direction(
                    gallery,
                    name == "text_to_image",
                    queries,
                    candidates,
                    recalls,
                    values[f"{name}_median_rank"],
                    values.get(f"{name}_map"),
                    ends_of(values, f"{name}_map"),
                )
            )
    return rows


def ends_of(values: Mapping[str, float], name: str) -> tuple[float, float] | None:
    """The interval of a number, if there is one."""
    low, high = (values.get(f"{name}_{end}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def terminal_table(numbers: Numbers) -> str:
    """For a terminal: R@10 of every gallery and direction beside its chance, and what was read off
    about information beside the truth, where the data say what that is; "" without either.
    """
    return "\n".join(filter(None, (_terminal_recalls(numbers), _terminal_information(numbers))))


def _terminal_information(numbers: Numbers) -> str:
    values = numbers.get("information", {})
    if "true_information" not in values:
        return ""
    shown = {
        "true": "true_information",
        "mean score": "score_positive",
        "NWJ bound": "nwj_lower_bound",
        "certified bound": "jsd_lower_bound",
    }
    read = ", ".join(f"{name} {values[key]:.3f}" for name, key in shown.items())
    return f"held-out information in nats: {read}"


def _terminal_recalls(numbers: Numbers) -> str:
    rows = [
        (
            row.gallery.replace("_", " "),
            "text → image" if row.text_to_image else "image → text",
            f"{row.recalls[-1].value:.3f}",
            f"{row.recalls[-1].chance:.3f}",
            f"{row.recalls[-1].ratio:.1f} ×",
            str(row.candidates),
        )
        for row in directions(numbers)
    ]
    if not rows:
        return ""
    head = ("held-out retrieval", "direction", f"R@{RECALLS[-1]}", "chance", "ratio", "N")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    return "\n".join(lines)


def information(numbers: Numbers) -> dict[str, float] | None:
    """The read-offs in nats, with log N of the N pairs they were read from."""
    if "information" not in numbers:
        return None
    values = numbers["information"]
    return {**values, "log_pairs": math.log(values["pairs"])}


def comparison(config: Config, held_out: Measured) -> dict[str, Any] | None:
    """The published comparison on this run's configuration, with R@10 columns; or None."""
    if not COMPARE_FILE.is_file():
        return None
    published = json.loads(COMPARE_FILE.read_text())
    if published["config_name"] != config.name:
        return None
    keys = dict.fromkeys(key for row in published["rows"] for key in row["test"])
    columns = [key for key in keys if key.startswith("retrieval/") and key.endswith("_r10")]
    parts = [key.rpartition("/") for key in columns]
    return published | {
        "columns": [
            (evaluator.removeprefix("retrieval/"), metric.startswith("text_to_image"))
            for evaluator, _, metric in parts
        ],
        "rows": [
            row
            | {
                "cells": [over_seeds(row["test"].get(key, ())) for key in columns],
                "seconds": float(np.median(row["train_seconds"])) if row["train_seconds"] else None,
            }
            for row in published["rows"]
        ],
        # The published numbers are of the test split: validation numbers do not stand beside them.
        "own": [held_out.numbers.get(evaluator, {}).get(metric) for evaluator, _, metric in parts]
        if held_out.stage == "test"
        else None,
    }


def over_seeds(values: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean and standard deviation; None for the deviation of a single seed, and for no value."""
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Category:
    """Right answers among the first 10 for the examples of one category."""

    name: str
    captions: int
    text_to_image_hits: int
    images: int
    image_to_text_hits: int

    @property
    def shares(self) -> tuple[float, float]:
        """text → image, image → text."""
        return self.text_to_image_hits / self.captions, self.image_to_text_hits / self.images

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """95 %, of both shares, with images as what is independent."""
        return [wilson(share, self.images) for share in self.shares]


def categories(retrieval: Retrieval, scores: np.ndarray) -> list[Category]:
    """By the examples' attribute ``category``, or else by groups of several images, the worst
    first; empty where there is neither.

    Scores are ``[images, captions]``; the search is among all examples, not within the category.
    """
    names = np.array(category_names(retrieval))
    text_to_image, image_to_text = (found <= 10 for found in retrieval.ranks(scores))
    rows = []
    for name in sorted(set(names.tolist()) - {""}):
        images, captions = names == name, names[retrieval.owner] == name
        hits = int(text_to_image[captions].sum()), int(image_to_text[images].sum())
        rows.append(Category(name, int(captions.sum()), hits[0], int(images.sum()), hits[1]))
    largest = sorted(rows, key=lambda row: -row.images)[:CATEGORIES_SHOWN]
    return sorted(largest, key=lambda row: sum(row.shares))


def category_names(retrieval: Retrieval) -> list[str]:
    """The category of each image, or else its group where that has several images; or ""."""
    named = [example.attributes.get("category", "") for example in retrieval.examples]
    if any(named):
        return named
    groups = [example.group for example in retrieval.examples]
    sizes = Counter(groups)
    return [group if sizes[group] > 1 else "" for group in groups] if len(sizes) > 1 else named


def percent(share: float) -> str:
    """0.0662 → 6.6 %; below 1 % with two significant digits."""
    value = 100 * share
    return f"{value:.2g}\u202f%" if 0 < value < 0.95 else f"{value:.1f}\u202f%"


def number(value: float, digits: int = 3) -> str:
    """With a true minus sign, and ∞ for what has overflowed."""
    value = round(value, digits)  # what rounds to 0 has no sign
    text = f"{abs(value):.{digits}f}" if math.isfinite(value) else "∞"
    return f"−{text}" if value < 0 else text
