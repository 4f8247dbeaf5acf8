"""Tables of image paths and captions: CSV and TSV, JSON lines, Parquet."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import rows, splits
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.pairs import FileImages, Pairs, inside
from clip_lite_jax.data.rows import TEXT, TEXTS, Rows
from clip_lite_jax.errors import BadImage, DataError

CHECKED_FILES = 200_000
"""Of so many rows it is looked up at the start whether their files are there; the files of longer
tables are found missing when they are read."""


@dataclass(frozen=True)
class Columns:
    """A table in memory, each column `TEXT`, or `TEXTS` for captions: ``[R]``."""

    path: Path
    image: pa.Array
    captions: Sequence[pa.Array]
    group: pa.Array | None
    split: pa.Array | None
    line: Callable[[int], int]
    """The line of the file that a row ends on."""
    bad: Mapping[int, str] = field(default_factory=dict)
    """Rows that could not be read, with the reason."""


def read_table(config: DataConfig, bad: BadExamples) -> dict[str, Pairs]:
    """Pairs from a table: one row per caption or per image.

    Rows of one image become one example with all its captions.  Image paths are relative to the
    table's folder and may not leave it.  Rows without a caption and rows whose file is missing are
    listed in `bad` and left out; broken images are found when they are read.

    Raises:
      DataError: no such file, a missing column, text that is not UTF-8, or no usable row.
    """
    path = Path(config.source)
    try:
        table = READERS[path.suffix.lower()](path, config)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"data.source={path}: {error}") from error
    return split_pairs(table, config, bad)


def split_pairs(table: Columns, config: DataConfig, bad: BadExamples) -> dict[str, Pairs]:
    """The usable examples of a table, by split; see `read_table`."""
    root = table.path.parent.resolve()
    count = len(table.image)
    reasons = _bad_rows(table, root)
    bad.expect(count)
    bad.extend(
        (f"{table.path.name}:{table.line(row)}: {table.image[row].as_py() or ''}", reason)
        for row, reason in sorted(reasons.items())
    )
    if len(reasons) == count:
        raise DataError(f"{table.path}: no usable row; {len(bad)} are listed in {bad.path}")
    image, captions, group, split = table.image, list(table.captions), table.group, table.split
    if reasons:
        kept = np.ones(count, bool)
        kept[list(reasons)] = False
        some = pa.array(np.flatnonzero(kept))
        image, captions = image.take(some), [column.take(some) for column in captions]
        group = None if group is None else group.take(some)
        split = None if split is None else split.take(some)
    first, lists = rows.group(image, captions)
    if len(first) < len(image):
        some = pa.array(first)
        image = image.take(some)
        group = None if group is None else group.take(some)
        split = None if split is None else split.take(some)
    # An empty cell is no group: the rows without one do not all show the same thing.
    groups = image if group is None else pc.if_else(_filled(group), group, image)
    if split is None:
        codes = splits.split_by_hash(groups, config.held_out)
    else:
        where = f"{table.path}: {config.split_column}"
        codes = splits.split_by_name(split, groups, config.held_out, where)
    known, files = Rows(image, groups, lists), FileImages(root, image)
    found = {name: np.flatnonzero(codes == code) for code, name in enumerate(splits.SPLITS)}
    return {name: Pairs(known, files, chosen) for name, chosen in found.items() if len(chosen)}


def _bad_rows(table: Columns, root: Path) -> dict[int, str]:
    """The rows that cannot be used, with the reason."""
    reasons = dict(table.bad)
    checked = np.arange(len(table.image))
    if len(checked) > CHECKED_FILES:
        checked = np.flatnonzero(pc.match_substring_regex(table.image, _SUSPICIOUS))
    for row in checked.tolist():
        try:
            inside(root, table.image[row].as_py() or "")
        except BadImage as error:
            reasons.setdefault(row, str(error))
    captioned = np.zeros(len(table.image), bool)
    for column in table.captions:
        captioned |= np.asarray(_filled(column))
    for row in np.flatnonzero(~captioned).tolist():
        reasons.setdefault(row, "empty caption")
    return reasons


_SUSPICIOUS = r"^$|^[/\\]|\.\.|:|\x00"
"""Paths that may be none, or leave the folder."""


def _filled(column: pa.Array) -> pa.Array:
    """Which cells hold anything."""
    if column.type == TEXTS:
        return pc.fill_null(pc.greater(pc.list_value_length(column), 0), False)
    return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)


def _needed(config: DataConfig) -> list[str]:
    """The columns that are read, each once."""
    optional = [name for name in (config.group_column, config.split_column) if name]
    return list(dict.fromkeys([config.image_column, *config.caption_columns, *optional]))


def _columns(
    path: Path, config: DataConfig, found: dict[str, pa.Array], line: Callable[[int], int]
) -> Columns:
    def optional(name: str | None) -> pa.Array | None:
        return found[name] if name else None

    return Columns(
        path,
        found[config.image_column],
        [found[name] for name in config.caption_columns],
        optional(config.group_column),
        optional(config.split_column),
        line,
    )


def _check_names(path: Path, config: DataConfig, names: Sequence[str]) -> None:
    for column in _needed(config):
        if column not in names:
            raise DataError(
                f"{path}: no column {column!r}; it has {', '.join(names)}. Name yours with "
                "data.image_column and data.caption_columns"
            )


def read_csv(path: Path, config: DataConfig) -> Columns:
    """A CSV or TSV file with a header; cells that a short row lacks are empty."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    needed, pieces, lines = _needed(config), [], [np.zeros(0, np.int32)]
    last = 1

    def counted() -> Iterator[tuple[int, list[str]]]:
        nonlocal last
        for row in reader:
            if row:  # a line without anything is no row
                last = reader.line_num
                yield last, row

    try:
        # utf-8-sig: spreadsheets put a byte-order mark before the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            _check_names(path, config, header)
            places = [header.index(name) for name in needed]
            for chunk in rows.in_chunks(counted()):
                lines.append(np.array([line for line, _ in chunk], np.int32))
                pieces.append([_cells(chunk, place) for place in places])
    except csv.Error as error:
        raise DataError(
            f"{path}, after line {last}: {error}; a caption that holds a quotation mark needs "
            'quotes around it, and the mark twice: "the ""big"" dog"'
        ) from error
    found = {
        name: rows.in_one_piece([piece[i] for piece in pieces], TEXT)
        for i, name in enumerate(needed)
    }
    starts = np.concatenate(lines)
    return _columns(path, config, found, lambda row: int(starts[row]))


def _cells(chunk: Sequence[tuple[int, list[str]]], place: int) -> pa.Array:
    cells = [row[place] if len(row) > place else "" for _, row in chunk]
    return pc.utf8_trim_whitespace(pa.array(cells, TEXT))


def read_json_lines(path: Path, config: DataConfig) -> Columns:
    """A file of one JSON object on each line; captions may be lists."""
    types = {name: TEXTS if name in config.caption_columns else TEXT for name in _needed(config)}
    pieces: dict[str, list[pa.Array]] = {name: [] for name in types}
    lines, bad, names = [np.zeros(0, np.int32)], {}, set[str]()
    count = 0
    with path.open(encoding="utf-8-sig") as file:
        numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for chunk in rows.in_chunks(numbered):
            lines.append(np.array([number for number, _ in chunk], np.int32))
            found: list[dict[str, Any]] = []
            for _, line in chunk:
                try:
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError("no object in braces")
                    names |= value.keys()
                    found.append(
                        {name: _json_cell(name, value.get(name), config) for name in types}
                    )
                except (ValueError, RecursionError) as error:
                    bad[count + len(found)] = f"not a row in JSON: {error}"
                    found.append({})
            count += len(chunk)
            for name, type in types.items():
                pieces[name].append(pa.array([row.get(name) for row in found], type))
    _check_names(path, config, sorted(names))
    columns = {name: rows.in_one_piece(piece, types[name]) for name, piece in pieces.items()}
    starts = np.concatenate(lines)
    return replace(_columns(path, config, columns, lambda row: int(starts[row])), bad=bad)


def _json_cell(name: str, value: Any, config: DataConfig) -> Any:
    """A text, or for captions a list of them; raises ``ValueError`` for anything else."""
    if name not in config.caption_columns:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name!r} is no text: {value!r:.40}")
        return value and value.strip()
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name!r} is no text or list of texts: {value!r:.40}")
    return [item.strip() for item in items if item.strip()]


READERS: dict[str, Callable[[Path, DataConfig], Columns]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json_lines,
}
"""By the ending of the file's name."""
