"""Classification of Fashion-MNIST by a trained model: ``python -m benchmarks.fashion_mnist``.

Prints the rows of the table in ``docs/evaluate_classification.md``, and keeps all metrics in
``benchmarks/results/fashion_mnist.json``.  The set is that of Debian's package
``dataset-fashion-mnist``, in ``/usr/share/datasets/fashion-mnist``.  Beside the model stand the raw
pixels, by the same protocols.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import Source, build_sources
from clip_lite_jax.evaluators.registry import build_task
from clip_lite_jax.evaluators.tasks import TaskData
from clip_lite_jax.inference import load
from clip_lite_jax.provenance import provenance
from clip_lite_jax.train_step import EncodeFns

OUT = Path(__file__).parent / "results" / "fashion_mnist.json"
TASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zero_shot", {"prompts": "1"}),
    ("zero_shot", {"prompts": "7"}),
    ("zero_shot", {"prompts": "18"}),
    ("zero_shot", {"prompts": "80"}),
    ("knn", {}),
    ("knn", {"features": "embedding"}),
    ("linear_probe", {"method": "sgd"}),
    ("linear_probe", {"method": "sgd", "features": "embedding"}),
    ("linear_probe", {"method": "lbfgs", "c": 0.01}),
    ("linear_probe", {"method": "lbfgs", "shots": [1, 5, 20]}),
)
PIXELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("knn", {}),
    ("linear_probe", {"method": "lbfgs", "c": 0.01, "shots": [1, 5, 20]}),
)


class RawPixels:
    """Grey pixels as features ``[784]``, in [0, 1]."""

    blank = np.zeros(784, np.float32)

    def open(self, source: Source, index: int) -> Opened:
        return Opened(source[index].image)

    def view(self, opened: Opened) -> np.ndarray:
        return np.asarray(opened.decoded().convert("L"), np.float32).reshape(-1) / 255


def measure(
    fns: EncodeFns, data: TaskData, name: str, options: dict[str, Any], train: int
) -> dict[str, Any]:
    more = {} if name == "zero_shot" else {"max_train": train}
    task = build_task(name, data, options | more)
    start = time.perf_counter()
    outcome = task.outcome(fns)
    seconds = time.perf_counter() - start
    m = outcome.metrics
    label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
    print(
        f"| {label} | {m['top1']:.3f} ({m['top1_low']:.3f} to {m['top1_high']:.3f}) | "
        f"{m['top5']:.3f} | {m['mean_per_class']:.3f} | {seconds:.0f} s |",
        flush=True,
    )
    return {
        "task": name,
        "options": options | more,
        "protocol": task.protocol,
        "seconds": seconds,
        "metrics": m,
        "per_class": outcome.tables["per_class"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a run")
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--train", type=int, default=10_000, help="training pictures, 0 for all")
    known = parser.parse_args()
    model = load(known.model)
    bad = BadExamples()
    splits = build_sources(DataConfig(source=known.source), bad, training=False)
    data = TaskData(splits, TowerInputs(model.pixels, model.tokenizer), 64, bad)
    raw: Any = RawPixels()
    pixels = replace(data, inputs=TowerInputs(raw, model.tokenizer))
    as_is: Any = np.asarray
    plain = replace(model.fns, image_features=as_is, image=as_is)
    found: dict[str, Any] = {"model": model.config.name, "rows": [], "provenance": provenance()}
    for what, fns, of, tasks in (
        ("pixels", plain, pixels, PIXELS),
        ("model", model.fns, data, TASKS),
    ):
        for name, options in tasks:
            row = measure(fns, of, name, options, known.train)
            found["rows"].append({"of": what} | row)
            OUT.write_text(json.dumps(found, indent=1) + "\n")  # what there is after a kill


if __name__ == "__main__":
    main()
