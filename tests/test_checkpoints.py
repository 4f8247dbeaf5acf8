"""What a checkpoint holds, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_config, tiny_model

from clip_lite_jax.checkpoints import Checkpoints, Meta
from clip_lite_jax.config import CheckpointConfig, OptimConfig
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.models import build_model
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_state import TrainState, init_state

META = Meta(tiny_config(Path("pairs.csv")), b"tokenizer \x00\xff", "fingerprint")


def make_state(devices: int, width: int = 16, seed: int = 0) -> TrainState:
    settings = tiny_model()
    settings = replace(settings, critic=replace(settings.critic, options={"width": width}))
    model = build_model(settings, image_size=16, vocab_size=40, max_tokens=8)
    mesh = build_mesh(jax.devices()[:devices])
    return init_state(
        model, lambda p: build_optimizer(OptimConfig(warmup_steps=1), 9, p), seed, True, mesh
    )[0]


@pytest.fixture(scope="module")
def states() -> tuple[TrainState, TrainState]:
    return make_state(1, seed=0), make_state(2, seed=1)


def save(workdir: Path, state: TrainState, *steps: int, keep: int = 2) -> None:
    with Checkpoints(workdir, CheckpointConfig(keep=keep)) as checkpoints:
        for step in steps:
            checkpoints.save(replace(state, step=state.step + step), META)


def test_everything_comes_back_on_another_mesh(
    states: tuple[TrainState, TrainState], tmp_path: Path
) -> None:
    state, other = states
    save(tmp_path, state, 3)
    with Checkpoints.open(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, other)
        assert checkpoints.meta(3) == META
    assert len(restored.step.sharding.device_set) == 2
    expected = replace(state, step=state.step + 3)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_alone_leave_the_optimizer(
    states: tuple[TrainState, TrainState], tmp_path: Path
) -> None:
    state, other = states
    save(tmp_path, state, 1)
    with Checkpoints.open(tmp_path) as checkpoints:
        restored = checkpoints.restore(1, other, weights_only=True)
    assert jax.tree.leaves(restored.opt_state)[0] is jax.tree.leaves(other.opt_state)[0]
    np.testing.assert_array_equal(
        jax.tree.leaves(restored.params)[0], jax.tree.leaves(state.params)[0]
    )


def test_old_ones_go_and_unfinished_ones_do_not_count(
    states: tuple[TrainState, TrainState], tmp_path: Path
) -> None:
    save(tmp_path, states[0], 1, 2, 3, keep=2)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "3"}
    # What a kill in the middle of a save leaves behind.
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    with Checkpoints.open(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3


def test_another_model_is_refused(states: tuple[TrainState, TrainState], tmp_path: Path) -> None:
    save(tmp_path, states[0], 1)
    with (
        Checkpoints.open(tmp_path) as checkpoints,
        pytest.raises(
            CheckpointError,
            match=r"checkpoint 1 in .* does not fit .*bias is \(16,\) there and \(24,\)",
        ),
    ):
        checkpoints.restore(1, make_state(1, width=24))


def test_there_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        Checkpoints.open(tmp_path)
