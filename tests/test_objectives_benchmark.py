"""The costs of objectives: tables, and what grows how."""

from pathlib import Path

import pytest

from benchmarks import objectives as benchmark
from benchmarks import objectives_report as report

QUICK_CASES = {"jsd, shuffle", "infonce, all, gather", "infonce, all, ring"}


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
