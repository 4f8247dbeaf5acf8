"""Steps whose loss is no number: they end the run, or change nothing and are counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, tiny_model
from test_parity import CASES, Case, make_batch
from test_train import assert_same_state, final_state

from clip_lite_jax import train as training
from clip_lite_jax.batch import Batch
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import AugmentConfig, Config, MeshConfig, OptimConfig
from clip_lite_jax.errors import NonFiniteError
from clip_lite_jax.learner import build_learner
from clip_lite_jax.models import build_model
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh, put_batch
from clip_lite_jax.train_state import TrainState, init_state
from clip_lite_jax.train_step import TrainStep, make_train_step

OPTIM = OptimConfig(warmup_steps=0, ema_decay=0.9, lookahead_steps=2, non_finite="skip")
BATCH = 64


def poisoned(batch: Batch) -> Batch:
    """Pixels of which one is no number."""
    image = batch.image.astype(np.float32)
    image[..., 0, 0, 0, 0] = np.nan
    return replace(batch, image=image)


def clean(batch: Batch) -> Batch:
    return replace(batch, image=batch.image.astype(np.float32))


def built(devices: int, case: Case, fsdp: int = 1) -> tuple[TrainState, TrainStep, Any]:
    mesh_config = MeshConfig(fsdp=fsdp, min_size=16)
    mesh = build_mesh(jax.devices()[:devices], mesh_config)
    model = build_model(tiny_model(), 16, 40, 8, case.objective_config)
    state, optimizer = init_state(
        model,
        lambda params: build_optimizer(OPTIM, 9, params),
        0,
        True,
        mesh,
        case.negatives,
        BATCH,
        mesh_config=mesh_config,
    )
    learner = build_learner(model, case.objective_config, case.negatives, BATCH, mesh, 0)
    step = make_train_step(learner, optimizer, mesh, 0.9, mesh_config, skip_non_finite=True)
    return state, step, mesh


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (8, 1), (8, 4)])
def test_a_skipped_step_changes_nothing_but_its_number(devices: int, fsdp: int) -> None:
    """Parameters, moments, EMA, Lookahead, momentum encoders and queue: bit for bit."""
    state, step, mesh = built(devices, CASES["queue"], fsdp)
    state, metrics = step(state, put_batch(mesh, clean(make_batch(0))))
    assert not metrics["skipped"]
    before = jax.device_get(state)
    state, metrics = step(state, put_batch(mesh, poisoned(make_batch(1))))
    assert metrics["skipped"]
    assert not np.isfinite(metrics["loss"])
    after = jax.device_get(state)
    assert after.step == before.step + 1
    assert_same_state(replace(after, step=before.step), before)
    for leaf, again in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert leaf.dtype == again.dtype
    state, metrics = step(state, put_batch(mesh, clean(make_batch(2))))
    assert not metrics["skipped"]
    assert np.isfinite(metrics["loss"])
    parts = jax.device_get((state.params, state.opt_state, state.ema, state.target))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parts))


def test_one_bad_device_is_bad_for_all() -> None:
    """The pixel is in the first row, which one device of eight has."""
    skipped = []
    for devices in (1, 8):
        state, step, mesh = built(devices, CASES["hard"])
        for number, change in enumerate((clean, poisoned, clean)):
            batch = make_batch(number)
            batch = replace(batch, valid=np.ones_like(batch.valid))
            state, metrics = step(state, put_batch(mesh, change(batch)))
            flags = {bool(shard.data) for shard in metrics["skipped"].addressable_shards}
            skipped.append(flags)
        copies = {float(jnp.sum(s.data)) for s in state.step.addressable_shards}
        assert copies == {3.0}
    assert skipped == [{False}, {True}, {False}] * 2


# --- Whole runs -----------------------------------------------------------------------------------


def train_with(
    bad: set[int], config: Config, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trains with pixels that are no numbers in some steps, from 1 on."""
    plain = AugmentConfig(brightness=0, contrast=0, saturation=0)  # those want whole numbers
    config = replace(config, data=replace(config.data, augment=plain))
    real, step = training.put_batch, 0

    def put(mesh: Any, batch: Batch, *rest: Any) -> Any:
        nonlocal step
        step += 1
        return real(mesh, (poisoned if step in bad else clean)(batch), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "put_batch", put)
        training.train(config, workdir)


def strictly_read(workdir: Path) -> list[dict[str, float]]:
    """The log as a reader has it that knows JSON and no more."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.usefixtures("two_devices")
def test_skipped_steps_are_counted_and_logged(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny_config(pairs, steps=6, optim=replace(OPTIM, max_skipped=2))
    train_with({2, 5}, config, tmp_path / "run", monkeypatch)
    said = [message for message in caplog.messages if "skipped" in message]
    assert [message.partition(":")[0] for message in said] == [
        "step 2 was skipped, 1 of at most 2",
        "step 5 was skipped, 2 of at most 2",
    ]
    lines = [line for line in strictly_read(tmp_path / "run") if "skipped" in line]
    assert {line["step"]: line["skipped"] for line in lines} == {
        step: float(step in (2, 5)) for step in range(1, 7)
    }
    assert {line["step"] for line in lines if "loss" not in line} == {2, 5}
    plain = AugmentConfig(brightness=0, contrast=0, saturation=0)
    config = replace(config, data=replace(config.data, augment=plain))
    state = final_state(config, tmp_path / "run")
    assert state.step == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(("policy", "stopped_at"), [("skip", 5), ("stop", 2)])
def test_it_ends_in_time(
    policy: Any, stopped_at: int, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = replace(OPTIM, non_finite=policy, max_skipped=2)
    config = tiny_config(pairs, steps=8, optim=optim)
    good = stopped_at - 1 - (stopped_at - 1) % 2
    message = (
        rf"step {stopped_at}: loss=nan.*Last good checkpoint: {f'step {good}' if good else 'none'}"
    )
    with pytest.raises(NonFiniteError, match=message):
        train_with({2, 3, 5}, config, tmp_path / "run", monkeypatch)
    assert all(line["step"] < stopped_at for line in strictly_read(tmp_path / "run"))
    if good:
        with Checkpoints.open(tmp_path / "run") as checkpoints:
            assert checkpoints.latest_step() == good
