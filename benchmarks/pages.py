"""Markdown tables, and pages of which a bench writes the tables and a person the rest."""

from collections.abc import Iterable, Mapping
from pathlib import Path

END = "<!-- end -->"


def table(lines: Iterable[Iterable[str]]) -> str:
    """Lines of cells as Markdown; the second line is the rule."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def places(
    out: Path | None, page: Path | None, published: tuple[Path, Path], quick: Path | None
) -> tuple[Path, Path]:
    """Where a bench puts its results and its page, as far as it is not told.

    The `published` ones, or those of a `quick` run, which has its own and its page beside them.
    """
    if quick is None:
        return out or published[0], page or published[1]
    out = out or quick
    return out, page or out.with_suffix(".md")


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Puts each table between ``<!-- its name -->`` and the end after it; others are left out.

    A page that is not there yet is made of the tables alone.
    """
    marked = "\n\n".join(f"<!-- {name} -->\n{END}" for name in tables)
    text = page.read_text() if page.exists() else marked + "\n"
    for name, content in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = f"{before}{mark}{content}\n{END}{rest.partition(END)[2]}"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
