"""Vectors of unit length, in NumPy."""

import numpy as np
from numpy.typing import DTypeLike


def unit(vectors: np.ndarray, dtype: DTypeLike | None = None) -> np.ndarray:
    """Vectors ``[..., D]`` scaled to length 1, as floats of a type or of their own; zeros stay."""
    vectors = np.asarray(vectors, dtype)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
