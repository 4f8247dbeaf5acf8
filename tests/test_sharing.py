"""What worker processes map into memory."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
from conftest import write_pairs

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sharing import Shared
from clip_lite_jax.data.sources import build_sources


def folder_of(shared: Shared) -> Path:
    return shared.__reduce__()[1][0].parent


def test_arrays_come_back_without_being_copied() -> None:
    value = {
        "numbers": np.arange(1000).reshape(10, 100),
        "none": np.zeros((0, 3)),
        "texts": pa.array(["a", "", None, "é"] * 100, pa.large_string()),
        "rest": ("plain", 1),
    }
    shared = Shared(value)
    data = pickle.dumps(shared)
    assert len(data) < 500
    for _ in range(2):
        back = pickle.loads(data)
        np.testing.assert_array_equal(back["numbers"], value["numbers"])
        assert back["none"].shape == (0, 3)
        assert back["texts"].equals(value["texts"])
        assert back["rest"] == ("plain", 1)
        assert not back["numbers"].flags.owndata
        assert not back["numbers"].flags.writeable


def test_it_is_written_once_and_goes_with_its_object() -> None:
    shared = Shared(np.arange(5))
    assert pickle.dumps(shared) == pickle.dumps(shared)
    folder = folder_of(shared)
    assert folder.stat().st_mode & 0o077 == 0
    back = pickle.loads(pickle.dumps(shared))
    del shared
    assert not folder.exists()
    assert back.sum() == 10  # what is mapped stays


def ids(source) -> list[str]:  # type: ignore[no-untyped-def]
    return [source.metadata(i).id for i in range(len(source))]


def test_a_source_is_the_same_in_another_process(tmp_path: Path) -> None:
    config = DataConfig(source=str(write_pairs(tmp_path)), held_out=0.0)
    source = build_sources(config, BadExamples())["train"]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(ids, Shared(source)).result() == ids(source)
