"""`benchmarks.search` runs, and measures what it says."""

from pathlib import Path

import numpy as np
import pytest

import clip_lite_jax
from benchmarks import search


def test_rows_are_noisy_copies_of_length_one() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.standard_normal((10, 384)).astype(np.float32)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    rows = search.rows_like(pictures, 1000, rng)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    copies = rows[::10] @ rows[::10].T
    np.testing.assert_allclose(copies[np.triu_indices(100, 1)].mean(), 0.735, atol=0.01)


def test_it_measures_both_methods(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_LITE_CACHE", "set back after the test")
    found = search.measure(clip_lite_jax.load(finished_run, batch_size=16), [40], 8, 4)
    (size,) = found["sizes"]
    assert (size["rows"], size["width"]) == (40, 16)
    assert size["faiss_recall_at_10"] == 1
    printed = search.table(found)
    assert "| 40 | exact |" in printed
    assert "| 40 | faiss |" in printed
