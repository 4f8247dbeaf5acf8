"""Weights generated from their names, so that two programs have equal ones and no file travels."""

import zlib
from collections.abc import Iterable

import numpy as np


def generated(name: str, shape: Iterable[int]) -> np.ndarray:
    """The weight that stands for the one of this name."""
    rng, shape = np.random.default_rng(zlib.crc32(name.encode())), tuple(shape)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return x / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    return 1 + np.float32(0.1) * x if name.endswith("weight") else np.float32(0.1) * x
