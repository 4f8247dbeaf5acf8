"""A training of two processes is killed and goes on with one.

Kept out of the ordinary run because its four starts take more than a minute of processor time;
`tests/test_processes.py` compares what other numbers of processes see, and
`tests/test_distributed.py` kills a process in training.
"""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import tiny_config, write_pairs
from test_processes import run

from clip_lite_jax.config import to_dict

TRAIN = '''
import json, os, signal, sys, time
import jax
coordinator, processes, process, last, workdir, config = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(coordinator, int(processes), int(process))
from pathlib import Path
import numpy as np
from clip_lite_jax import train as training
from clip_lite_jax.config import Config, from_dict
from clip_lite_jax.sharding import put_batch, replicated

steps = 0

def watched(mesh, batch, parts=False):
    global steps
    whole = put_batch(mesh, batch, parts)
    index = jax.jit(lambda x: x, out_shardings=replicated(mesh))(whole.index)
    print("[" + json.dumps(np.asarray(index).tolist()) + "]", flush=True)
    steps += 1
    if steps == int(last):
        wait_for_the_end()
    return whole

def wait_for_the_end():
    """All die at once: one that survives another ends by itself, in another way."""
    file = Path(workdir, f"{process}.pid")
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").rename(file)
    files = [file.with_stem(str(n)) for n in reversed(range(int(processes)))]
    while True:
        there = all(f.exists() for f in files) and Path(workdir, "checkpoints", "3").is_dir()
        if there and process == "0":
            for pid in [int(f.read_text()) for f in files]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)

training.put_batch = watched
training.train(from_dict(Config, json.loads(config)), Path(workdir))
'''


def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    config = tiny_config(write_pairs(tmp_path / "pairs"))
    config = replace(
        config,
        steps=7,
        batch_size=16,
        negatives=replace(config.negatives, block=16, lanes=4),
        checkpoint=replace(config.checkpoint, every=3),
        eval=replace(config.eval, every=100),
    )
    given = json.dumps(to_dict(config))
    whole, ended = run(TRAIN, 1, "0", str(tmp_path / "whole"), given)
    assert (len(whole), ended) == (7, [0])
    killed, ended = run(TRAIN, 2, "5", str(tmp_path / "killed"), given)
    assert (killed, ended) == (whole[:5], [-signal.SIGKILL] * 2)
    rest, ended = run(TRAIN, 1, "0", str(tmp_path / "killed"), given)
    assert (rest, ended) == (whole[3:], [0])
