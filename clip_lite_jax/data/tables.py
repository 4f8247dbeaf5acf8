"""Tables of image paths and captions: CSV and TSV, JSON lines, Parquet."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import rows
from clip_lite_jax.data.pairs import FileImages, Found
from clip_lite_jax.data.rows import TEXT, TEXTS
from clip_lite_jax.errors import DataError


def read_table(config: DataConfig) -> Found:
    """A table with a row for each caption or for each image.

    Image paths are relative to `data.image_folder`, or else to the table's folder, which they may
    not leave.

    Raises:
      DataError: no such file, a missing column, or text that is not UTF-8.
    """
    path = Path(config.source)
    try:
        return READERS[path.suffix.lower()](path, config)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"data.source={path}: {error}") from error


def needed(config: DataConfig) -> list[str]:
    """The columns that are read, each once."""
    optional = [name for name in (config.group_column, config.split_column) if name]
    return list(dict.fromkeys([config.image_column, *config.caption_columns, *optional]))


def _found(
    path: Path, config: DataConfig, columns: Mapping[str, pa.Array], lines: np.ndarray
) -> Found:
    """`lines` are those of the file that the rows end on."""
    image = columns[config.image_column]
    return Found(
        str(path),
        FileImages(Path(config.image_folder or path.parent), image),
        image,
        [columns[name] for name in config.caption_columns],
        columns[config.group_column] if config.group_column else None,
        columns[config.split_column] if config.split_column else None,
        lambda row: f"{path.name}:{lines[row]}",
    )


def check_names(path: Path, config: DataConfig, names: Sequence[str]) -> None:
    for column in needed(config):
        if column not in names:
            raise DataError(
                f"{path}: no column {column!r}; it has {', '.join(names)}. Name yours with "
                "data.image_column and data.caption_columns"
            )


def read_csv(path: Path, config: DataConfig) -> Found:
    """A CSV or TSV file with a header; cells that a short row lacks are empty."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    columns, pieces, lines = needed(config), [], [np.zeros(0, np.int32)]
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
            check_names(path, config, header)
            places = [header.index(name) for name in columns]
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
        for i, name in enumerate(columns)
    }
    return _found(path, config, found, np.concatenate(lines))


def _cells(chunk: Sequence[tuple[int, list[str]]], place: int) -> pa.Array:
    cells = [row[place] if len(row) > place else "" for _, row in chunk]
    return pc.utf8_trim_whitespace(rows.array(cells, TEXT))


def read_json_lines(path: Path, config: DataConfig) -> Found:
    """A file of one JSON object on each line; captions may be lists."""
    types = {name: TEXTS if name in config.caption_columns else TEXT for name in needed(config)}
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
                pieces[name].append(rows.array([row.get(name) for row in found], type))
    check_names(path, config, sorted(names))
    columns = {name: rows.in_one_piece(piece, types[name]) for name, piece in pieces.items()}
    return replace(_found(path, config, columns, np.concatenate(lines)), bad=bad)


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


READERS: dict[str, Callable[[Path, DataConfig], Found]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json_lines,
}
"""By the ending of the file's name."""
