"""Recall of large galleries, in time and memory, beside clip_benchmark's.

    make .work/clip_benchmark/installed .venv-peers/installed
    python -m benchmarks.retrieval

Both get the same random embeddings of images and captions, five for each image, as COCO's 5k test
split has them, and give R@1, R@5 and R@10 in both directions; the numbers must agree.  Then ours
alone, on more and more images with one caption each: memory is to grow with their number, not with
its square.  Each measurement is a process of its own, whose peak is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
PLACES = (
    ROOT / ".venv-peers/lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages",
    ROOT / ".work/clip_benchmark",
)
WIDTH = 256


def embeddings(images: int, captions: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors ``[N, D]`` and ``[N · captions, D]``, nearer to their own; and owners."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(images), captions)
    first = rng.standard_normal((images, width), np.float32)
    second = first[owner] + 5 * rng.standard_normal((len(owner), width), np.float32)
    return _unit(first), _unit(second), owner


Found = tuple[dict[str, float], float]
"""Recalls, and the seconds that they took; a program is compiled in them, nothing imported."""


def ours(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Found:
    import jax

    from clip_lite_jax.evaluators.ranking import count
    from clip_lite_jax.evaluators.retrieval import metrics_of
    from clip_lite_jax.sharding import build_mesh
    from clip_lite_jax.train_step import make_encode_fns

    start = time.perf_counter()
    critic = SimpleNamespace(matrix=lambda a, b: a @ b.T, pairs=lambda a, b: (a * b).sum(-1))
    model: Any = SimpleNamespace(
        **dict.fromkeys(("encode_image", "encode_text", "image_features", "heat_maps"), jax.jit),
        critic=lambda params: critic,
    )
    fns = make_encode_fns(model, build_mesh())({}, {})
    found = metrics_of(count(fns, images, texts, owner), owner)
    recalls = {n: value for n, value in found.items() if n.endswith(("_r1", "_r5", "_r10"))}
    return recalls, time.perf_counter() - start


def theirs(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Found:
    sys.path += map(str, PLACES)
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    start = time.perf_counter()
    scores = torch.from_numpy(texts) @ torch.from_numpy(images).T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(owner)), torch.from_numpy(owner)] = True
    found = {}
    for k in (1, 5, 10):
        for name, s, r in (("text_to_image", scores, right), ("image_to_text", scores.T, right.T)):
            hits = batchify(recall_at_k, s, r, 64, "cpu", k=k) > 0  # 64 is its default batch
            found[f"{name}_r{k}"] = hits.float().mean().item()
    return found, time.perf_counter() - start


def measure(who: str, images: int, captions: int, width: int) -> dict[str, Any]:
    """Run in a process of its own."""
    given = embeddings(images, captions, width)
    found, seconds = {"ours": ours, "theirs": theirs}[who](*given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib": peak, "found": found}


def in_process(who: str, images: int, captions: int, width: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.retrieval", "--one"]
    given = [who, str(images), str(captions), str(width)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("WHO", "IMAGES", "CAPTIONS", "WIDTH"))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--growth", type=int, nargs="*", default=[25_000, 50_000, 100_000])
    known = parser.parse_args()
    if known.one:
        who, *numbers = known.one
        print(json.dumps(measure(who, *map(int, numbers))))
        return
    pairs = [
        (in_process("ours", known.images, 5, WIDTH), in_process("theirs", known.images, 5, WIDTH))
        for _ in range(known.turns)
    ]
    for left, right in pairs:
        for name, value in right["found"].items():
            assert abs(left["found"][name] - value) < 1e-4, (name, left["found"][name], value)
    for who, turn in (("ours", 0), ("clip_benchmark", 1)):
        seconds = [pair[turn]["seconds"] for pair in pairs]
        peak = np.median([pair[turn]["peak_gib"] for pair in pairs])
        print(f"| {who} | {np.median(seconds):.1f} s | {peak:.2f} GiB |")
    ratio = np.median([right["seconds"] / left["seconds"] for left, right in pairs])
    print(f"clip_benchmark's time over ours: {ratio:.2f}")
    for images in known.growth:
        found = in_process("ours", images, 1, 64)
        print(
            f"| {images:,} x {images:,} | {found['seconds']:.0f} s | {found['peak_gib']:.2f} GiB |"
        )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
