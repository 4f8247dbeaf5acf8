"""Made-up features of frozen towers, for the benches that learn from stored ones."""

import numpy as np

from benchmarks.frozen_features import Features
from benchmarks.frozen_pairs import SPLITS


def make_features(rows: int, per_group: int, image_width: int, text_width: int) -> Features:
    """`rows` pairs in every split; text is a linear function of image, captions come in twos."""
    rng = np.random.default_rng(0)
    n = rows * len(SPLITS)
    image = rng.normal(size=(n, image_width)).astype(np.float32)
    joined = image @ rng.normal(size=(image_width, text_width)).astype(np.float32)
    return Features(
        image=image,
        caption=np.repeat(joined, 2, axis=0),
        joined=joined,
        owner=np.repeat(np.arange(n, dtype=np.int32), 2),
        group=np.arange(n, dtype=np.int32) // per_group,
        split=np.repeat(SPLITS, rows),
        id=np.array([f"pair {i}" for i in range(n)]),
        text=np.array([f"caption {i} – “ä”" for i in range(2 * n)]),
        provenance={"date": "2026-01-01"},
    )
