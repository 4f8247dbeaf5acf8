"""What grows with the devices and what does not: bytes of programs, by formula."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import scaling as benchmark
from benchmarks import scaling_report as report
from clip_lite_jax.sharding import build_mesh

METHODS = {method.label: method for method in benchmark.METHODS}
PAIR = replace(METHODS["jsd, shuffle, 8 devices"], label="jsd, shuffle, 2 devices", devices=2)
"""A block of negatives on two devices, so that four and eight have several."""

needs_libtpu = pytest.mark.skipif(not benchmark.LIBTPU.is_file(), reason="make test unpacks libtpu")

ROWS, WIDTH = benchmark.QUICK.rows["loss"], benchmark.QUICK.width
OWN = 4 * ROWS * WIDTH
"""Bytes of a device's own embeddings, images or texts."""


@cache
def record(method: benchmark.Method, devices: int) -> dict[str, Any]:
    mesh = build_mesh(jax.devices()[:devices])
    return benchmark.measure(benchmark.QUICK, "loss", method, mesh)


def sent(method: benchmark.Method, devices: int) -> dict[str, int]:
    """By kind, without the sums of the loss and its gradient by the critic: some bytes."""
    kinds = dict(record(method, devices)["sent_bytes"])
    assert 0 < kinds.pop("all-reduce") < 100
    return {kind: size for kind, size in kinds.items() if size}


# --- One negative for each pair: flat -------------------------------------------------------------


def test_with_negatives_of_its_own_rows_a_device_sends_nothing() -> None:
    assert sent(METHODS["jsd, shuffle, own rows"], 4) == {}
    assert sent(METHODS["jsd, shuffle, own rows"], 8) == {}


def test_roll_sends_one_row_of_each_side_and_its_gradient() -> None:
    row = 4 * WIDTH
    labels = 4 * 4  # group, validity and index, once
    for devices in (2, 4, 8):
        assert sent(METHODS["jsd, roll"], devices) == {"collective-permute": 4 * row + labels}


def test_what_shuffle_sends_depends_on_who_shares_a_block() -> None:
    labels = 2 * 4 * 4 * ROWS
    two, four, eight = (sent(PAIR, devices) for devices in (2, 4, 8))
    assert two == four == eight == {"all-to-all": (4 * OWN + labels) // 2}
    for devices in (2, 4, 8):  # what stays at home is not sent: of two devices a half
        whole = sent(METHODS["jsd, shuffle, all devices"], devices)
        assert whole == {"all-to-all": (4 * OWN + labels) * (devices - 1) // devices}


@pytest.mark.parametrize(
    "method", [METHODS["jsd, shuffle, own rows"], METHODS["jsd, roll"], PAIR], ids=lambda m: m.label
)
def test_the_memory_of_one_negative_is_flat(method: benchmark.Method) -> None:
    two, four, eight = (record(method, devices)["temp_bytes"] for devices in (2, 4, 8))
    assert two == four == eight


# --- All negatives of the batch -------------------------------------------------------------------


def test_gathering_sends_and_holds_in_proportion_to_the_batch() -> None:
    gather = METHODS["infonce, gather"]
    labels = 13 * ROWS  # group, validity and index, once
    for devices in (4, 8):
        others = devices - 1
        assert sent(gather, devices) == {
            "all-gather": others * (2 * OWN + labels),
            "reduce-scatter": others * 2 * OWN,
        }
    four, eight = (record(gather, devices)["temp_bytes"] for devices in (4, 8))
    assert eight > 1.9 * four


def test_a_ring_sends_in_proportion_to_the_batch_and_holds_no_more() -> None:
    ring = METHODS["infonce, ring"]
    four, eight = (sent(ring, devices)["collective-permute"] for devices in (4, 8))
    # Texts go round twice, their gradients once, each with some numbers for a pair.
    assert 1 < four / (OWN * (3 * 4 - 2)) < 1.05
    assert 1 < eight / (OWN * (3 * 8 - 2)) < 1.05
    assert record(ring, 8)["temp_bytes"] == record(ring, 4)["temp_bytes"]


# --- Programs for TPUs, and the page --------------------------------------------------------------


ONLY = "roll|shuffle, 8|gather"


@needs_libtpu
def test_two_slices_of_tpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four and eight chips, the loss alone and a whole step; nothing is compiled twice."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(benchmark.LIBTPU))
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")
    out = tmp_path / "scaling.json"
    flags = ["--quick", "--out", str(out), "--only", ONLY]
    benchmark.in_a_process("tpu", flags)
    part = json.loads(out.read_text())["tpu"]
    found = {(r["what"], r["method"], r["devices"]): r for r in part["records"]}
    assert len(found) == 3 * 2 + 2

    def of_loss(method: str, devices: int) -> dict[str, int]:
        return dict(found["loss", method, devices]["sent_bytes"])

    labels = 2 * 4 * 4 * ROWS
    for devices in (4, 8):
        assert of_loss("jsd, roll", devices)["collective-permute"] == 4 * 4 * WIDTH + 16
        dealt = of_loss("jsd, shuffle, 8 devices", devices)["all-to-all"]
        assert dealt == (4 * OWN + labels) * (devices - 1) // devices
    four, eight = (sum(of_loss("infonce, gather", devices).values()) for devices in (4, 8))
    assert eight / four == pytest.approx(7 / 3, rel=0.02)
    for method in ("jsd, roll", "jsd, shuffle, 8 devices"):
        four, eight = (found["loss", method, devices]["temp_bytes"] for devices in (4, 8))
        assert eight <= four

    step = found["step", "jsd, shuffle, 8 devices", 4]
    assert step["sent_bytes"]["all-to-all"] == of_loss("jsd, shuffle, 8 devices", 4)["all-to-all"]
    gradients = 2 * 3 / 4 * 4 * step["parameters"]
    # Of a model this small, metrics are a hundredth part.
    assert report.gradients(part, 4) == pytest.approx(gradients, rel=0.02)
    gather = report.of_the_loss(part, found["step", "infonce, gather", 4])
    assert gather == pytest.approx(sum(of_loss("infonce, gather", 4).values()), rel=0.01)

    before = out.read_text()
    page = tmp_path / "page.md"
    report.write(json.loads(before), page)
    assert "| jsd, roll | 2.11 kB | 2.12 kB | 8 |" in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 10_000
    monkeypatch.setattr(benchmark, "measure", None)  # would be called for what is not known
    sizes = {"v5e:2x2": 4, "v5e:2x4": 8}
    monkeypatch.setattr(
        benchmark, "mesh_of", lambda _, name: build_mesh(jax.devices()[: sizes[name]])
    )
    assert not list(benchmark.run(part, benchmark.QUICK, "tpu", ONLY))


@pytest.mark.parametrize(
    ("value", "text"),
    [(56, "56 B"), (8264, "8.26 kB"), (7_368_760, "7.37 MB"), (2.72e9, "2.72 GB")],
)
def test_sizes_have_their_unit(value: float, text: str) -> None:
    assert report.size(value) == text


def test_a_program_that_does_not_fit_says_what_it_needs() -> None:
    refused = {"what": "loss", "method": report.OURS, "devices": 1, "refused_bytes": 17 * 10**9}
    part: dict[str, Any] = {
        "records": [refused | {"topology": "v5e:1x1", "compile_cpu_seconds": 1.0}]
    }
    made = dict.fromkeys(["machine", "commit", "jax", "python", "date"], "x")
    part |= {"command": "do it", "minutes": 1.0, "provenance": made}
    found = report.tables({"tpu": part})
    assert f"| {report.OURS} | 17.0 GB |" in found["held, tpu"]
    assert f"| {report.OURS} |  | 0 |" in found["sent, tpu"]
