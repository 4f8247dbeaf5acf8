"""Eight fake CPU devices for every test, and a tiny data set of coloured shapes."""

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Programs here are compiled once and run for milliseconds: compiling them well costs more.
    "--xla_backend_optimization_level=0",
    # The older emitters of fusions, and one module for each program: half the time of compilation.
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    # With the default scheduler a program that comes from the cache can hang in its permutes until
    # XLA aborts (jaxlib 0.10.2, CPU; the ring on the image side alone does it every time).
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, and many tests compile the same small programs.
CACHE = Path(__file__).parent.parent / ".work" / "jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import fsspec
import jax
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image, ImageDraw

from clip_lite_jax import checkpoints, remote
from clip_lite_jax.config import (
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    NegativesConfig,
    OptimConfig,
    TaskConfig,
)
from clip_lite_jax.evaluate import evaluate
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train import train


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the person who runs it has cached."""
    monkeypatch.setenv("CLIP_LITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """``memory://`` with nothing in it, and no waiting for a second attempt."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


class Clock:
    """What `checkpoints` takes for the time; to sleep is to move it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(checkpoints, "monotonic", lambda: clock.now)
    monkeypatch.setattr(checkpoints, "sleep", clock.sleep)
    return clock


COLOURS = ("red", "green", "blue", "black", "orange", "purple", "brown", "pink")
SHAPES = ("circle", "square", "triangle", "cross", "bar", "ring")


def draw(shape: str, colour: str, size: int = 32) -> Image.Image:
    """One coloured shape on white."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    low, high, middle = size // 5, size - size // 5, size // 2
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        pen.polygon(((low, high), (high, high), (middle, low)), fill=colour)
    elif shape == "cross":
        pen.line((low, low, high, high), fill=colour, width=4)
        pen.line((low, high, high, low), fill=colour, width=4)
    elif shape == "bar":
        pen.rectangle((low, middle - 3, high, middle + 3), fill=colour)
    else:
        pen.ellipse((low, low, high, high), outline=colour, width=4)
    return image


def write_pairs(folder: Path) -> Path:
    """48 pictures with two captions each, as a CSV table; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for colour in COLOURS:
            for shape in SHAPES:
                name = f"{colour}_{shape}.png"
                draw(shape, colour).save(folder / name)
                writer.writerow([name, f"a {colour} {shape}"])
                writer.writerow([name, f"{shape} in {colour}"])
    return table


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def finished_run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a trained and evaluated run."""
    workdir = tmp_path_factory.mktemp("finished_run")
    others = tmp_path_factory.mktemp("others") / "others.csv"
    others.write_text("image,caption\na.png,a circle\nb.png,a square\nbroken.png,a cross\n")
    for name, shape in (("a", "circle"), ("b", "square")):
        draw(shape, "red").save(others.with_name(f"{name}.png"))
    others.with_name("broken.png").write_bytes(b"no picture")
    tasks = {
        "search": TaskConfig(task="retrieval"),
        "others": TaskConfig(
            task="retrieval", source=str(others), options={"split": "all"}, while_training=True
        ),
    }
    settings = EvalConfig(every=2, batch_size=16, tasks=tasks)
    evaluate(train(tiny_config(pairs, eval=settings), workdir))
    return workdir


def tiny_config(source: Path, **changes: object) -> Config:
    """A run of seconds."""
    values: dict[str, object] = {
        "steps": 4,
        "batch_size": 16,
        "data": DataConfig(
            source=str(source), image_size=16, vocab_size=60, max_tokens=8, threads=1, prefetch=2
        ),
        "model": tiny_model(),
        "negatives": NegativesConfig(block=4, lanes=2),  # fits 1, 2, 4 and 8 devices
        "optim": OptimConfig(warmup_steps=1),
        "eval": EvalConfig(every=2, batch_size=16),
        "checkpoint": CheckpointConfig(every=2),
        "log": LogConfig(tensorboard=False),
    }
    return Config(**(values | changes))  # type: ignore[arg-type]


def tiny_model(dtype: str = "float32", temperature: float = 0.07) -> ModelConfig:
    return ModelConfig(
        image=EncoderConfig(name="convnet", options={"widths": [8, 16], "depths": [1, 1]}),
        text=EncoderConfig(name="transformer", options={"width": 16, "layers": 1, "heads": 2}),
        critic=CriticConfig(options={"width": 16, "hidden": 16, "temperature": temperature}),
        dtype=dtype,  # type: ignore[arg-type]
    )


@pytest.fixture(params=[1, 8], ids=["1 device", "8 devices"])
def mesh(request: pytest.FixtureRequest) -> jax.sharding.Mesh:
    return build_mesh(jax.devices()[: request.param])


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs on two devices: eight are for `test_parity`, and only compile longer."""
    monkeypatch.setattr(
        "clip_lite_jax.run.build_mesh", lambda config: build_mesh(jax.devices()[:2], config)
    )
