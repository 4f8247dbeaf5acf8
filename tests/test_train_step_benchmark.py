"""The bench of whole training steps: its turns, what it counts, its tables; no PyTorch needed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flops import head, resnet50, transformer

from benchmarks import device_trace, gpu_parts, train_step
from benchmarks.train_step import OURS, compare, measure, summary, theirs
from benchmarks.train_step_cases import CPU, QUICK, Failed, captions, on_gpu
from benchmarks.train_step_jax import build, facts, forward_flops, model_of, sizes
from benchmarks.train_step_loop import KINDS, overhead
from benchmarks.train_step_tables import tables

WHERE = {
    "commit": "c",
    "machine": "m",
    "devices": "1 x NVIDIA H100",
    "python": "3",
    "jax": "1",
    "date": "today",
}


class Fake:
    """A worker of a known speed."""

    def __init__(self, seconds: dict[str, float], failed: str = "") -> None:
        self.of, self.failed, self.asked = seconds, failed, []  # type: ignore[var-annotated]

    def build(self, name: str, **options: Any) -> list[float]:
        return [float("nan") if name == self.failed else 1.0] * 3

    def seconds(self, steps: int, name: str, clock: str = "wall") -> list[float]:
        self.asked.append(name)
        return [self.of[name] if steps > 1 else 99.0] * steps

    def ask(self, question: str, name: str) -> Any:
        if question != "facts":
            return (
                {"total": 3.0, "layers": {"pooling: other": 3.0}} if question == "trace" else None
            )
        sizes = {"image": 1000, "text": 2000, "head": 3}
        known = {"parameters": sizes, "flops": 4e9, "bytes": 2**30, "compile_seconds": 5.0}
        known["device"] = "NVIDIA H100"
        return {"failed": "no room"} if name == self.failed else known

    def close(self) -> None:
        self.asked.append("closed")


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "PAUSE", 0)


def test_the_loop_and_its_step_take_turns(pairs: Path, two_devices: None) -> None:
    config = replace(tiny_config(pairs), steps=5)
    found = overhead(config, turns=2, settle=1, steps=3)
    assert found["turns"] == 2
    assert found["steps"] == 3
    assert {kind: len(found["seconds"][kind]) for kind in KINDS} == dict.fromkeys(KINDS, 2)
    assert all(second > 0 for seconds in found["seconds"].values() for second in seconds)
    assert all(len(found["work"][kind]) == 2 for kind in KINDS)
    assert all(0 <= w < s for w, s in zip(found["waited"], found["seconds"]["whole"], strict=True))
    (text,) = tables({"loop": found | {"provenance": WHERE}}).values()
    assert "| the loop with its input pipeline |" in text
    assert "2 turns of 3 steps" in text


def test_ways_to_train_take_turns_and_the_fastest_of_open_clip_counts() -> None:
    ours = Fake({"ours, JSD": 2.0, "ours, InfoNCE": 4.0})
    peer = Fake({"open_clip": 3.0, "open_clip, channels_last": 1.0}, failed="open_clip, compiled")
    case = replace(on_gpu(8), steps=2)
    start: dict[str, Any] = {"ours": lambda: ours, "open_clip": lambda: peer}
    ways = OURS | theirs(gpu=False, compiled=True)
    found = measure(case, start, ways, rounds=2)
    assert ours.asked == [*("ours, JSD",) * 2, *("ours, InfoNCE",) * 2] * 2 + ["closed"]
    assert found["ours, JSD"]["seconds"] == [1.0, 1.0]  # of a step, and two were timed in a piece
    assert found["open_clip, compiled"]["facts"] == {"failed": "no room"}
    result = summary(case, found)
    assert result["fastest"] == "open_clip, channels_last"
    assert result["ratios"] == {"ours, JSD": [0.5] * 3, "ours, InfoNCE": [0.25] * 3}
    assert result["rates"]["ours, JSD"] == 8
    record = {"label": case.label, "case": case.options, "rounds": 2, "ways": found} | result
    record |= {"clock": "wall", "cores": None}
    part = {"records": [record], "provenance": WHERE | {"driver": "580"}}
    made = tables({"steps gpu": part})
    row = "| ours, JSD | 1000.0 | 8 | 0.50 (0.50 to 0.50) | 0.0% | 1.0 | 5 |"
    assert row in made["steps gpu"]
    assert "| open_clip, compiled | failed |" in made["steps gpu"]
    assert "image 1,000 and text 2,000 here" in made["steps gpu"]
    assert "| pooling: other | 3.00 | 100% |" in made["kernels gpu"]


def test_projects_that_do_not_fit_together_run_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def fake(case: Any, start: Any, ways: Any, *_: Any) -> Any:
        seen.append((list(start), list(ways)))
        return {name: {"seconds": [1.0]} for name in ways}

    monkeypatch.setattr(train_step, "measure", fake)
    given = train_step.arguments(["--gpu", "--no-compile"])
    compare(on_gpu(512, together=False), given, gpu=True)
    compare(on_gpu(256), given, gpu=True)
    ours, peer = list(OURS), ["open_clip, channels_last"]
    assert seen == [(["ours"], ours), (["open_clip"], peer), (["ours", "open_clip"], ours + peer)]


def test_towers_have_the_size_of_open_clips() -> None:
    """Its numbers by ``train_step_torch.sizes``."""
    expected = [(5493888, 3358848), (11176512, 3358848), (23508032, 63165952)]
    for case, (image, text) in zip((*CPU, on_gpu(2)), expected, strict=True):
        params, _ = jax.eval_shape(model_of(case).init, jax.random.key(0))
        found = sizes(params)
        assert (found["image"], found["text"]) == (image, text)


def test_operations_are_those_counted_by_hand() -> None:
    case = on_gpu(2)
    by_hand = sum(resnet50(224).values()) + head(2048, 512, 512)
    by_hand += sum(transformer(12, 512, 77).values()) + head(512, 512, 512)
    # The bench counts products with the zeros around an image, as is usual.
    assert by_hand < forward_flops(case) / 2 / case.batch < 1.03 * by_hand


def test_captions_end_with_the_highest_token() -> None:
    case = QUICK[0]
    tokens = captions(case, 1)
    assert tokens.shape == (case.batch, case.tokens)
    assert (tokens[:, 0] == case.vocabulary - 2).all()
    last = tokens.argmax(axis=1)
    assert (tokens[np.arange(case.batch), last] == case.vocabulary - 1).all()
    assert ((tokens != 0).sum(axis=1) == last + 1).all()


def test_a_step_of_ours_trains_and_one_that_cannot_says_why() -> None:
    case = replace(QUICK[0], batch=8)
    training = build("jsd", **case.options)
    assert training() != training()
    known = facts(training)
    count = sum(known["parameters"].values())
    assert known["bytes"] > 4 * 3 * count  # weights and two moments in float32
    failed = build("jsd", **replace(case, image="unknown").options)
    assert isinstance(failed, Failed)
    assert np.isnan(failed())
    assert "unknown" in facts(failed)["failed"]


PROGRAM = """HloModule jit_step

%fused_reduce (p: f32[8,4]) -> f32[4] {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce.1 = f32[4]{0} reduce(%p, %zero), dimensions={0}, to_apply=%add
}

%fused_plain (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %multiply.1 = f32[4]{0} multiply(%p, %p)
}

ENTRY %main (a: f32[8,4]) -> f32[4] {
  %a = f32[8,4]{1,0} parameter(0)
  %input_reduce_fusion.2 = f32[4] fusion(%a), calls=%fused_reduce, metadata={op_name="bn1/sum"}
  %loop_multiply_fusion = f32[4]{0} fusion(%input_reduce_fusion.2), calls=%fused_plain
  %copy.3 = f32[4]{0} copy(%loop_multiply_fusion)
  ROOT %gemm.4 = f32[4]{0} custom-call(%copy.3), LIBRARY, metadata={op_name="fc1/dot_general"}
}
""".replace("LIBRARY", 'custom_call_target="__cublas$lt$matmul"')


def test_kernels_are_sorted_by_what_they_compute() -> None:
    kernels = [
        ("input_reduce_fusion_2", 4.0),
        ("loop_multiply_fusion", 1.0),
        ("copy.3", 2.0),
        ("gemm.4", 6.0),
        ("sm90_xmma_dgrad_implicit_gemm", 8.0),
        ("MemcpyD2D", 2.0),
        ("unheard_of", 1.0),
    ]
    found = device_trace.sums(kernels, PROGRAM, steps=2)
    assert found["kinds"] == {
        "convolutions": 4.0,
        "matrix products": 3.0,
        "reductions": 2.0,
        "elementwise": 0.5,
        "data movement": 2.0,
        "other": 0.5,
    }
    assert found["total"] == 12
    assert found["layers"]["batch normalisation: reductions"] == 2
    assert found["layers"]["dense layers: matrix products"] == 3
    assert next(iter(found["kernels"])).startswith("sm90_xmma_dgrad")


def test_versions_of_a_part_compute_the_same() -> None:
    for part in gpu_parts.parts(2, 8):
        found = [jax.jit(function)(*part.inputs) for function in part.versions.values()]
        for pair in zip(*map(jax.tree.leaves, found), strict=True):
            one, other = (jnp.asarray(x, jnp.float32) for x in pair)
            assert jnp.linalg.norm(one - other) < 0.03 * jnp.linalg.norm(one), part.name
