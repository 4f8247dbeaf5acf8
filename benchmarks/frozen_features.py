"""Features of frozen pretrained towers, as `frozen_towers` stores them; needs numpy alone."""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.errors import DataError
from clip_lite_jax.files import write_atomic

FEATURES_FILE = Path("runs/one_negative/features.npz")


@dataclass(frozen=True, kw_only=True)
class Features:
    """N examples with C captions in all; see `frozen_pairs` for splits and groups."""

    image: np.ndarray  # [N, 1280] float32
    caption: np.ndarray  # [C, 384] float32
    joined: np.ndarray  # [N, 384] float32, all captions of an example as one list of words
    owner: np.ndarray  # [C] int32, the example of a caption; ascending, every example has one
    group: np.ndarray  # [N] int32, examples that share it depict the same thing
    split: np.ndarray  # [N] text, one of `frozen_pairs.SPLITS`
    id: np.ndarray  # [N] text, unique
    text: np.ndarray  # [C] text, the captions
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        n, c = len(self.id), len(self.text)
        lengths = {"image": n, "joined": n, "group": n, "split": n, "caption": c, "owner": c}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise DataError(f"{name} has {len(getattr(self, name))} rows, not {length}")
        for name in ("image", "caption", "joined"):
            value = getattr(self, name)
            if value.dtype != np.float32 or value.ndim != 2 or not np.isfinite(value).all():
                raise DataError(f"{name} is not a finite float32 matrix")
        if not np.array_equal(np.unique(self.owner), np.arange(n)) or np.any(
            np.diff(self.owner) < 0
        ):
            raise DataError("owner does not give every example its captions in order")

    def rows(self, split: str) -> np.ndarray:
        """Indices of the examples of a split."""
        return np.flatnonzero(self.split == split)

    def gallery(self, split: str) -> np.ndarray:
        """Indices of one example of every group of a split, chosen by a hash of its id."""
        rows = self.rows(split)
        hashes = [hashlib.blake2b(str(self.id[i]).encode(), digest_size=8).digest() for i in rows]
        shuffled = rows[np.array(sorted(range(len(rows)), key=hashes.__getitem__), int)]
        _, first = np.unique(self.group[shuffled], return_index=True)
        return np.sort(shuffled[first])


def save_features(path: Path, features: Features) -> None:
    """Writes all fields to one ``.npz`` file, whole or not at all."""
    arrays = {field.name: getattr(features, field.name) for field in fields(Features)}
    arrays["provenance"] = np.array(json.dumps(features.provenance))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def load_features(path: Path = FEATURES_FILE) -> Features:
    """Reads and checks what `save_features` wrote.

    Raises:
      DataError: no such file, or one that does not hold `Features`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in fields(Features)}
        provenance = json.loads(str(arrays.pop("provenance")))
        return Features(**arrays, provenance=provenance)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; benchmarks/frozen_towers.py makes it") from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} does not hold frozen features: {error}") from error
