"""Whole runs: what they leave behind, resuming after a kill, and how they stop."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import draw, tiny_config, write_pairs

from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import Config, NegativesConfig, ObjectiveConfig, OptimConfig, to_dict
from clip_lite_jax.errors import ConfigError, DataError, NonFiniteError
from clip_lite_jax.evaluate import evaluate
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.optim import build_schedule
from clip_lite_jax.run import build_run, restore_or_init
from clip_lite_jax.train import PendingMetrics, train
from clip_lite_jax.train_state import TrainState

pytestmark = pytest.mark.usefixtures("two_devices")


def final_state(config: Config, workdir: Path) -> TrainState:
    with Checkpoints.open(workdir) as checkpoints:
        state, _ = restore_or_init(build_run(config, workdir), checkpoints)
    return jax.device_get(state)


def assert_same_state(one: TrainState, other: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_leaves_config_tokenizer_metrics_and_results(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(pairs, optim=OptimConfig(warmup_steps=1, ema_decay=0.9))
    results = evaluate(train(config, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(config)
    assert (tmp_path / "tokenizer.model").stat().st_size > 0
    lines = list(read_metrics(tmp_path))
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4]
    wanted = {"score_positive", "score_negative", "critic_accuracy", "temperature"}
    assert all(wanted <= line.keys() for line in lines if "loss" in line)
    evaluated = [line["step"] for line in lines if "information/jsd_loss" in line]
    assert evaluated == [0, 2, 4]
    assert results["test"]["retrieval/held_out"]["text_to_image_r10"] >= 0
    assert results["step"] == 4
    # The checkpoint alone describes the run.
    with Checkpoints.open(tmp_path) as checkpoints:
        meta = checkpoints.meta(4)
    assert meta.config == config
    assert meta.tokenizer == (tmp_path / "tokenizer.model").read_bytes()
    # Test data is used once: a second evaluation hands out the first one's numbers.
    assert evaluate(build_run(config, tmp_path)) == json.loads(
        (tmp_path / "results.json").read_text()
    )


def test_training_learns(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(
        pairs,
        steps=60,
        eval=replace(tiny_config(pairs).eval, every=60),
        optim=OptimConfig(warmup_steps=5, learning_rate=1e-2),
    )
    train(config, tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    rates = [line["learning_rate"] for line in read_metrics(tmp_path) if "loss" in line]
    schedule = build_schedule(config.optim, config.steps)
    # Computed for many steps at once: near the end of a cosine float32 rounds in another order.
    expected = [float(schedule(step)) for step in range(config.steps)]
    assert rates == pytest.approx(expected, rel=1e-5)


def config_that_carries_everything(table: Path) -> Config:
    """A run whose state has all that can go from step to step."""
    return tiny_config(
        table,
        steps=24,
        optim=OptimConfig(warmup_steps=1, ema_decay=0.9),
        objective=ObjectiveConfig(name="dv"),
        negatives=NegativesConfig(name="queue", sides="both", block=4, lanes=2, memory=4),
        accumulate=2,
    )


TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train import config_that_carries_everything
from clip_lite_jax.train import train
import clip_lite_jax.train as loop

put = loop.put_batch
def put_and_note(mesh, batch, parts):
    with open(Path(sys.argv[3]) / "ids.txt", "a") as file:
        file.write(" ".join(map(str, batch.index.ravel())) + "\\n")
    return put(mesh, batch, parts)
loop.put_batch = put_and_note

train(config_that_carries_everything(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def start_training(table: Path, workdir: Path) -> subprocess.Popen[bytes]:
    workdir.mkdir(exist_ok=True)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", TRAIN, here, str(table), str(workdir)]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def steps_seen(workdir: Path) -> list[str]:
    path = workdir / "ids.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_a_finished_run_is_left_alone(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(pairs, steps=2)
    train(config, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_bad_rows_are_listed_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "data")
    (tmp_path / "data" / "broken.png").write_bytes(b"not a picture")
    draw("ring", "red").save(tmp_path / "data" / "silent.png")
    with table.open("a") as file:
        file.write("missing.png,a missing file\nsilent.png,\nbroken.png,a broken picture\n")
    workdir = tmp_path / "run"
    config = tiny_config(table, steps=8)
    config = replace(config, data=replace(config.data, held_out=0, captions="first"))
    run = train(config, workdir)  # without held-out data every example is trained on
    listed = [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]
    reasons = {item["id"]: item["reason"] for item in listed}
    assert len(reasons) == len(run.bad) == 3
    assert reasons["pairs.csv:98: missing.png"] == "no such file"
    assert reasons["pairs.csv:99: silent.png"] == "empty caption"
    assert "cannot be decoded" in reasons["broken.png"]
    assert [line["step"] for line in read_metrics(workdir) if "loss" in line][-1] == 8


def test_a_loss_that_is_not_finite_stops_the_run(pairs: Path, tmp_path: Path) -> None:
    explosive = OptimConfig(
        name="sgd", learning_rate=1e38, warmup_steps=0, clip_norm=None, weight_decay=0
    )
    with pytest.raises(NonFiniteError, match=r"step \d+: loss=.*Last good checkpoint.*png"):
        train(tiny_config(pairs, steps=20, optim=explosive), tmp_path)


def test_a_changed_configuration_is_refused_with_both_values(pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(pairs, steps=2)
    train(config, tmp_path)
    with pytest.raises(ConfigError, match="batch_size: 16 there, 32 now"):
        train(replace(config, batch_size=32), tmp_path)
    with pytest.raises(ConfigError, match=r"optim.learning_rate: 0.001 there, 0.1 now"):
        train(replace(config, optim=replace(config.optim, learning_rate=0.1)), tmp_path)
    train(replace(config, log=replace(config.log, every=5)), tmp_path)  # harmless


def test_a_workdir_without_a_checkpoint_binds_nobody(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "data")
    config, workdir = tiny_config(table, steps=2), tmp_path / "run"
    good = table.read_text()
    table.write_text(good.replace(".png", ".gif"))
    with pytest.raises(DataError, match="no such file"):
        train(config, workdir)
    table.write_text(good)
    with pytest.raises(DataError, match="batch_size=512 is more than"):
        train(replace(config, batch_size=512), workdir)
    run = train(config, workdir)
    assert len(run.bad) == 0
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 16


def test_splits_without_two_usable_examples_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_pairs(tmp_path / "data")
    rows = table.read_text().splitlines()
    held_out = [f"{row},test" if row.startswith("red_ring") else f"{row},train" for row in rows[1:]]
    table.write_text("\n".join([rows[0] + ",part", *held_out]))
    config = tiny_config(table, steps=2)
    config = replace(config, data=replace(config.data, split_column="part"))
    assert evaluate(train(config, tmp_path / "run"))["test"] == {}
    assert "not evaluated on test data: information, retrieval/held_out" in caplog.text


def test_changed_data_is_refused(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "data")
    config = tiny_config(table, steps=2)
    train(config, tmp_path / "run")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, "red_ring.png,another caption"]))
    with pytest.raises(ConfigError, match="a run on other data"):
        train(config, tmp_path / "run")


def test_the_loop_waits_for_all_but_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of more steps than that never lie on the devices."""
    waited: list[int] = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    pending = PendingMetrics.__new__(PendingMetrics)
    pending.every, pending.waiting = 100, []
    pending.progress = SimpleNamespace(  # type: ignore[assignment]
        advance=lambda: None, blocked=lambda seconds: None
    )
    for step in range(1, 6):
        pending.add(step, step, None)  # type: ignore[arg-type]
        assert waited == list(range(1, step))


@pytest.mark.parametrize(("limit", "said"), [(3, True), (40, False)])
def test_captions_that_are_cut_are_told_of(
    limit: int, said: bool, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(pairs)
    run = build_run(replace(config, data=replace(config.data, max_tokens=limit)), tmp_path)
    run.warn_of_cut_captions()
    assert (f"longer than data.max_tokens={limit} and are cut" in caplog.text) == said
