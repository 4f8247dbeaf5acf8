"""What a run says of itself beside the loss: alarms, what a step costs, spread, profiles."""

import gzip
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from test_train_step import build

from clip_lite_jax.alarms import PATIENCE, Alarms, problems
from clip_lite_jax.chips import peak_flops
from clip_lite_jax.config import Config, LogConfig, validate
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.flops import flops
from clip_lite_jax.learner import _direction, _spreads
from clip_lite_jax.metrics import FROM_THE_MACHINE, Progress, device_memory, read_metrics
from clip_lite_jax.profiling import Profile
from clip_lite_jax.train import train
from clip_lite_jax.train_step import compiled

GOOD = {"image_spread": 0.5, "text_spread": 0.4, "bound_loss": 0.7, "temperature": 0.1}


@pytest.mark.parametrize(
    ("changed", "name", "message"),
    [
        ({"image_spread": 0.001}, "image collapse", "all images have nearly the same embedding"),
        ({"text_spread": 0.0}, "text collapse", "all texts have nearly the same embedding"),
        ({"bound_loss": 1e-4}, "saturation", "tells all pairs from their negatives"),
        ({"temperature": 0.01}, "temperature", "at its lower limit 0.01"),
        ({"temperature": 0.99999}, "temperature", "at its upper limit 1"),
    ],
)
def test_alarms_are_told_once_every_time_they_come(
    changed: dict[str, float], name: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = GOOD | changed
    assert set(problems(bad, "jsd", (0.01, 1.0))) == {name}
    alarms = Alarms("jsd", (0.01, 1.0))
    for step, values in enumerate([bad] * (PATIENCE - 1) + [GOOD] + [bad] * 3 * PATIENCE):
        alarms.look(step, values)
    assert [message in record.getMessage() for record in caplog.records] == [True]
    assert f"step {2 * PATIENCE - 1}, and" in caplog.text


def test_nothing_is_wrong() -> None:
    assert problems(GOOD, "jsd", (0.01, 1.0)) == {}
    # Only of the Jensen-Shannon bound is a small loss the end of learning.
    assert problems(GOOD | {"bound_loss": 0.0}, "infonce", None) == {}
    assert problems({"loss": 1.0}, "jsd", None) == {}


def spread(embeddings: Any, valid: Any) -> Any:
    direction = _direction(embeddings, valid, jnp.sum(valid))
    return _spreads({"image_direction": direction, "text_direction": direction})["text_spread"]


def test_spread() -> None:
    valid = jnp.arange(8) < 6
    same = jnp.tile(jnp.array([[3.0, 4.0]]), (8, 1)).at[6:].set(-1)
    assert spread(same, valid) == pytest.approx(0, abs=1e-6)
    ways = jnp.array([[1.0, 0], [-2, 0], [0, 1], [0, -3], [1, 1], [-1, -1], [9, 9], [9, 9]])
    assert spread(ways, valid) == pytest.approx(1)
    assert spread(same, valid & False) == pytest.approx(1)


def test_a_compiled_step_is_the_step_and_knows_its_cost() -> None:
    step, state, _, batch = build(2)
    mesh: Any = state.step.sharding
    found = compiled(step, state, batch, mesh.mesh)
    alone, *given = build(1)
    assert found.flops == flops(alone.trace(given[0], given[2])) / 2  # type: ignore[attr-defined]
    assert found.temporaries > 0
    _, one = found.step(jax.tree.map(jnp.copy, state), batch)
    _, two = step(state, batch)
    assert one == two
    parts = {name.partition("/")[2] for name in one if name.startswith("gradient_norm/")}
    assert parts == {"image_encoder", "text_encoder", "critic"}
    squares = sum(one[f"gradient_norm/{part}"] ** 2 for part in parts)
    assert float(one["gradient_norm"]) == pytest.approx(float(squares) ** 0.5, rel=1e-5)


def test_products_are_counted_as_often_as_they_run() -> None:
    def function(x: Any, kernel: Any) -> Any:
        x, _ = jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)
        x = jax.jit(lambda y: y @ y)(x)
        x = jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x)
        image = x.reshape(1, 4, 4, 1)
        image = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return image, jax.checkpoint(lambda y: y @ y)(x)

    traced = jax.jit(function).trace(jnp.ones((4, 4)), jnp.ones((3, 3, 1, 2)))
    assert flops(traced) == 8 * 2 * 4**3 + 2 * 16 * 9 * 2


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("clip_lite_jax.metrics.time.perf_counter", lambda: now)
    progress = Progress(0, 10, 32, active=False)
    progress.costs(1e12, peak_flops("NVIDIA H100 80GB HBM3", "bfloat16"))
    progress.advance()
    assert progress.rates(1.0) == {}
    now = 0.5
    progress.waited(0.1)
    progress.advance()
    rates = progress.rates(1.0)
    assert rates == {
        "images_per_second": 64,
        "step_seconds": 0.5,
        "data_wait": 0.2,
        "flops_per_second": 2e12,
        "mfu": pytest.approx(2 / 989),
    }
    assert rates.keys() <= set(FROM_THE_MACHINE)
    assert peak_flops("cpu", "float32") is None
    assert peak_flops("TPU v5 lite", "float32") == 197e12


def test_memory_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, used: int) -> None:
            self.used = used

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": self.used * 2**30, "peak_bytes_in_use": self.used * 2**31}

    assert device_memory() == {}
    monkeypatch.setattr("jax.local_devices", lambda: [Device(1), Device(3)])
    assert device_memory() == {"device_memory_gib": 3, "device_memory_peak_gib": 6}


def test_steps_are_traced(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(pairs, log=LogConfig(tensorboard=False, profile=(1, 3)))
    with caplog.at_level(logging.INFO):
        train(config, tmp_path)
    (trace,) = tmp_path.glob("profile/**/*.trace.json.gz")
    assert b"train" in gzip.decompress(trace.read_bytes())
    assert "profile: " in caplog.text
    assert "compiled in" in caplog.text
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert {"image_spread", "text_spread", "parameter_norm/critic"} <= lines[-1].keys()


def test_a_trace_ends_with_the_run(tmp_path: Path) -> None:
    with Profile(tmp_path, (0, 100)) as profile:
        profile.at(0)
        np.asarray(jnp.ones(3) + 1)
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))
    config: Config = replace(tiny_config(tmp_path), log=LogConfig(profile=(3, 3)))
    with pytest.raises(ConfigError, match=r"log.profile=\(3, 3\): the first step is below"):
        validate(config)
