"""What a classifier takes its classes for, as a page of HTML that loads nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clip_lite_jax.apps.report_pages import environment

MATRIX = 40
"""Classes of a matrix; of more there is only the list of confusions."""
LISTED = 200
"""Confusions that are listed, the most frequent first."""


def confusion_page(
    table: Sequence[Mapping[str, Any]], title: str = "Confusions", protocol: str = ""
) -> str:
    """The page of a table ``confusion``: rows ``class``, ``predicted`` and ``images``.

    Up to `MATRIX` classes stand as a matrix, right classes down and answers across, in the order of
    the table.
    """
    of_class: Counter[str] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    for row in table:
        of_class[row["class"]] += row["images"]
        found[row["class"], row["predicted"]] += row["images"]
    classes = list(of_class)
    classes += sorted({predicted for _, predicted in found} - set(classes))
    wrong = [(*pair, count) for pair, count in found.most_common() if pair[0] != pair[1]]
    context = {
        "title": title,
        "protocol": protocol,
        "classes": classes,
        "of_class": of_class,
        "found": found,
        "matrix": len(classes) <= MATRIX,
        "hits": sum(found[name, name] for name in classes),
        "total": sum(of_class.values()),
        "wrong": wrong[:LISTED],
        "not_listed": max(0, len(wrong) - LISTED),
        "several": sorted(of_class, key=lambda name: found[name, name] / of_class[name]),
    }
    return environment().get_template("confusion.html.j2").render(context)
