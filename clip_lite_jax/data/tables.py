"""Tables of image paths and captions: CSV and TSV, JSON lines, Parquet."""

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import rows
from clip_lite_jax.data.folders import PICTURES
from clip_lite_jax.data.pairs import Found, images_in
from clip_lite_jax.data.rows import TEXT, TEXTS
from clip_lite_jax.errors import DataError
from clip_lite_jax.places import Place, place


def read_table(config: DataConfig) -> Found:
    """A table with a row for each caption or for each image.

    Image paths are relative to `data.image_folder`, or else to the table's folder, which they may
    not leave.

    Raises:
      DataError: no such file, a missing column, or text that is not UTF-8.
    """
    path = place(config.source)
    try:
        return READERS[path.suffix.lower()](path, config)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"data.source={str(config.source)!r}: {why}") from error


def needed(config: DataConfig) -> list[str]:
    """The columns that are read, each once."""
    optional = [name for name in (config.group_column, config.split_column) if name]
    return list(dict.fromkeys([config.image_column, *config.caption_columns, *optional]))


def _found(
    path: Place,
    config: DataConfig,
    columns: Mapping[str, pa.Array],
    line_of: Callable[[int], int],
    bad: Mapping[int, str] | None = None,
) -> Found:
    """`line_of` a row is the line of the file that it ends on; `bad` rows have a reason."""
    image = columns[config.image_column]
    return Found(
        str(path),
        images_in(place(config.image_folder) if config.image_folder else path.parent, image),
        image,
        [columns[name] for name in config.caption_columns],
        columns[config.group_column] if config.group_column else None,
        columns[config.split_column] if config.split_column else None,
        lambda row: f"{path.name}:{line_of(row)}",
        bad or {},
    )


def check_names(path: Place, config: DataConfig, names: Sequence[str]) -> None:
    for column in needed(config):
        if column not in names:
            raise DataError(
                f"{path}: no column {column!r}; it has {', '.join(names)}. {_advice(names)}"
            )


def _advice(names: Sequence[str]) -> str:
    """What to do about columns that are called otherwise."""
    if len(names) == 1 and (other := next((mark for mark in ";\t|," if mark in names[0]), None)):
        return f"Cells seem to be parted by {other!r}: save the table with commas, or tabs as .tsv"
    if any(PurePath(name.strip()).suffix.lower() in PICTURES for name in names):
        return "The first line has to name the columns: image,caption"
    if any(name != name.strip() for name in names):
        return "There is white space around some of these names: take it away"
    return "Name yours with data.image_column and data.caption_columns"


def read_csv(path: Place, config: DataConfig) -> Found:
    """A CSV or TSV file with a header; cells that a short row lacks are empty."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            header = next(csv.reader(file, delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            raise _wrong_quotes(path, 1, error) from error
    check_names(path, config, header)
    columns = _read_plain(path, delimiter, needed(config)) if _plain(header) else None
    if columns is not None:
        return _found(path, config, columns, _Lines(path, delimiter))
    return _read_any(path, delimiter, config, header)


def _read_any(path: Place, delimiter: str, config: DataConfig, header: Sequence[str]) -> Found:
    """Row by row, by the standard library: slow, but it says where what is wrong."""
    columns, pieces, lines = needed(config), [], [np.zeros(0, np.int32)]
    places = [header.index(name) for name in columns]
    bad: dict[int, str] = {}
    count = 0
    for chunk in rows.in_chunks(_numbered_rows(path, delimiter)):
        for number, (_, row) in enumerate(chunk, count):
            if any(row[len(header) :]):
                bad[number] = (
                    f"{len(row)} cells, of which the header names {len(header)}: a caption that "
                    f"holds a {SEPARATORS[delimiter]} needs quotation marks around it"
                )
        count += len(chunk)
        lines.append(np.array([line for line, _ in chunk], np.int32))
        pieces.append([_cells(chunk, place) for place in places])
    found = {
        name: rows.in_one_piece([piece[i] for piece in pieces], TEXT)
        for i, name in enumerate(columns)
    }
    return _found(path, config, found, np.concatenate(lines).__getitem__, bad)


SEPARATORS = {",": "comma", "\t": "tab"}


def _numbered_rows(path: Place, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows after the header, each with the line that it ends on; raises `DataError`."""
    last = 1
    # utf-8-sig: spreadsheets put a byte-order mark before the first column's name.
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            next(reader, None)
            for row in reader:
                if row:  # a line without anything is no row
                    last = reader.line_num
                    yield last, row
        except csv.Error as error:
            raise _wrong_quotes(path, last, error) from error


def _wrong_quotes(path: Place, line: int, error: csv.Error) -> DataError:
    return DataError(
        f"{path}, after line {line}: {error}; a caption that holds a quotation mark needs quotes "
        'around it, and the mark twice: "the ""big"" dog"'
    )


class _Lines:
    """The lines that rows end on, found by reading the file again if anybody asks."""

    def __init__(self, path: Place, delimiter: str) -> None:
        self.path, self.delimiter = path, delimiter

    def __call__(self, row: int) -> int:
        return int(self._all[row])

    @cached_property
    def _all(self) -> np.ndarray:
        lines = (line for line, _ in _numbered_rows(self.path, self.delimiter))
        return np.fromiter(lines, np.int32)


def _plain(header: Sequence[str]) -> bool:
    return len(set(header)) == len(header)


def _read_plain(path: Place, delimiter: str, columns: list[str]) -> dict[str, pa.Array] | None:
    """The columns of a regular file by Arrow's reader, five times faster; None where it is not.

    Arrow's reader takes wrong quotation marks for what they might mean, and may swallow rows.
    """
    if not _quotes_are_regular(path, delimiter):
        return None
    pieces: dict[str, list[pa.Array]] = {name: [] for name in columns}
    try:
        batches = pa_csv.open_csv(
            path,
            pa_csv.ReadOptions(block_size=_BLOCK),
            pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, TEXT),
                strings_can_be_null=False,
            ),
        )
        for batch in batches:
            for name in columns:
                pieces[name].append(rows.copied(rows.trimmed(batch[name])))
    except (pa.ArrowException, KeyError):  # short rows, no UTF-8: the other reader says more
        return None
    found = {}
    for name in columns:
        pa.default_memory_pool().release_unused()
        found[name] = rows.in_one_piece(pieces.pop(name), TEXT)
    return found


_BLOCK = 2**24


def _quotes_are_regular(path: Place, delimiter: str) -> bool:
    """Whether every quotation mark begins or ends a cell, or is doubled within one (RFC 4180)."""
    edges = np.zeros(256, bool)
    edges[list(f'{delimiter}\r\n"'.encode())] = True
    inside, before = False, b"\n"
    with open(path, "rb") as file:
        if file.peek(3)[:3] == codecs.BOM_UTF8:
            file.read(3)
        while block := file.read(_BLOCK):
            after = file.peek(1)[:1] or b"\n"
            data = np.frombuffer(before + block + after, np.uint8)
            marks = np.flatnonzero(data[1:-1] == ord('"')) + 1
            opening = np.arange(len(marks)) % 2 == int(inside)
            if not np.where(opening, edges[data[marks - 1]], edges[data[marks + 1]]).all():
                return False
            inside ^= len(marks) % 2 == 1
            before = block[-1:]
    return not inside


def _cells(chunk: Sequence[tuple[int, list[str]]], place: int) -> pa.Array:
    cells = [row[place] if len(row) > place else "" for _, row in chunk]
    return rows.trimmed(rows.array(cells, TEXT))


def read_json_lines(path: Place, config: DataConfig) -> Found:
    """A file of one JSON object on each line; captions may be lists."""
    types = {name: TEXTS if name in config.caption_columns else TEXT for name in needed(config)}
    pieces: dict[str, list[pa.Array]] = {name: [] for name in types}
    lines, bad, names = [np.zeros(0, np.int32)], {}, set[str]()
    count = 0
    with open(path, encoding="utf-8-sig") as file:
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
    return replace(_found(path, config, columns, np.concatenate(lines).__getitem__), bad=bad)


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


READERS: dict[str, Callable[[Place, DataConfig], Found]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json_lines,
}
"""By the ending of the file's name."""
