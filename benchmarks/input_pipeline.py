"""From JPEG files to batches, on one core: ``python -m benchmarks.input_pipeline``.

Photographs of 500 x 375 pixels become augmented ones of 224: in our pipeline, in PyTorch's
DataLoader and in WebDataset's reader with the transform of open_clip, beside libjpeg-turbo that
decodes them and does nothing else.  Every reader has a process of its own on the same core; they
take turns.  Then what `clip-lite data` makes of the pictures in a second, and the memory of a
process that reads many.  The peers run in the environment ``.venv-peers`` of the Makefile.
"""

import argparse
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pages import places, table, write_tables
from benchmarks.step_worker import Step, Worker, serve

RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"
DOCS = Path(__file__).parent.parent / "docs" / "data.md"
QUICK_RESULTS = Path("runs/input_pipeline/quick.json")
PEERS = Path(".venv-peers/bin/python")

WIDTH, HEIGHT, QUALITY, SIZE = 500, 375, 90, 224
BATCH, BATCHES = 64, 4
"""Pictures of a batch, and batches of a turn."""
PER_SHARD = 500
CORE = 0
READERS = {
    "decode": "libjpeg-turbo: decode, no more",
    "ours crop": "ours: crop, flip, resize",
    "ours crop bilinear": "ours, bilinear: crop, flip, resize",
    "loader crop": "DataLoader: crop, resize, normalise",
    "webdataset crop": "WebDataset: crop, resize, normalise",
    "ours full": "ours: full, jitter left to the accelerator",
    "ours full bilinear": "ours, bilinear: full, jitter left to the accelerator",
    "ours applied bilinear": "ours, bilinear: full, jitter applied on this core too",
    "loader full": "DataLoader: full",
    "webdataset full": "WebDataset: full",
}


def write_pictures(folder: Path, count: int, photographs: Sequence[Image.Image]) -> None:
    """Random cuts of photographs as ``.jpg`` and ``.txt`` and in shards of the same."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, PER_SHARD):
        with tarfile.open(folder / f"{start // PER_SHARD:05}.tar", "w") as tar:
            for number in range(start, min(count, start + PER_SHARD)):
                whole = photographs[number % len(photographs)]
                left = int(rng.integers(0, whole.width - WIDTH + 1))
                upper = int(rng.integers(0, whole.height - HEIGHT + 1))
                cut = whole.crop((left, upper, left + WIDTH, upper + HEIGHT))
                buffer = io.BytesIO()
                cut.save(buffer, "JPEG", quality=QUALITY)
                caption = f"photograph {number} of a series".encode()
                for ending, content in ((".jpg", buffer.getvalue()), (".txt", caption)):
                    name = f"{number:06}{ending}"
                    (folder / name).write_bytes(content)
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


# --- Our readers, in a process of their own -------------------------------------------------------


def batches_of(folder: str, augmentation: str, resampling: str, threads: int) -> Any:
    from clip_lite_jax.config import AugmentConfig, DataConfig, from_dict
    from clip_lite_jax.data.bad_examples import BadExamples
    from clip_lite_jax.data.inputs import Pixels, TowerInputs
    from clip_lite_jax.data.pipeline import TrainTransform, train_batches
    from clip_lite_jax.data.sources import build_sources
    from clip_lite_jax.data.tokenizer import Tokenizer, train_tokenizer

    jitter = 0.0 if augmentation == "crop" else 0.8
    options = {"jitter": jitter, "hue": 0.1, "resampling": resampling}
    augment = from_dict(AugmentConfig, options)
    config = DataConfig(
        source=folder, format="folder", image_size=SIZE, augment=augment, threads=threads
    )
    bad = BadExamples()
    train = build_sources(config, bad)["train"]
    tokenizer = Tokenizer(train_tokenizer(["photograph 1 of a series"], 24), 24)
    transform = TrainTransform(train, TowerInputs(Pixels(config), tokenizer), config, bad)
    return train_batches(transform, BATCH, 0, 0)


def build(folder: str, kind: str, core: int) -> Step:
    """A step of `BATCHES` x `BATCH` pictures on one core; its value is the last batch's mean."""
    os.sched_setaffinity(0, {core})
    import jax

    from clip_lite_jax.color_jitter import color_jitter

    _, augmentation, *rest = kind.split()
    batches = batches_of(folder, augmentation, rest[0] if rest else "antialiased", threads=0)
    apply = jax.jit(color_jitter)

    def step() -> float:
        for batch in itertools.islice(batches, BATCHES):
            images = batch.image
            if augmentation == "applied":
                images = np.asarray(apply(images, batch.changes[:, 0]))
        return float(images.mean())

    return step


def memory(folder: str, examples: int) -> list[tuple[int, float]]:
    """(Examples read, MiB of the process) at ten places, with two threads."""
    page = resource.getpagesize() / 2**20
    batches = batches_of(folder, "full", "bilinear", threads=2)
    found = []
    for number in range(1, examples // BATCH + 1):
        next(batches)
        if number % max(1, examples // BATCH // 10) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append((number * BATCH, pages * page))
    return found


# --- The comparison -------------------------------------------------------------------------------


def rates(folder: Path, python: Path, rounds: int) -> dict[str, list[float]]:
    """Pictures in a second, by reader, one number for each turn."""
    environment = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    workers = {}
    for kind in READERS:
        ours = kind.startswith("ours")
        module = "benchmarks.input_pipeline" if ours else "benchmarks.input_pipeline_torch"
        command = [sys.executable, "-m", module, "--serve"] if ours else [str(python), "-m", module]
        workers[kind] = Worker(command, environment)
    found: dict[str, list[float]] = {kind: [] for kind in workers}
    try:
        for kind, worker in workers.items():
            worker.build(folder=str(folder), kind=kind, core=CORE)
        for _ in range(rounds):
            for kind, worker in workers.items():
                found[kind].append(BATCH * BATCHES / worker.seconds(1)[0])
    finally:
        for worker in workers.values():
            worker.close()
    return found


COMMANDS = {
    "check": ("data", "check"),
    "convert": ("data", "convert"),
    "convert and resize": ("data", "convert", "--resize", "256"),
}


def command_rates(folder: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Pictures in a second that `clip-lite data` gets through on one core, its start included."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, "-m", "clip_lite_jax.cli", *words, str(folder)]
                command += ["--out", out] if "check" in words else [str(Path(out, "new"))]
                start = time.perf_counter()
                subprocess.run(
                    [*command, "--processes", "1", "--config.data.format=folder"],
                    check=True,
                    capture_output=True,
                    preexec_fn=lambda: os.sched_setaffinity(0, {CORE}),
                )
                found[name].append(count / (time.perf_counter() - start))
    return found


def tables(results: dict[str, Any]) -> dict[str, str]:
    found = results["rates"]
    lines: list[Sequence[str]] = [
        ("on one core", "pictures/s", "of decoding", "of the DataLoader"),
        ("---",) * 4,
    ]
    for kind, label in READERS.items():
        peer = "loader full" if "crop" not in kind and kind != "decode" else "loader crop"
        against = [_ratio(found, kind, "decode"), _ratio(found, kind, peer)]
        if kind == "decode":
            against = ["", ""]
        lines.append((label, f"{np.median(found[kind]):.0f}", *against))
    for name, measured in results["commands"].items():
        label = f"`clip-lite {' '.join(COMMANDS[name])}`"
        lines.append((label, f"{np.median(measured):.0f}", "", ""))
    facts = results["provenance"]
    origin = (
        f"`{results['command']}`, commit {facts['commit']}, {facts['machine']}, torch "
        f"{results['torch']}, {facts['date']}; medians of {len(found['decode'])} turns, ratios "
        f"with quartiles; files of {results['bytes'] / 1000:.0f} kB on average."
    )
    used = ", ".join(f"{mib:.0f}" for _, mib in results["memory"])
    last = results["memory"][-1][0]
    flat = f"MiB of a process that reads {last:,} pictures, at every tenth of them: {used}."
    return {"input pipeline": f"{table(lines)}\n\n{origin}\n\n{flat}"}


def _ratio(found: dict[str, list[float]], kind: str, other: str) -> str:
    low, middle, high = np.quantile(np.divide(found[kind], found[other]), (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", type=Path, default=PEERS, help="Python of the peers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=200_000, help="read for the memory")
    parser.add_argument("--quick", action="store_true", help=f"few pictures, into {QUICK_RESULTS}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(build)
        return
    if given.memory_of:
        print(json.dumps(memory(given.memory_of, given.examples)))
        return

    from clip_lite_jax.provenance import provenance

    count, rounds, examples = given.pictures, given.rounds, given.examples
    if given.quick:
        count, rounds, examples = 3 * BATCH, 2, 10 * BATCH
    quick = QUICK_RESULTS if given.quick else None
    out, docs = places(given.out, given.docs, (RESULTS, DOCS), quick)
    with tempfile.TemporaryDirectory() as folder:
        peers = [str(given.torch), "-m", "benchmarks.input_pipeline_torch"]
        subprocess.run([*peers, folder, str(count)], check=True)
        sizes = [path.stat().st_size for path in Path(folder).glob("*.jpg")]
        torch = subprocess.run(
            [str(given.torch), "-c", "import torch; print(torch.__version__)"],
            capture_output=True,
            text=True,
            check=True,
        )
        own = [sys.executable, "-m", "benchmarks.input_pipeline", "--memory-of", folder]
        found = rates(Path(folder), given.torch, rounds)
        commands = command_rates(Path(folder), count, min(rounds, 5))
        used = subprocess.run(
            [*own, "--examples", str(examples)], capture_output=True, text=True, check=True
        )
        results = {
            "command": "python -m benchmarks.input_pipeline",
            "provenance": provenance(),
            "torch": torch.stdout.strip(),
            "bytes": float(np.mean(sizes)),
            "rates": found,
            "commands": commands,
            "memory": json.loads(used.stdout),
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(docs, tables(results))
    print(next(iter(tables(results).values())))


if __name__ == "__main__":
    main()
