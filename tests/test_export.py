"""Models as folders for others: what is written reads back, and what differs is refused."""

from pathlib import Path

import numpy as np
import pytest

import clip_lite_jax
from clip_lite_jax.apps.export import export
from clip_lite_jax.pretrained.own import OWN_FILE, WEIGHTS_FILE


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "whole"
    export(finished_run, out)
    return out


def test_the_whole_model_reads_back(finished_run: Path, folder: Path) -> None:
    live, read = clip_lite_jax.load(finished_run), clip_lite_jax.load(folder)
    texts = ["a red circle", "bar in blue"]
    np.testing.assert_array_equal(live.encode_text(texts), read.encode_text(texts))
    assert read.data_fingerprint == live.data_fingerprint != ""
    assert {path.name for path in folder.iterdir()} == {
        OWN_FILE,
        WEIGHTS_FILE,
        "README.md",
        "tokenizer.model",
    }
