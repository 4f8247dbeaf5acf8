"""The costs of objectives: what is read from a compiled program, tables, and what grows how."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax
from jax.sharding import PartitionSpec

from benchmarks import objectives as benchmark
from benchmarks import objectives_report as report
from clip_lite_jax.hlo import matmul_flops, size_in_bytes, traffic
from clip_lite_jax.sharding import build_mesh

QUICK_CASES = {"jsd, shuffle", "infonce, all, gather", "infonce, all, ring"}
RING = [(i, (i + 1) % 4) for i in range(4)]


def program_of(body: Any, *shapes: tuple[int, ...]) -> str:
    """The text of `body`, which runs on each of four devices."""
    mesh = build_mesh(jax.devices()[:4])
    rows = PartitionSpec("data")
    there = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(there).lower(*arguments).compile().as_text()


def test_collectives_of_a_loop_count_as_often_as_it_runs() -> None:
    def body(x: Array) -> Array:
        def step(x: Array, _: None) -> tuple[Array, None]:
            return jnp.sin(lax.ppermute(x, "data", RING)), None

        return lax.scan(step, x, None, length=3)[0]

    found = traffic(program_of(body, (20, 7)))
    assert found.sent["collective-permute"] == 3 * 5 * 7 * 4
    assert found.count["collective-permute"] == 3
    assert sum(found.sent.values()) == found.sent["collective-permute"]


def test_what_leaves_a_device_by_kind() -> None:
    def body(x: Array) -> Array:  # [4, 8] on each of four devices
        everyone = jnp.cos(lax.all_gather(x, "data", axis=0, tiled=True))
        mine = lax.psum_scatter(everyone, "data", scatter_dimension=0, tiled=True)
        dealt = lax.all_to_all(jnp.sin(mine), "data", 0, 0, tiled=True)
        return dealt + lax.psum(jnp.cos(dealt), "data")

    own = 4 * 8 * 4
    assert traffic(program_of(body, (16, 8))).sent == {
        "all-gather": 3 * own,
        "all-to-all": own * 3 / 4,
        "collective-permute": 0,
        "reduce-scatter": 3 * own,
        "all-reduce": 2 * own * 3 / 4,
    }


def test_products_of_a_loop_count_as_often_as_it_runs() -> None:
    def body(x: Array, y: Array) -> Array:
        return lax.scan(lambda x, _: (jnp.tanh(x @ y), None), x, None, length=5)[0]

    assert matmul_flops(program_of(body, (64, 32), (128, 32))) == 5 * 2 * 16 * 32 * 32


def test_a_loop_of_unknown_length_is_refused() -> None:
    def body(x: Array) -> Array:
        return lax.while_loop(
            lambda x: lax.pmax(jnp.max(x), "data") < 9,
            lambda x: lax.ppermute(2 * x, "data", RING),
            x,
        )

    with pytest.raises(ValueError, match="a loop whose length the program does not state"):
        traffic(program_of(body, (4, 4)))


TPU_PROGRAM = """
HloModule made_by_hand

%below (p: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

%body (p.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %start = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%start)
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) tuple(%n.1, %done)
}

%add (left: f32[], right: f32[]) -> f32[] {
  %left = f32[]{:T(128)} parameter(0)
  %right = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%left, %right)
}

%all-reduce-scatter (input: f32[8,16]) -> f32[4,16] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %sum = f32[8,16]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1}}, to_apply=%add
}

%first (a: bf16[8,16]) -> bf16[16,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[16,16]{1,0} all-gather(%a), channel_id=10, replica_groups=[1,2]<=[2], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%second (b: bf16[8,16]) -> bf16[16,16] {
  %b = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %h = bf16[16,16]{1,0} all-gather(%b), channel_id=10, replica_groups=[1,2]<=[2], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (x: bf16[8,16], y: f32[8,16]) -> f32[8,8] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[8,16]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %both = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%both), condition=%below, body=%body
  %fusion = bf16[16,16]{1,0} fusion(%x.1), kind=kCustom, calls=%first
  %fusion.1 = bf16[16,16]{1,0} fusion(%x.1), kind=kCustom, calls=%second
  %fusion.2 = f32[4,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  ROOT %convolution = f32[8,8]{1,0:T(8,128)} convolution(%y, %y), dim_labels=bf_oi->bf
}
"""


def test_programs_for_tpus() -> None:
    """Loops without a stated length, exchanges in several pieces, sums that are scattered."""
    found = traffic(TPU_PROGRAM)
    assert found.count == {
        "all-gather": 1,
        "all-to-all": 0,
        "collective-permute": 6,
        "reduce-scatter": 1,
        "all-reduce": 0,
    }
    assert found.sent["collective-permute"] == 6 * 8 * 16 * 2
    assert found.sent["all-gather"] == 8 * 16 * 2
    assert found.sent["reduce-scatter"] == 8 * 16 * 4 / 2
    assert matmul_flops(TPU_PROGRAM) == 2 * 8 * 8 * 16


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,5]", 60),
        ("pred[7]", 7),
        ("s32[]", 4),
        ("(bf16[2,2], u8[3])", 11),
        ("f8e4m3fn[6]", 6),
    ],
)
def test_bytes_of_a_shape(shape: str, size: int) -> None:
    assert size_in_bytes(shape) == size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (1.234, "1.23"), (45.67, "45.7"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_quick_run(tmp_path: Path) -> None:
    chosen = [case for case in benchmark.CASES if case.label in QUICK_CASES]
    *_, part = benchmark.run(None, chosen, quick=True)
    assert not list(benchmark.run(part, chosen, quick=True))  # nothing is measured twice
    few, many = (
        {r["case"]: r for r in part["records"] if r["devices"] == devices} for devices in (2, 4)
    )
    assert set(few) == set(many) == QUICK_CASES
    own = 64 * benchmark.WIDTH * 4  # bytes of a device's own embeddings, images or texts

    def growth(case: str) -> float:
        return report.sent(many[case]) / report.sent(few[case])

    # Each side's embeddings there and its gradients back, however many devices there are.
    assert report.sent(many["jsd, shuffle"]) < 4.1 * own
    assert growth("infonce, all, gather") == pytest.approx(3, rel=0.01)
    assert growth("infonce, all, ring") > 1.9
    products = 2 * 256 * 64 * benchmark.WIDTH
    assert many["jsd, shuffle"]["matmul_flops"] == 0
    assert many["infonce, all, gather"]["matmul_flops"] == 6 * products
    # Scored, scored again, and two gradients; but a device's own rows, the first of four visits,
    # fit into one chunk here, and the compiler sees that they are scored twice.
    assert many["infonce, all, ring"]["matmul_flops"] == (4 - 1 / 4) * products
    assert all(len(record["cpu_seconds"]) >= 1 for record in part["records"])

    docs = tmp_path / "costs.md"
    report.write({"cpu": part}, docs)
    first = docs.read_text()
    report.write({"cpu": part}, docs)
    assert docs.read_text() == first
    assert part["command"] in first
    assert docs.with_suffix(".png").stat().st_size > 10_000


def test_tables_show_what_was_measured(tmp_path: Path) -> None:
    record = {
        "case": "jsd, roll",
        "devices": 8,
        "batch": 4096,
        "temp_bytes": 2_500_000,
        "sent_bytes": dict.fromkeys(["all-gather", "all-to-all"], 1_000_000)
        | dict.fromkeys(["collective-permute", "reduce-scatter", "all-reduce"], 0),
        "exchanges": dict.fromkeys(["all-gather", "all-to-all"], 3)
        | dict.fromkeys(["collective-permute", "reduce-scatter", "all-reduce"], 0),
        "matmul_flops": 12_000_000_000,
        "cpu_seconds": [0.3, 0.1, 0.2],
    }
    made = dict.fromkeys(["machine", "commit", "jax", "python", "date"], "x")
    part = {"command": "do it", "minutes": 2.0, "provenance": made}
    part["records"] = [record, record | {"batch": 1024, "temp_bytes": 640_000}]
    docs = tmp_path / "costs.md"
    docs.write_text("Before\n<!-- time -->\nold\n<!-- end -->\nafter\n")
    report.write({"cpu": part}, docs)
    text = docs.read_text()
    assert text.startswith("Before\n<!-- time -->\n|  | 8 × CPU, 1024 | 8 × CPU, 4096 |\n")
    assert text.endswith("| jsd, roll | 200 | 200 |\n<!-- end -->\nafter\n")
    found = report.tables({"cpu": part})
    assert "| jsd, roll | 2.00 |" in found["traffic"]
    assert "| jsd, roll | 0.640 | 2.50 |" in found["memory"]
    assert "| jsd, roll | 1.00 (3) | 1.00 (3) |  |  |  | 12.0 |" in found["kinds, cpu"]
