"""Real processes, each with its part of the batches: together they see what one process sees."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_pairs

READ = """
import json, sys
import jax
coordinator, processes, process, start, steps, config = sys.argv[1:]
processes, process = int(processes), int(process)
if processes > 1:
    jax.distributed.initialize(coordinator, processes, process)
import numpy as np
from clip_lite_jax.config import DataConfig, from_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.pipeline import TrainTransform, train_batches
from clip_lite_jax.data.sources import build_sources, captions_of
from clip_lite_jax.data.tokenizer import Tokenizer, train_tokenizer
from clip_lite_jax.sharding import build_mesh, pieces_of_process, put_batch, replicated

config = from_dict(DataConfig, json.loads(config))
source = build_sources(config, BadExamples())["train"]
tokenizer = Tokenizer(train_tokenizer(captions_of(source), 60), 8)
transform = TrainTransform(source, TowerInputs(Pixels(config), tokenizer), config, BadExamples())
mesh = build_mesh()
batches = train_batches(transform, 24, 0, int(start), *pieces_of_process(mesh))
whole = jax.jit(lambda batch: batch, out_shardings=replicated(mesh))
for _ in range(int(steps)):
    batch = jax.device_get(whole(put_batch(mesh, next(batches))))
    pixels = batch.image.astype(np.int64).sum(axis=(1, 2, 3)).tolist()
    if jax.process_index() == 0:
        print(json.dumps([batch.index.tolist(), pixels, batch.tokens.tolist()]))
"""


def run(program: str, processes: int, *arguments: str) -> tuple[list[object], list[int]]:
    """What the first of so many processes printed, and how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = [f"127.0.0.1:{port}", str(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, *shared, str(process), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for process in range(processes)
    ]
    finished = [process.communicate(timeout=240) for process in running]
    for process, (_, errors) in zip(running, finished, strict=True):
        assert process.returncode in (0, -signal.SIGKILL), errors[-3000:]
    lines = [line for line in finished[0][0].splitlines() if line.startswith("[[")]
    return [json.loads(line) for line in lines], [process.returncode for process in running]


def read(config: dict[str, object], processes: int, start: int, steps: int) -> list[object]:
    """The global batches ``[start, start + steps)`` as so many processes see them."""
    batches, ended = run(READ, processes, str(start), str(steps), json.dumps(config))
    assert not any(ended)
    return batches


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder: Path = tmp_path_factory.mktemp("processes")
    parts = {
        name: {"source": str(write_pairs(folder / name)), "weight": weight}
        for name, weight in (("a", 3.0), ("b", 2.0), ("c", 1.0))
    }
    return {"mixture": parts, "image_size": 16, "threads": 1, "held_out": 0.0}


def test_processes_see_the_same_batches_and_go_on_with_others(config: dict[str, object]) -> None:
    whole = read(config, processes=1, start=0, steps=6)
    assert len(whole) == 6
    assert read(config, processes=2, start=0, steps=3) == whole[:3]
    # A run that stopped after step 3 goes on with more processes, or with fewer.
    assert read(config, processes=4, start=3, steps=3) == whole[3:]
    assert read(config, processes=1, start=3, steps=3) == whole[3:]
