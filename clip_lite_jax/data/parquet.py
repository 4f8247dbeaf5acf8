"""Parquet files of captions with image paths, or with the images themselves."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.pairs import MAX_BYTES, Found, Images, images_in
from clip_lite_jax.data.rows import TEXT, TEXTS, array, in_one_piece
from clip_lite_jax.data.shards import shard_paths
from clip_lite_jax.data.splits import splits_of_files
from clip_lite_jax.data.tables import check_names, needed
from clip_lite_jax.errors import BadImage, DataError, Unreadable
from clip_lite_jax.places import Place, each, place, stamp_of


def read_parquet(config: DataConfig) -> Found:
    """One file, a folder of files, or a pattern (`shards.shard_paths`).

    The image column holds paths, bytes, or Hugging Face's ``{bytes, path}``.  Without a split
    column the split is the one that a file's name begins with, ``train-00000-of-00004.parquet``.

    Raises:
      DataError: no such files, a missing column, or one that holds something else.
    """
    paths = shard_paths(config.source, ".parquet")
    list(each(os.fspath, paths))  # of remote files a copy, several at a time
    tables, counts = [], []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                check_names(path, config, file.schema_arrow.names)
                table = file.read(columns=_columns(file.schema_arrow, config))
                table.validate(full=True)  # texts are UTF-8, lists within their bounds
        # UnicodeDecodeError: of names of columns.
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no Parquet file that can be read: {error}") from error
        tables.append(_plain(path, table, config))
        counts.append(len(table))
    try:
        table = pa.concat_tables(tables).combine_chunks()
    except pa.ArrowInvalid as error:
        raise DataError(f"data.source={config.source!r}: files of different columns") from error
    owner = np.repeat(np.arange(len(paths)), counts)
    number = np.concatenate([np.arange(count) for count in counts])

    def where(row: int) -> str:
        return f"{paths[owner[row]].name}, row {number[row]}"

    def column(name: str | None, type: pa.DataType = TEXT) -> pa.Array | None:
        return in_one_piece(table[name].chunks, type) if name else None

    images: Images
    if config.image_column in table.column_names:
        ids = column(config.image_column)
        folder = place(config.image_folder) if config.image_folder else paths[0].parent
        images = images_in(folder, ids)
    else:
        ids = array([where(row).replace(", row ", "/") for row in range(len(owner))], TEXT)
        images = ParquetImages(paths, config.image_column, owner, number)
    splits = column(config.split_column)
    if splits is None:
        splits = splits_of_files([path.name for path in paths], owner)
    captions = [column(name, table.schema.field(name).type) for name in config.caption_columns]
    return Found(config.source, images, ids, captions, column(config.group_column), splits, where)


class ParquetImages(Images):
    """Images in a column of Parquet files, which are read a row group at a time.

    The last few row groups stay in memory: good for reading in order.  In random order every image
    costs the decoding of its group; convert such files before training.
    """

    GROUPS = 2

    def __init__(
        self, paths: Sequence[Place], column: str, owner: np.ndarray, number: np.ndarray
    ) -> None:
        """`owner` ``[N]``: the file of each row; `number` ``[N]``: its row there."""
        self.paths, self.column, self.owner, self.number = tuple(paths), column, owner, number
        self._lock = threading.Lock()
        self._starts: dict[int, np.ndarray] = {}
        self._groups: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()

    def read(self, index: int) -> bytes:
        owner, number = int(self.owner[index]), int(self.number[index])
        try:
            with self._lock:
                starts = self._group_starts(owner)
                group = int(np.searchsorted(starts, number, side="right")) - 1
                value = self._group(owner, group)[number - int(starts[group])].as_py()
        # IndexError: a damaged file, whose parts speak of different numbers of rows.  ValueError:
        # names that are no UTF-8.
        except (pa.ArrowException, OSError, IndexError, ValueError) as error:
            # Damage is said in an OSError, too; but one of the system has a number.
            kind = Unreadable if getattr(error, "errno", None) else BadImage
            raise kind(f"{self.paths[owner]} cannot be read: {error}") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise BadImage("no image")
        if len(data) > MAX_BYTES:
            raise BadImage(f"{len(data):,} bytes, over {MAX_BYTES:,}")
        return bytes(data)

    def stamp(self, index: int) -> str:
        return self._stamps[self.owner[index]]

    @cached_property
    def _stamps(self) -> list[str]:
        return [stamp_of(path) for path in self.paths]

    def take(self, indices: np.ndarray) -> "ParquetImages":
        return ParquetImages(self.paths, self.column, self.owner[indices], self.number[indices])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.paths, self.column, self.owner, self.number)

    def _group_starts(self, owner: int) -> np.ndarray:
        """The first row of each group, and the end of the last."""
        if owner not in self._starts:
            known = pq.read_metadata(self.paths[owner])
            lengths = [known.row_group(i).num_rows for i in range(known.num_row_groups)]
            self._starts[owner] = np.concatenate([[0], np.cumsum(lengths)])
        return self._starts[owner]

    def _group(self, owner: int, group: int) -> pa.ChunkedArray:
        if (owner, group) not in self._groups:
            with pq.ParquetFile(self.paths[owner]) as file:
                table = file.read_row_group(group, columns=[self.column], use_threads=False)
            self._groups[owner, group] = table[self.column]
            while len(self._groups) > self.GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end((owner, group))
        return self._groups[owner, group]


def _columns(schema: pa.Schema, config: DataConfig) -> list[str]:
    """What is read at the start: not the images."""
    holds_images = not _is_text(schema.field(config.image_column).type)
    return [name for name in needed(config) if name != config.image_column or not holds_images]


def _plain(path: Place, table: pa.Table, config: DataConfig) -> pa.Table:
    """Columns of `TEXT`, or `TEXTS` where captions are lists; white space around them goes."""
    columns = {}
    for name in table.column_names:
        column = table[name]
        nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if nested and name in config.caption_columns and _is_text(column.type.value_type):
            columns[name] = column.cast(TEXTS)
        elif _is_text(column.type):
            columns[name] = pc.utf8_trim_whitespace(column.cast(TEXT))
        else:
            raise DataError(f"{path}: column {name!r} holds {column.type}, not text")
    return pa.table(columns) if columns else table


def _is_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return type in (pa.string(), pa.large_string(), pa.string_view())
