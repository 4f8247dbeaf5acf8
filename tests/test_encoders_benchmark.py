"""The bench of encoders beside PyTorch's: turns, agreement, and its table; no PyTorch needed."""

import sys
from typing import Any

import pytest

from benchmarks import encoders
from benchmarks.encoders import Case, compare, merged, tables
from benchmarks.encoders_jax import build
from benchmarks.step_worker import Worker

CASE = Case("resnet18", 32, 2)
PROGRAM = """
from benchmarks.step_worker import serve

def build(start):
    values = iter(range(start, 100))
    print("libraries print what they like")
    return lambda: float(next(values))

serve(build)
"""


class Fake:
    """A worker of a known speed."""

    def __init__(self, value: float, *seconds: float) -> None:
        self.value, self.times = value, list(seconds)
        self.built: dict[str, Any] = {}

    def build(self, **options: Any) -> list[float]:
        self.built = options
        return [self.value] * 3

    def seconds(self, steps: int) -> list[float]:
        return [self.times.pop(0) if steps > 1 else 99.0] * steps


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "PAUSE", 0)


def test_a_worker_answers_and_its_output_is_no_answer() -> None:
    worker = Worker([sys.executable, "-c", PROGRAM], {})
    assert worker.build(start=5) == [5, 6, 7]
    assert len(worker.seconds(4)) == 4
    assert worker.build(start=50) == [50, 51, 52]
    worker.close()
    assert worker.process.returncode == 0


def test_a_worker_that_dies_ends_the_bench() -> None:
    worker = Worker([sys.executable, "-c", PROGRAM], {})
    with pytest.raises(SystemExit, match="ended with 1"):
        worker.build(unknown=1)


def test_the_fastest_of_pytorch_counts() -> None:
    workers: dict[str, Any] = {
        "ours": Fake(1.0, 1.0, 2.0, 4.0),
        "torch": Fake(1.0, 3.0, 3.0, 3.0),
        "torch, channels_last": Fake(1.0005, 2.0, 1.0, 2.0),
    }
    found = compare(CASE, workers, 3)
    assert found["fastest"] == "torch, channels_last"
    assert found["ratio"] == [0.5, 0.5, 1.25]  # of 2, 0.5 and 0.5
    assert workers["torch"].built["variant"] == ""
    assert workers["torch, channels_last"].built["variant"] == "channels_last"
    assert "variant" not in workers["ours"].built
    facts = {"commit": "c", "machine": "m", "jax": "1", "date": "today"}
    found |= {"provenance": facts, "torch": "2"}
    results = {"command": "python x", "records": [found]}
    (text,) = tables(results).values()
    expected = "| `resnet18` | training step | 32 | 2 | 2000 | 2000 | channels_last | 0.50"
    assert expected in text
    assert "`python x`, commit c, m, jax 1, torch 2, today; 3 turns." in text


def test_a_case_takes_the_place_of_its_older_numbers() -> None:
    def record(case: Case, value: int) -> dict[str, Any]:
        setting = {"name": case.name, "size": case.size, "batch": case.batch, "train": case.train}
        return setting | {"value": value}

    records = [record(encoders.CASES[2], 1), record(encoders.CASES[5], 2)]
    for case, value in ((encoders.CASES[5], 3), (encoders.CASES[0], 4)):
        records = merged(records, record(case, value))
    assert [r["value"] for r in records] == [4, 1, 3]


def test_other_losses_are_not_timed() -> None:
    workers: dict[str, Any] = {"ours": Fake(1.0), "torch": Fake(1.01)}
    with pytest.raises(SystemExit, match=r"resnet18, 32, batch 2: torch gives \[1.01"):
        compare(CASE, workers, 1)
    workers["torch"] = Fake(float("nan"))
    with pytest.raises(SystemExit, match="torch gives"):
        compare(CASE, workers, 1)


def test_a_step_of_ours_trains() -> None:
    step = build("minilm", 4, 2, train=False)
    assert step() == step() > 0
    step = build("resnet18", 32, 4, train=True)
    assert step() != step()
