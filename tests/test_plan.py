"""Plans: what is compiled, for which devices, what is read from it, and what does not work."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flops
import jax
import pytest
from conftest import tiny_config

from clip_lite_jax import cli
from clip_lite_jax.apps.plan import Request, environment, plan
from clip_lite_jax.apps.plan_process import build_target, make_plan
from clip_lite_jax.apps.plan_program import Work, estimate, memory_refused
from clip_lite_jax.apps.plan_search import changed, changes, largest_batch
from clip_lite_jax.apps.plan_step import abstract_step, vocabulary
from clip_lite_jax.chips import CHIPS, chip_of
from clip_lite_jax.config import NegativesConfig, ObjectiveConfig, OptimConfig, load_config
from clip_lite_jax.data.pipeline import TrainTransform, train_batches
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.run import build_run
from clip_lite_jax.sharding import build_mesh

LIBTPU = Path(__file__).parent.parent / ".work" / "libtpu" / "libtpu" / "libtpu.so"

needs_libtpu = pytest.mark.skipif(not LIBTPU.is_file(), reason="make test unpacks libtpu")

SMALL = {
    "batch_size": "16",
    "data.image_size": "16",
    "model.image.options": '{"widths": [8, 16], "depths": [1, 1]}',
    "model.text.options.width": "16",
    "model.critic.options": '{"width": 16, "hidden": 16}',
    "negatives.lanes": "2",
}
"""The quickstart, of a size that compiles in a second or two."""


def quickstart(**changes: str) -> Any:
    return load_config("configs/quickstart.py", SMALL | changes)


def flags(overrides: Mapping[str, str]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in overrides.items()]


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacked TPU compiler, at its quickest."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(LIBTPU))
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")


# --- TPUs -----------------------------------------------------------------------------------------


@needs_libtpu
def test_quickstart_on_tpus(libtpu: None) -> None:
    found = plan(load_config("configs/quickstart.py"), Request("v5e:2x4", price=1.2))
    assert (found["devices"], found["device_kind"]) == (8, "TPU v5 lite")
    assert found["fits"] is True
    assert found["memory"] == 16 * 2**30
    memory, work = found["program"]["memory"], found["program"]["work"]
    count = sum(found["parameters"].values())
    # float32; two moments of AdamW, one average.
    assert memory["parameters"] == memory["moving average"] == 4 * count
    assert memory["optimizer state"] == pytest.approx(8 * count, rel=1e-3)
    assert memory["temporaries"] > 0
    # A ring of eight sends 7/8 of the gradient twice; float32, and little else is summed.
    assert work["sent"]["all-reduce"] == pytest.approx(2 * 7 / 8 * 4 * count, rel=1e-3)
    assert work["sent"]["all-to-all"] > 0  # hard negatives are dealt
    assert work["sent"]["all-gather"] == 0
    assert 8 * work["flops"] == pytest.approx(quickstart_flops(128), rel=1e-3)
    # At the least: parameters, moments and average once there and back.
    assert work["bytes_moved"] > 2 * 4 * 4 * count
    assert found["estimate"]["seconds"]["compute"] == pytest.approx(
        work["flops"] / (0.4 * 197e12), rel=1e-6
    )


def quickstart_flops(batch: int) -> int:
    """There is no attention, and pixels have no gradient."""
    convolutions, inputs, side = 0, 3, 48
    for width, stride in ((48, 4), (96, 2), (192, 2)):
        side //= stride
        patches = inputs * width * stride**2 * side**2
        convolutions += (2 if inputs == 3 else 3) * patches
        convolutions += 3 * 2 * width**2 * flops.places(side, 3, 1) ** 2
        inputs = width
    return 2 * batch * (convolutions + 3 * 2 * flops.head(192, 512, 256))


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "--topology v9:2x2: no topology; CHIP:SIDES with CHIP one of v4, v5e"),
        ("v5e", "as in v4:2x2x1, v5e:2x4"),
        ("v5e:3x5", "--topology v5e:3x5: the TPU compiler knows no such one"),
    ],
)
def test_topologies_that_are_none(libtpu: None, topology: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(quickstart(), Request(topology))


def test_what_tpu_compilers_say_of_memory() -> None:
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (17.91G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert memory_refused(said) == (round(17.91 * 2**30), round(15.75 * 2**30))
    assert memory_refused("INTERNAL: 17.91G of 15.75G") is None


def test_without_the_tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'clip-lite-jax\[plan\]'"):
        environment(Request("v5e:2x4"))
    monkeypatch.setenv("TPU_LIBRARY_PATH", "nowhere/libtpu.so")
    with pytest.raises(ConfigError, match="TPU_LIBRARY_PATH=nowhere/libtpu.so: no such file"):
        environment(Request("v5e:2x4"))


# --- CPU devices ----------------------------------------------------------------------------------


def test_fake_devices(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "configs/quickstart.py", "--devices", "2", *flags(SMALL)]
    assert cli.main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 × cpu (not there)" in printed
    assert "not stated: --memory GIB" in printed
    assert "no speed is known of cpu" in printed
    assert re.search(r"all-reduce +[\d.]+ MB  \d+ times\n      gradients of ", printed)
    assert re.search(r"all-to-all +[\d.]+ MB  \d+ times\n      negatives ", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "3"], "batch_size=16 does not divide over 3 devices: use 15 or 18"),
        (["--devices", "0"], "--devices 0: needs at least 1"),
        (["--devices", "1", "--utilization", "40"], "--utilization 40.0: needs"),
        (["--devices", "1", "--price", "-1"], "--price -1.0: needs"),
        (["--devices", "1", "--memory", "0"], "--memory 0.0: needs"),
        (["--devices", "2", "--config.optim.lr=1"], "optim.lr: no such field"),
        ([], "no accelerator is attached: --topology NAME"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "configs/quickstart.py", *flags(SMALL), *arguments]
    assert cli.main(["plan", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def two_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_plan` in this process, of whose eight fake devices it gets two."""
    monkeypatch.setattr(
        "clip_lite_jax.apps.plan_process.build_mesh",
        lambda devices, config: build_mesh(devices[:2], config),
    )


def needed(config: Any) -> float:
    """GiB."""
    return make_plan(config, Request(devices=2)).program.needed / 2**30


def test_a_step_that_does_not_fit_is_changed(two_planned: None) -> None:
    config = quickstart(**{"batch_size": "512", "negatives.name": "shuffle"})
    whole, halved = needed(config), needed(changed(config, {"accumulate": "2"}))
    assert halved < whole
    found = make_plan(config, Request(devices=2, memory_gib=(whole + halved) / 2))
    assert found.fits is False
    assert found.attempts[-1].change == {"accumulate": "2"}
    assert found.attempts[-1].fits
    assert found.planned.needed < found.program.needed


def test_no_change_helps_where_the_state_alone_is_too_large(two_planned: None) -> None:
    found = make_plan(quickstart(), Request(devices=2, memory_gib=1e-4))
    assert found.fits is False
    # To split them is all that is tried.
    assert {attempt.change["mesh.fsdp"] for attempt in found.attempts} == {"all"}
    assert not any(attempt.fits for attempt in found.attempts)
    assert "parameters, optimizer state and batch alone take" in found.notes[0]


def test_the_largest_batch(two_planned: None) -> None:
    # Eight lanes that each send an equal part to each: multiples of 64 rows alone may be.
    config = quickstart(
        **{"batch_size": "128", "negatives.name": "shuffle", "negatives.lanes": "8"}
    )
    limit = needed(config)
    found = make_plan(config, Request(devices=2, memory_gib=limit * 1.0001, fit_batch=True))
    assert found.batches is not None
    assert (found.batches.largest, found.batches.too_large) == (128, 192)
    assert list(found.batches.tried) == [128, 192, 256]
    assert found.batches.tried[128] == pytest.approx(limit * 2**30)


def test_attached_accelerators_get_the_largest_batch_and_a_time(
    two_planned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was none: two CPU devices that say they are L4s."""
    config = quickstart(
        **{"batch_size": "128", "negatives.name": "shuffle", "negatives.lanes": "8"}
    )
    devices = jax.devices()
    mesh, limit = build_mesh(devices[:2]), round(needed(config) * 2**30)
    accelerator = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA L4", memory_stats=lambda: {"bytes_limit": limit}
    )
    with monkeypatch.context() as patch:
        patch.setattr("jax.devices", lambda: [accelerator] * 2)
        target = build_target(Request())
    assert (target.chip, target.memory) == (CHIPS["L4"], limit)
    monkeypatch.setattr("clip_lite_jax.apps.plan_process.build_mesh", lambda devices, config: mesh)
    monkeypatch.setattr("clip_lite_jax.apps.plan_process.build_target", lambda request: target)
    found = make_plan(config, Request())
    assert found.batches is not None
    assert found.batches.largest == 128
    assert found.estimate is not None
    assert found.estimate.steps_per_second > 0


@pytest.mark.parametrize(("limit", "largest"), [(1000, 960), (100, 96), (7, 0), (8, 8)])
def test_the_search_ends_within_an_eighth(limit: int, largest: int) -> None:
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found, too_large = largest_batch(fits, lambda batch: True, 128, 8)
    assert found == largest
    assert too_large is not None
    assert found <= limit < too_large
    assert len(tried) <= 10


def test_the_search_keeps_to_batches_that_may_be() -> None:
    def fits(batch: int) -> bool:
        assert batch & (batch - 1) == 0
        return batch <= 1000

    assert largest_batch(fits, lambda n: n & (n - 1) == 0, 128, 8) == (512, 1024)
    assert largest_batch(lambda batch: True, lambda batch: True, 1, 1) == (1024, None)


def test_changes_come_in_order_of_their_price() -> None:
    config = load_config("configs/my_pairs.py")
    found = list(changes(config, 2.5, ("text",)))
    assert found == [
        {"accumulate": "4"},
        {"accumulate": "8"},
        {"model.dtype": "bfloat16"},
        {"model.text.options.remat": "full"},
        {"model.dtype": "bfloat16", "model.text.options.remat": "full"},
        {"batch_size": "16"},
        {"batch_size": "8"},
    ]


# --- What is planned ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "negatives": NegativesConfig(lanes=2)},
        {
            "objective": ObjectiveConfig(visual_weight=0.5),
            "optim": OptimConfig(warmup_steps=1, ema_decay=0.9),
        },
        {"negatives": NegativesConfig(name="queue", memory=16, lanes=2)},
    ],
    ids=["plain", "parts", "two views", "queue"],
)
def test_what_is_planned_is_what_training_takes(
    changes: dict[str, Any], pairs: Path, tmp_path: Path, two_devices: None
) -> None:
    """State and batch have the shapes and types of those of a run."""
    config = tiny_config(pairs, **changes)
    run = build_run(config, tmp_path)
    stored = replace(config.data, tokenizer=str(tmp_path / "tokenizer.model"))
    step = abstract_step(replace(config, data=stored), run.mesh)
    state, _ = run.init_state({})
    assert shapes(step.state) == shapes(state)
    inputs = run.inputs(state.params, state.model_state)
    twice = config.objective.visual_weight > 0
    transform = TrainTransform(run.sources["train"], inputs, config.data, run.bad, twice)
    batches = train_batches(transform, config.batch_size, 0, 0, parts=config.accumulate)
    assert shapes(step.batch) == shapes(next(batches))


def shapes(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_vocabularies(tmp_path: Path) -> None:
    paper = load_config("configs/paper.py")
    assert vocabulary(paper)[0] == 30_527
    assert vocabulary(quickstart())[0] == 2000
    other = changed(paper, {"model.text.name": "transformer", "model.text.options": "{}"})
    assert vocabulary(other) == (
        2000,
        "assumed, data.vocab_size: paraphrase-mpnet-base-v2 is not there",
    )
    words = tmp_path / "words.txt"
    words.write_text("a 1 2\nb 3 4\n")
    assert vocabulary(changed(paper, {"data.tokenizer": str(words)}))[0] == 2


def test_frozen_towers_and_weights_of_others() -> None:
    """A frozen tower has no optimizer state, and weights to start from are not looked for."""
    overrides = {
        "optim.frozen": '{"^image_encoder/": [0, null]}',
        "model.text.init_from": "hf://nobody/nothing",
    }
    config = changed(quickstart(), overrides)
    step = abstract_step(config, build_mesh(jax.devices()[:2]))
    trained = sum(
        leaf.size
        for name, tree in step.state.params.items()
        for leaf in jax.tree.leaves(tree)
        if name != "image_encoder"
    )
    state = sum(leaf.size for leaf in jax.tree.leaves(step.state.opt_state))
    assert state == pytest.approx(2 * trained, abs=10)


def test_a_roofline() -> None:
    chip = CHIPS["v5e"]
    work = Work(197 * 10**9, 819 * 10**6, {"all-reduce": 200 * 10**6}, {"all-reduce": 1}, [])
    config = load_config("configs/paper.py")  # bfloat16, 1,024 pairs, 250,000 steps
    found = estimate(work, chip, config, 8, 0.5, price=1.5)
    assert found.seconds == pytest.approx({"compute": 2e-3, "memory": 1e-3, "network": 1e-3})
    assert found.bound == "compute"
    assert found.steps_per_second == pytest.approx(500)
    assert found.images_per_second == pytest.approx(512_000)
    assert found.hours == pytest.approx(500 / 3600)
    assert found.cost == pytest.approx(8 * 1.5 * 500 / 3600)
    slow = Work(1, 819 * 10**6, {}, {}, [])
    assert estimate(slow, chip, config, 8, 0.5).bound == "memory"


def test_chips_by_what_devices_call_themselves() -> None:
    assert chip_of("TPU v5 lite") == CHIPS["v5e"]
    assert chip_of("TPU v5") == CHIPS["v5p"]
    assert chip_of("NVIDIA H100 80GB HBM3") == CHIPS["H100"]
    assert chip_of("NVIDIA H200") == CHIPS["H200"]
    assert chip_of("NVIDIA A100-SXM4-40GB") == CHIPS["A100"]
    assert chip_of("cpu") is None
