"""Word vectors in the text format of GloVe: a word and its numbers on every line."""

from pathlib import Path

import numpy as np

from clip_lite_jax.errors import CheckpointError

MAX_LINE = 65536
"""Bytes of a line: a thousand numbers and a word fit many times."""


def read_glove(path: Path) -> tuple[list[str], np.ndarray]:
    """The words, and their vectors float32 ``[V, D]``; a first line ``V D`` is skipped.

    Raises:
      CheckpointError: a line that is not a word and as many numbers as the lines before it.
    """
    words: list[str] = []
    rows: list[np.ndarray] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
                if len(line) == MAX_LINE:
                    raise ValueError(f"the line is longer than {MAX_LINE} bytes")
                # Some words hold spaces, so the numbers are counted from the right.
                fields = line.decode().rstrip().split(" ")
                if number == 1 and len(fields) == 2:
                    continue
                width = len(rows[0]) if rows else len(fields) - 1
                row = np.array(fields[-width:], np.float32)
                word = " ".join(fields[:-width])
                if not word or not np.isfinite(row).all():
                    raise ValueError(f"a word and {width} numbers are needed")
                words.append(word)
                rows.append(row)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}, line {len(words) + 1}: {error}") from error
    if not rows:
        raise CheckpointError(f"{path} holds no word vectors")
    return words, np.stack(rows)
