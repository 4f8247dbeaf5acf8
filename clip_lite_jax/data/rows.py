"""What is known of many examples but their images, in columns.

An example costs its text and some tens of bytes, not the kilobyte of a Python object: ten million
fit into the memory of a laptop.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.data.records import Example

TEXT = pa.large_string()
TEXTS = pa.large_list(TEXT)
ATTRIBUTES = pa.map_(pa.string(), pa.string())

_CHUNK = 65_536
"""Rows that pass through Python objects at a time."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Random access to examples without their images.

    Attributes:
      ids, groups: `TEXT`, one each; see `Example`.
      captions: `TEXTS`.
      attributes: `ATTRIBUTES`, or None where no example has any.
    """

    ids: pa.Array
    groups: pa.Array
    captions: pa.Array
    attributes: pa.Array | None = None

    @staticmethod
    def of(examples: Iterable[Example]) -> Rows:
        columns: list[list[pa.Array]] = [[], [], [], []]
        for chunk in in_chunks(examples):
            columns[0].append(array([e.id for e in chunk], TEXT))
            columns[1].append(array([e.group for e in chunk], TEXT))
            columns[2].append(array([e.captions for e in chunk], TEXTS))
            columns[3].append(array([list(e.attributes.items()) for e in chunk], ATTRIBUTES))
        types = (TEXT, TEXT, TEXTS, ATTRIBUTES)
        return Rows(*(in_one_piece(c, t) for c, t in zip(columns, types, strict=True)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        attributes = {} if self.attributes is None else dict(self.attributes[index].as_py())
        return Example(
            self.ids[index].as_py(),
            self.groups[index].as_py(),
            tuple(self.captions[index].as_py()),
            b"",
            attributes,
        )

    def update(self, digest: Any, indices: np.ndarray) -> None:
        """Feeds ids, groups and captions of the examples at `indices` into a hash."""
        for start in range(0, len(indices), _CHUNK):
            chosen = pa.array(indices[start : start + _CHUNK])
            for column in (self.ids, self.groups, self.captions):
                _update(digest, column.take(chosen))


def _update(digest: Any, array: pa.Array) -> None:
    """Lengths, then content: equal values give equal bytes, however they lie in memory."""
    if array.type == TEXTS:
        digest.update(np.asarray(pc.list_value_length(array)))
        array = array.flatten()
    digest.update(np.asarray(pc.binary_length(array)))
    bounds, data = _bytes(array)
    digest.update(data[bounds[0] : bounds[-1]])


def array(values: Sequence[Any], type: pa.DataType = TEXT) -> pa.Array:
    """An Arrow array of texts, or of lists or pairs of them.

    Halves of surrogates, which names of files and JSON may hold but no UTF-8, are written out:
    ``\\udc80``.
    """
    try:
        return pa.array(values, type)
    except UnicodeEncodeError:
        return pa.array([_encodable(value) for value in values], type)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_encodable, value))  # pairs have to stay tuples
    return value


def in_one_piece(chunks: Sequence[pa.Array], type: pa.DataType) -> pa.Array:
    pieces = [chunk.cast(type) for chunk in chunks] or [pa.array([], type)]
    return pieces[0] if len(pieces) == 1 else pa.concat_arrays(pieces)


def copied(array: pa.Array) -> pa.Array:
    """The same in memory of its own size: readers leave half as much again unused behind it."""
    return pa.concat_arrays([array, array.slice(0, 0)])


def trimmed(array: pa.Array) -> pa.Array:
    """`TEXT` without white space around it."""
    bounds, data = _bytes(array)
    bounds = bounds[np.append(True, np.diff(bounds) > 0)]  # empty ones have no ends
    if len(bounds) > 1:
        # Looking is ten times faster than trimming.  White space beyond ASCII begins with 0xC2.
        first, last = data[bounds[:-1]], data[bounds[1:] - 1]
        if np.all((first > 32) & (first < 128) & (last > 32) & (last < 128)):
            return array
    return pc.utf8_trim_whitespace(array)


def _bytes(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of `TEXT` ``[N]``, int64 ``[N + 1]``, in the bytes of all, uint8."""
    _, offsets, content = array.buffers()
    if not len(array):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return bounds, np.frombuffer(content or b"", np.uint8)


def all_different(array: pa.Array) -> bool:
    """True only if no two values of `TEXT` are equal; False if some are, or may be."""
    if array.null_count:
        return False
    bounds, data = _bytes(array)
    hashes = np.empty(len(array), np.uint64)
    for start in range(0, len(array), _CHUNK):
        begin = bounds[start : start + _CHUNK + 1]
        lengths = np.diff(begin)
        begin, longest = begin[:-1], int(lengths.max())
        if longest > _LONG:
            return False
        value = lengths.astype(np.uint64)
        for place in range(longest):
            there = lengths > place
            if there.all():
                value = (value ^ data[begin + place]) * _PRIME
            else:
                value[there] = (value[there] ^ data[begin[there] + place]) * _PRIME
        hashes[start : start + len(value)] = value
    hashes.sort()
    return not np.any(hashes[1:] == hashes[:-1])


_LONG = 512
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def in_chunks(items: Iterable[Any], size: int = _CHUNK) -> Iterator[list[Any]]:
    """Lists of up to `size` items."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def texts(column: pa.Array, indices: np.ndarray) -> Iterator[str]:
    """The values of a column of text at `indices`, without a list of them all."""
    for start in range(0, len(indices), _CHUNK):
        yield from column.take(pa.array(indices[start : start + _CHUNK])).to_pylist()


def group(keys: pa.Array, captions: Sequence[pa.Array]) -> tuple[np.ndarray, pa.Array]:
    """Rows of equal keys as one, in the order of their first appearance.

    Args:
      keys: `TEXT` ``[R]``.
      captions: columns of `TEXT` or `TEXTS`, each ``[R]``; null and empty ones count as none.

    Returns:
      The first row of each key, ``[K]``; all captions of each key, each once, row by row and
      column by column, `TEXTS` ``[K]``.
    """
    # Millions of images in a row each: no table of them all is needed to see that.
    different = all_different(keys)
    if different and len(captions) == 1 and captions[0].type == TEXT:
        return np.arange(len(keys)), _lists_of_one(captions[0])
    codes, first = [np.arange(len(keys))] * 2 if different else _codes(keys)
    owners, places, values = [], [], []
    for number, column in enumerate(captions):
        rows, flat = _flat(column)
        kept = np.asarray(pc.greater(pc.fill_null(pc.binary_length(flat), 0), 0))
        if not kept.all():
            rows, flat = rows[kept], flat.filter(pa.array(kept))
        owners.append(codes[rows])
        places.append(rows * len(captions) + number)
        values.append(flat)
    owner, place, flat = np.concatenate(owners), np.concatenate(places), in_one_piece(values, TEXT)
    if not _sorted(owner, place):
        order = np.lexsort((place, owner))
        owner, flat = owner[order], flat.take(pa.array(order))
    if len(owner) > len(first):  # a key has several captions: are any of them equal?
        alike = owner * (len(owner) + 1) + _codes(flat)[0]
        new = np.sort(np.unique(alike, return_index=True)[1])
        if len(new) < len(owner):
            owner, flat = owner[new], flat.take(pa.array(new))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(first)))])
    return first, pa.LargeListArray.from_arrays(pa.array(offsets), flat)


def _lists_of_one(column: pa.Array) -> pa.Array:
    """`TEXT` → `TEXTS`, null and empty ones as empty lists."""
    lengths = np.asarray(pc.fill_null(pc.binary_length(column), 0))
    if not lengths.all():
        column = column.filter(pa.array(lengths > 0))
    bounds = np.concatenate([[0], np.cumsum(lengths > 0)])
    return pa.LargeListArray.from_arrays(pa.array(bounds), column)


def _codes(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Equal values as equal numbers, in the order of first appearance; the first row of each."""
    codes = np.asarray(column.dictionary_encode().indices).astype(np.int64)
    first = np.zeros(codes.max(initial=-1) + 1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of several writes the last one stays
    return codes, first


def _flat(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Of every text in a column of texts or of lists of them: its row, and itself."""
    if column.type != TEXTS:
        return np.arange(len(column)), column
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    return np.repeat(np.arange(len(column)), lengths), column.flatten()


def _sorted(owner: np.ndarray, place: np.ndarray) -> bool:
    steps = np.diff(owner)
    return not np.any(steps < 0) and not np.any((steps == 0) & (np.diff(place) < 0))
