"""Tables and the plot of `benchmarks.mutual_information`."""

from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs" / "mutual_information.md"

HEADLINE = ("jsd_one", "calibrated")
"""Training and read-off that stand for JSD, fixed on seeds that the tables do not show."""


def write(results: dict[str, Any], docs: Path) -> None:
    print(len(results["staircase"]), docs)
