"""What a run begins with: a checkpoint of its own, another run's, a model's weights, or nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_config, write_pairs
from test_train import assert_same_state, final_state

from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import CheckpointConfig, Config, CriticConfig
from clip_lite_jax.config.run import validate
from clip_lite_jax.data.tokenizer import train_tokenizer
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.inference import load
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.run import Run, build_run, restore_or_init
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train import train
from clip_lite_jax.train_state import TrainState

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def eight(pairs: Path) -> Config:
    config = tiny_config(pairs, steps=8)
    return replace(config, checkpoint=CheckpointConfig(every=2, keep=9))


@pytest.fixture(scope="module")
def whole(eight: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        two = jax.devices()[:2]
        patch.setattr("clip_lite_jax.run.build_mesh", lambda config: build_mesh(two, config))
        train(eight, workdir)
    return workdir


def up_to(step: int, workdir: Path, folder: Path) -> Path:
    """A copy of a run as it was at `step`."""
    shutil.copytree(workdir, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return folder


def begun(config: Config, workdir: Path) -> tuple[Run, TrainState]:
    """A run and the state that it would begin with."""
    run = build_run(config, workdir)
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        return run, jax.device_get(restore_or_init(run, checkpoints)[0])


def test_another_runs_state_and_step(
    eight: Config, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, workdir = up_to(4, whole, tmp_path / "other"), tmp_path / "run"
    config = replace(eight, resume_from=str(other))
    caplog.set_level("INFO")
    train(config, workdir)
    assert f"restored checkpoint 4 of {other}, to go on from" in caplog.messages
    assert_same_state(final_state(eight, whole), final_state(config, workdir))
    losses = {line["step"]: line["loss"] for line in read_metrics(whole) if "loss" in line}
    here = {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}
    assert here == {step: loss for step, loss in losses.items() if step > 4}
    assert {p.name for p in (other / "checkpoints").iterdir()} == {"2", "4"}  # nothing is written


def test_the_order_of_beginnings(eight: Config, whole: Path, tmp_path: Path) -> None:
    other, own = up_to(4, whole, tmp_path / "other"), up_to(2, whole, tmp_path / "own")
    resume, init = replace(eight, resume_from=str(other)), replace(eight, init_from=str(other))
    assert begun(resume, own)[1].step == 2
    assert begun(init, own)[1].step == 2
    assert begun(replace(eight, resume_from=str(tmp_path / "gone")), own)[1].step == 2
    assert begun(resume, tmp_path / "a")[1].step == 4
    assert begun(init, tmp_path / "b")[1].step == 0
    assert begun(eight, tmp_path / "c")[1].step == 0
    with pytest.raises(ConfigError, match=r"resume_from='a' and init_from='b': one of them"):
        validate(replace(eight, resume_from="a", init_from="b"))


def test_the_weights_of_another_run_alone(eight: Config, whole: Path, tmp_path: Path) -> None:
    config = replace(eight, seed=5, init_from=str(whole))
    _, state = begun(config, tmp_path / "run")
    fresh = begun(replace(config, init_from=None), tmp_path / "fresh")[1]
    theirs = jax.tree.leaves(load(whole).params)
    for ours, same in zip(jax.tree.leaves(state.params), theirs, strict=True):
        np.testing.assert_array_equal(ours, same)
    assert_same_state(replace(state, params=None), replace(fresh, params=None))


def test_words_keep_their_tokens_on_other_data(whole: Path, tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "more")
    table.write_text(table.read_text() + "red_ring.png,zebras quarrel about xylophones\n" * 30)
    for name in ("init_from", "resume_from"):
        config = tiny_config(table, steps=9, **{name: str(whole)})
        run, _ = begun(config, tmp_path / name)
        assert run.tokenizer.model == (whole / "tokenizer.model").read_bytes()
    run, _ = begun(tiny_config(table, steps=9), tmp_path / "fresh")
    assert run.tokenizer.model != (whole / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("name", ["init_from", "resume_from"])
def test_what_cannot_be_begun_with(name: str, eight: Config, whole: Path, tmp_path: Path) -> None:
    def refused(config: Config, message: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            begun(config, tmp_path / "run")

    config = replace(eight, steps=9, **{name: str(whole)})
    missing = tmp_path / "nowhere"
    refused(replace(config, **{name: str(missing)}), f"{missing} holds no checkpoints")
    wider = replace(config.model, critic=CriticConfig(options={"width": 24, "hidden": 16}))
    refused(
        replace(config, model=wider),
        r"does not fit.*critic.* is \(\d*,? ?16,?\) there and \(\d*,? ?24,?\) in this model",
    )
    tokenizer = tmp_path / "another.model"
    tokenizer.write_bytes(train_tokenizer(["some other words altogether"] * 9, 40))
    refused(
        replace(config, data=replace(config.data, tokenizer=str(tokenizer))),
        rf"data.tokenizer='{tokenizer}' is not the tokenizer of {whole}",
        ConfigError,
    )
    if name == "resume_from":
        refused(replace(config, steps=8), "is at step 8 already: give more", ConfigError)


def test_a_damaged_checkpoint_of_another_run_is_not_used(
    eight: Config, whole: Path, tmp_path: Path
) -> None:
    other = up_to(4, whole, tmp_path / "other")
    (other / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    config = replace(eight, resume_from=str(other))
    assert begun(config, tmp_path / "run")[1].step == 2
    (other / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged"):
        begun(config, tmp_path / "another")
    assert (other / "checkpoints" / "4").is_dir()  # it is not ours to move
