"""What a checkpoint holds, and what it refuses."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_config, tiny_model

from clip_lite_jax.checkpoints import Checkpoints, Meta, has_checkpoint
from clip_lite_jax.config import CheckpointConfig, OptimConfig
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.manifest import problem_of, seal
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


# --- Damage ---------------------------------------------------------------------------------------


def files_of(workdir: Path, step: int) -> list[Path]:
    return sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"flipped": flip_a_bit, "cut": cut, "deleted": Path.unlink}


@pytest.fixture(scope="module")
def two_checkpoints(
    states: tuple[TrainState, TrainState], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    workdir = tmp_path_factory.mktemp("two")
    save(workdir, states[0], 1, 2)
    return workdir


@pytest.mark.parametrize("how", DAMAGE)
def test_no_damage_goes_unnoticed(
    how: str, two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = len(files_of(two_checkpoints, 2))
    assert count > 10
    for number in range(count):
        workdir = tmp_path / str(number)
        shutil.copytree(two_checkpoints, workdir)
        victim = files_of(workdir, 2)[number]
        DAMAGE[how](victim)
        caplog.clear()
        with Checkpoints(workdir) as checkpoints:
            assert checkpoints.latest_step() == 1
        assert "is not used" in caplog.text or "was not finished" in caplog.text
        names = {path.name for path in (workdir / "checkpoints").iterdir()}
        assert names == {"1", "2.damaged"}


def test_the_one_before_is_restored_and_the_step_saved_again(
    states: tuple[TrainState, TrainState], two_checkpoints: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    flip_a_bit(files_of(workdir, 2)[-1])
    with Checkpoints.open(workdir) as checkpoints:  # to read: nothing moves
        assert checkpoints.latest_step() == 1
    assert (workdir / "checkpoints" / "2").is_dir()
    for _ in range(2):
        with Checkpoints(workdir) as checkpoints:
            step = checkpoints.latest_step()
            assert step == 1
            state = checkpoints.restore(step, states[1])
            checkpoints.save(replace(state, step=state.step + 1), META)
            checkpoints.wait()
            assert checkpoints.latest_step() == 2
        flip_a_bit(files_of(workdir, 2)[-1])
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"1", "2", "2.damaged", "2.damaged1"}


def test_all_damaged_is_an_error(two_checkpoints: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    for step in (1, 2):
        flip_a_bit(files_of(workdir, step)[0])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged"):
            Checkpoints(workdir)
        with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged"):
            Checkpoints.open(workdir)


def test_a_first_one_that_was_not_finished_is_none(
    states: tuple[TrainState, TrainState], tmp_path: Path
) -> None:
    save(tmp_path, states[0], 1)
    (tmp_path / "checkpoints" / "1" / "manifest.json").unlink()
    assert not has_checkpoint(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "manifest.json cannot be read"), ("[]", "cannot be read"), ('{"files": {}}', "belong")],
)
def test_a_manifest_of_something_else(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    seal(tmp_path)
    assert problem_of(tmp_path) == ""
    (tmp_path / "manifest.json").write_text(content)
    assert problem in problem_of(tmp_path)


# --- A disk that does not take it -----------------------------------------------------------------


def broken_at(folder: Path) -> None:
    """Saving fails as where a file is in the way of the folder."""
    shutil.rmtree(folder)
    folder.write_text("in the way")


def save_and_wait(checkpoints: Checkpoints, state: TrainState) -> None:
    checkpoints.save(state, META)
    checkpoints.wait()


def test_what_could_not_be_written_is_written_later(
    states: tuple[TrainState, TrainState], tmp_path: Path
) -> None:
    state, other = states
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(replace(state, step=state.step + 1), META)
        checkpoints.wait()
        broken_at(tmp_path / "checkpoints")
        later = replace(state, step=state.step + 2)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* \([\d,]+ MiB free\): "):
                save_and_wait(checkpoints, later)
        (tmp_path / "checkpoints").unlink()
        checkpoints.save(replace(state, step=state.step + 2), META)
        checkpoints.wait()
        assert checkpoints.latest_step() == 2
        np.testing.assert_array_equal(
            jax.tree.leaves(checkpoints.restore(2, other).params)[0],
            jax.tree.leaves(state.params)[0],
        )
