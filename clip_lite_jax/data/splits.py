"""Which examples are for training, validation and test."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from clip_lite_jax.data.rows import array, texts
from clip_lite_jax.errors import DataError

SPLITS = ("train", "validation", "test")
OTHER_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}
"""Other words for a split that files use."""


def split_in(name: str) -> str:
    """The split that a file's name begins with, ``val-00001-of-00002.tar``, or nothing."""
    match = re.match("(train|validation|val|valid|dev|test)(?![a-z])", name, re.IGNORECASE)
    return match.group(1).lower() if match else ""


def splits_of_files(names: Sequence[str], owner: np.ndarray) -> pa.Array | None:
    """`split_in` the names of the files that rows come from; None where no name has any.

    `owner` ``[R]`` is the place in `names` of each row's file.
    """
    stated = [split_in(name) for name in names]
    return array(stated).take(pa.array(owner)) if any(stated) else None


def split_of(group: str, held_out: float) -> str:
    """train, validation or test by a hash of the group: stable when other rows come or go."""
    return SPLITS[int(_split_codes(uniform([group]), held_out)[0])]


def split_by_hash(groups: pa.Array, held_out: float) -> np.ndarray:
    """`split_of` of every group, as int8 places in `SPLITS`."""
    return _split_codes(uniform(texts(groups, np.arange(len(groups)))), held_out)


def split_by_name(names: pa.Array, groups: pa.Array, held_out: float, where: str) -> np.ndarray:
    """Stated splits as int8 places in `SPLITS`; an empty name lets a hash decide.

    Raises:
      DataError: a name that is no split's.
    """
    encoded = names.dictionary_encode()
    places = []
    for stated in encoded.dictionary.to_pylist():
        name = (stated or "").strip().lower()
        name = OTHER_NAMES.get(name, name)
        if name not in (*SPLITS, ""):
            raise DataError(
                f"{where}={stated!r}: a split is train, validation or test, or empty to let a hash "
                "decide"
            )
        places.append(SPLITS.index(name) if name else -1)
    codes = np.asarray(encoded.indices.fill_null(len(places)))
    found = np.array([*places, -1], np.int8)[codes]
    open_ones = np.flatnonzero(found < 0)
    if len(open_ones):
        found[open_ones] = split_by_hash(groups.take(pa.array(open_ones)), held_out)
    return found


def uniform(items: Iterable[str], salt: str = "") -> np.ndarray:
    """Hashes of texts in [0, 1), float64."""
    # Bytes are joined in pieces: ten million little objects would take half a gigabyte.
    digests = bytearray()
    for text in items:
        digests += hashlib.blake2b((salt + text).encode(), digest_size=8).digest()
    return np.frombuffer(bytes(digests), ">u8") / 2**64


def _split_codes(hashes: np.ndarray, held_out: float) -> np.ndarray:
    """The first `held_out` are for the test, as much again for validation."""
    codes = np.zeros(len(hashes), np.int8)
    codes[hashes < 2 * held_out] = SPLITS.index("validation")
    codes[hashes < held_out] = SPLITS.index("test")
    return codes
