"""A run that stops and goes on is the run that did not: examples, parameters, curve."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_config, tiny_model

from clip_lite_jax import train as training
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    MeshConfig,
    NegativesConfig,
    OptimConfig,
)
from clip_lite_jax.errors import Interrupted
from clip_lite_jax.inference import load
from clip_lite_jax.metrics import FROM_THE_MACHINE, read_metrics
from clip_lite_jax.run import build_run, restore_or_init
from clip_lite_jax.sharding import build_mesh

STEPS = 6
ADAMW = OptimConfig(learning_rate=1e-3, warmup_steps=1, ema_decay=0.9, lookahead_steps=2)
FSDP = MeshConfig(fsdp=2, min_size=16)


def run(
    config: Config,
    workdir: Path,
    stops: Sequence[int] = (),
    devices: Sequence[int] = (2,),
    meshes: Sequence[MeshConfig] = (MeshConfig(),),
) -> dict[int, list[int]]:
    """Trains in parts that end by SIGTERM after so many steps; returns the examples by step.

    Part by part on other devices and meshes, the last one for the rest.
    """
    seen: dict[int, list[int]] = {}
    for part, stop in enumerate((*stops, config.steps)):
        spread = replace(config, mesh=meshes[min(part, len(meshes) - 1)])
        step, real = (0, *stops)[part], training.put_batch

        def put_batch(mesh: Any, batch: Any, *rest: Any, real: Any = real, stop: int = stop) -> Any:
            nonlocal step
            seen[step] = batch.index.ravel().tolist()
            step += 1
            if step == stop < STEPS:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(mesh, batch, *rest)

        with pytest.MonkeyPatch.context() as patch:
            used = jax.devices()[: devices[min(part, len(devices) - 1)]]
            patch.setattr(
                "clip_lite_jax.run.build_mesh", lambda config, used=used: build_mesh(used, config)
            )
            patch.setattr(training, "put_batch", put_batch)
            if stop < config.steps:
                with pytest.raises(Interrupted, match=f"ended at step {stop} of {config.steps}"):
                    training.train(spread, workdir)
            else:
                training.train(spread, workdir)
    return seen


def logged(workdir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in FROM_THE_MACHINE}
        for line in read_metrics(workdir)
    ]


def final_state(config: Config, workdir: Path) -> list[np.ndarray]:
    with Checkpoints.open(workdir) as checkpoints:
        assert checkpoints.latest_step() == STEPS
        state, _ = restore_or_init(build_run(config, workdir), checkpoints)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def config_of(pairs: Path, **changes: Any) -> Config:
    config = tiny_config(
        pairs,
        steps=STEPS,
        optim=ADAMW,
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=3, batch_size=16),
        **changes,
    )
    return replace(config, data=replace(config.data, augment=AugmentConfig(hue=0.1)))


QUEUE = NegativesConfig(name="queue", sides="both", block=4, lanes=2, memory=4)


@pytest.mark.parametrize("case", ["fsdp", "workers"])
def test_stopped_and_gone_on_it_is_bit_equal(case: str, pairs: Path, tmp_path: Path) -> None:
    """EMA, Lookahead and changes of colour in both; `test_chaos` has these with a queue."""
    config = config_of(pairs, negatives=NegativesConfig(name="hard", block=4, lanes=2))
    if case == "workers":
        config = replace(config, data=replace(config.data, workers=1))
    meshes = (FSDP,) if case == "fsdp" else (MeshConfig(),)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seen = run(config, whole, meshes=meshes)
    assert run(config, parts, stops=(2,), meshes=meshes) == seen
    assert sorted(seen) == list(range(STEPS))
    assert logged(parts) == logged(whole)
    for a, b in zip(final_state(config, parts), final_state(config, whole), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_gone_on_on_other_devices_it_is_the_same_up_to_rounding(
    pairs: Path, tmp_path: Path
) -> None:
    """Two devices that share the parameters, then one, then four: in float64 with AdamW to 1e-9."""
    with jax.enable_x64(True):
        config = config_of(pairs, model=tiny_model("float64", temperature=0.5), negatives=QUEUE)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        seen = run(config, whole)
        found = run(
            config,
            parts,
            stops=(2, 4),
            devices=(2, 1, 4),
            meshes=(FSDP, MeshConfig(), replace(FSDP, fsdp=4)),
        )
        assert found == seen
        for one, other in zip(logged(parts), logged(whole), strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert value == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
        a, b = (jax.tree.leaves(jax.device_get(load(folder).params)) for folder in (parts, whole))
        assert all(leaf.dtype == np.float64 for leaf in a)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)
        for x, y in zip(final_state(config, parts), final_state(config, whole), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


def test_a_run_that_stops_twice_at_one_step_evaluates_it_once(pairs: Path, tmp_path: Path) -> None:
    """Asked to end at a step that is to be evaluated, it leaves that to the next start; which
    evaluates, and is killed before it saves."""
    config = config_of(pairs)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config, whole)
    stopped = replace(config, steps=STEPS)
    with pytest.raises(KeyboardInterrupt):
        _killed_after_evaluation(stopped, parts)
    run(config, parts, stops=())
    assert logged(parts) == logged(whole)


def _killed_after_evaluation(config: Config, workdir: Path) -> None:
    run_to_three = pytest.MonkeyPatch()
    real, taken = training.put_batch, 0

    def put_batch(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if taken == 4:  # after the evaluation of step 3, in the process that went on
            raise KeyboardInterrupt
        return real(*given)

    with run_to_three.context() as patch:
        two = jax.devices()[:2]
        patch.setattr("clip_lite_jax.run.build_mesh", lambda config: build_mesh(two, config))
        patch.setattr(training, "put_batch", put_batch)
        with pytest.raises(Interrupted, match="ended at step 3"):
            training.train(config, workdir)
        assert not [line for line in logged(workdir) if line["step"] == 3 and "loss" not in line]
        training.train(config, workdir)
