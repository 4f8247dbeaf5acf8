"""How state and batches lie on meshes, and what a step of parameters in parts sends."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_config

from clip_lite_jax.apps.plan_step import AbstractStep, abstract_step
from clip_lite_jax.config import (
    CriticConfig,
    EncoderConfig,
    MeshConfig,
    ModelConfig,
    NegativesConfig,
)
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.hlo import exchanges
from clip_lite_jax.parameter_paths import by_path
from clip_lite_jax.sharding import (
    build_mesh,
    parameter_shardings,
    pieces_of_process,
    put_batch,
    shardings_like,
)

DEEP = {"width": 128, "layers": 3, "heads": 4, "scan": True, "remat": "full"}


def step_of(mesh: MeshConfig, **changes: Any) -> AbstractStep:
    """A training step of transformers large enough that their biases do not matter."""
    config = tiny_config(
        "emoji",  # type: ignore[arg-type]
        batch_size=64,
        negatives=NegativesConfig(),
        model=ModelConfig(
            image=EncoderConfig(name="vit_s16", options={**DEEP, "patch": 4}),
            text=EncoderConfig(name="transformer", options=DEEP),
            critic=CriticConfig(options={"width": 64, "hidden": 128}),
        ),
        mesh=mesh,
        **changes,
    )
    return abstract_step(config, build_mesh(jax.devices()[:8], mesh))


@pytest.fixture(scope="module")
def in_parts() -> tuple[AbstractStep, Any]:
    step = step_of(MeshConfig(fsdp=8))
    return step, step.lowered.compile()


def size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_each_device_holds_its_part_of_parameters_and_optimizer_state(
    in_parts: tuple[AbstractStep, Any],
) -> None:
    step, compiled = in_parts
    held = compiled.memory_analysis().argument_size_in_bytes - size(step.batch) / 8
    assert held == pytest.approx(size(step.state) / 8, rel=0.15)


def test_what_a_step_sends(in_parts: tuple[AbstractStep, Any]) -> None:
    """Parameters, at most twice, and their gradients; no activations, and the negatives as ever."""
    step, compiled = in_parts
    parameters = size(step.state.params)
    split = [x for x in jax.tree.leaves(step.state.params) if not x.sharding.is_fully_replicated]
    sent: dict[str, int] = {}
    for exchange in exchanges(compiled.as_text()):
        given = exchange.operand_bytes * exchange.times
        sent[exchange.kind] = sent.get(exchange.kind, 0) + given
    # All that is in parts is gathered, once or, of layers that are computed again, twice.
    assert size(split) / 8 <= sent["all-gather"] <= 2 * size(split) / 8
    # Compilers for accelerators make a reduce-scatter of this; that for CPUs does not.
    assert sent["all-reduce"] == pytest.approx(parameters, rel=0.05)
    # Eight rows of the texts' embeddings, their gradients, and a little of what is known of them.
    embeddings = 8 * 64 * 4
    assert 2 * embeddings <= sent["all-to-all"] <= 2.2 * embeddings
    assert sent.keys() == {"all-gather", "all-reduce", "all-to-all"}


def test_rules_by_path() -> None:
    params = {
        "words": np.zeros((40, 16)),
        "dense": {"kernel": np.zeros((8, 4096)), "bias": np.zeros(4096)},
        "square": np.zeros((64, 64)),
        "odd": np.zeros((4099, 3)),
    }
    config = MeshConfig(fsdp=8, rules={"^words": 0, "kernel$": None})
    found = parameter_shardings(build_mesh(jax.devices()[:8], config), config, params)
    assert {path: tuple(x.spec) for path, x in found.items()} == {
        "words": ("fsdp",),
        "dense/kernel": (),
        "dense/bias": ("fsdp",),
        "square": (None, "fsdp"),
        "odd": (),
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), "8 devices do not divide by 3"),
        (MeshConfig(replica=2, fsdp=8), "8 devices do not divide by 16"),
        (MeshConfig(fsdp=8, rules={"(": 0}), "is not a regular expression"),
        (MeshConfig(fsdp=8, rules={"x": 1}), r"splits x \(16, 9\) along dimension 1"),
        (MeshConfig(fsdp=8, rules={"x": 2}), "along dimension 2"),
    ],
)
def test_meshes_that_cannot_be(config: MeshConfig, message: str) -> None:
    def build() -> None:
        mesh = build_mesh(jax.devices()[:8], config)
        parameter_shardings(mesh, config, {"x": np.zeros((16, 9))})

    with pytest.raises(ConfigError, match=message):
        build()


def test_what_is_kept_for_a_parameter_lies_like_it() -> None:
    config = MeshConfig(fsdp=8, min_size=1)
    mesh = build_mesh(jax.devices()[:8], config)
    params = {"a": {"kernel": np.zeros((8, 2))}, "kernel": np.zeros((8, 2))}
    state = {"mu": params, "by path": {"a/kernel": np.zeros((8, 2))}, "count": np.zeros(())}
    state |= {"factored": {"a": {"kernel": np.zeros(8)}}}  # of another shape: not like it
    specs = {
        path: tuple(x.spec)
        for path, x in by_path(shardings_like(state, params, mesh, config)).items()
    }
    split = ("fsdp",)
    assert specs == {
        "mu/a/kernel": split,
        "mu/kernel": split,
        "by path/a/kernel": split,
        "count": (),
        "factored/a/kernel": (),
    }


def test_fsdp_over_all_devices() -> None:
    assert build_mesh(jax.devices()[:8], MeshConfig(replica=2, fsdp="all")).shape["fsdp"] == 4


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ([0, 0, 1, 1], {0: ([0], 2), 1: ([1], 2)}),
        ([1, 1, 0, 0], {0: ([1], 2), 1: ([0], 2)}),
        # As neighbours in a torus of TPUs follow one another.
        ([0, 1, 1, 0], {0: ([0, 3], 4), 1: ([1, 2], 4)}),
    ],
)
def test_pieces_of_processes(owners: list[int], expected: dict[int, Any]) -> None:
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners], object)
    mesh: Any = SimpleNamespace(devices=devices.reshape(1, -1, 1))
    assert {process: pieces_of_process(mesh, process) for process in expected} == expected


@pytest.mark.parametrize("parts", [False, True])
def test_rows_of_devices_that_are_no_neighbours(
    parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pieces of two as one process would have them: the array is the batch all the same."""
    monkeypatch.setattr("clip_lite_jax.sharding.pieces_of_process", lambda mesh: ([1, 0], 2))
    batch = np.arange(48).reshape((2, 8, 3) if parts else (16, 3))
    axis = int(parts)
    swapped = np.concatenate(np.split(batch, 2, axis)[::-1], axis)
    whole = put_batch(build_mesh(jax.devices()[:4]), swapped, parts)
    np.testing.assert_array_equal(whole, batch)
