"""What worker processes map into memory."""

import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import tiny_config, write_pairs

from clip_lite_jax.apps import data_jobs
from clip_lite_jax.config import DataConfig, to_dict
from clip_lite_jax.data import sharing
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.pipeline import TrainTransform
from clip_lite_jax.data.sharing import Shared
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import DataError
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.run import build_run


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


@pytest.mark.parametrize("proc", [True, False])
def test_it_is_written_once_and_goes_with_its_object(
    proc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not proc:  # as on other systems than Linux
        monkeypatch.setattr(sharing, "_OPEN_FILES", Path("/nowhere"))
    shared = Shared(np.arange(5))
    assert pickle.dumps(shared) == pickle.dumps(shared)
    path = Path(shared.__reduce__()[1][0])
    assert path.stat().st_mode & 0o077 == 0
    back = pickle.loads(pickle.dumps(shared))
    del shared
    assert not path.exists()
    assert back.sum() == 10  # what is mapped stays


def ids(source) -> list[str]:  # type: ignore[no-untyped-def]
    return [source.metadata(i).id for i in range(len(source))]


def test_a_source_is_the_same_in_another_process(tmp_path: Path) -> None:
    config = DataConfig(source=str(write_pairs(tmp_path)), held_out=0.0)
    source = build_sources(config, BadExamples())["train"]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(ids, Shared(source)).result() == ids(source)


ENDLESS = """
import json, sys
from pathlib import Path
from clip_lite_jax.config import Config, from_dict
from clip_lite_jax.train import train
if __name__ == "__main__":
    train(from_dict(Config, json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_workers_end_with_a_trainer_that_is_killed(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(pairs)
    config = replace(config, steps=10**6, data=replace(config.data, workers=2))
    command = [sys.executable, "-c", ENDLESS, json.dumps(to_dict(config)), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as trainer:
        deadline = time.monotonic() + 120
        while not (read_metrics(tmp_path) and len(children(trainer.pid)) >= 2):
            assert trainer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        workers = children(trainer.pid)
        trainer.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def test_threads_that_pickle_at_once_write_one_file() -> None:
    shared = Shared(np.zeros(10**6))
    with ThreadPoolExecutor(8) as pool:
        written = set(pool.map(lambda _: pickle.dumps(shared), range(8)))
    assert len(written) == 1
    assert pickle.loads(written.pop()).shape == (10**6,)


def test_a_transform_can_be_pickled_again_and_again(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(pairs)
    run = build_run(config, tmp_path)
    state, _ = run.init_state({})
    inputs = run.inputs(state.params, state.model_state)
    transform = TrainTransform(run.sources["train"], inputs, config.data, run.bad)
    for _ in range(3):
        transform = pickle.loads(pickle.dumps(transform))
        assert ids(transform.source) == ids(run.sources["train"])


def test_no_room_for_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharing, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR.*data.workers=0"):
        pickle.dumps(Shared(np.zeros(3)))


def test_jobs_of_many_threads_open_a_source_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = data_jobs.as_text(DataConfig(source=str(write_pairs(tmp_path))))
    opened = []
    build = data_jobs.build_sources
    monkeypatch.setattr(
        data_jobs, "build_sources", lambda *a, **k: opened.append(0) or build(*a, **k)
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: data_jobs.sources_of(text), range(16)))
    assert len(opened) == 1
    assert all(sources is found[0] for sources in found)
