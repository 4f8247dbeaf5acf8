"""Our training step, for `train_step`: as `clip_lite_jax.train` makes it, on batches in memory."""

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device_trace import costs
from benchmarks.step_worker import serve
from benchmarks.train_step_cases import BATCHES, EMBEDDING, Case, Failed, captions, pixels
from clip_lite_jax.batch import Batch
from clip_lite_jax.color_jitter import color_jitter
from clip_lite_jax.config import (
    CriticConfig,
    EncoderConfig,
    ModelConfig,
    NegativesConfig,
    ObjectiveConfig,
    OptimConfig,
)
from clip_lite_jax.flops import flops
from clip_lite_jax.learner import build_learner
from clip_lite_jax.models import Inputs, Model, build_model
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh, put_batch
from clip_lite_jax.train import AHEAD
from clip_lite_jax.train_state import init_state
from clip_lite_jax.train_step import make_train_step

LOSSES: dict[str, tuple[ObjectiveConfig, NegativesConfig]] = {
    "jsd": (ObjectiveConfig(), NegativesConfig()),
    "infonce": (ObjectiveConfig(name="infonce"), NegativesConfig(name="all")),
}
TRACED = 1
"""Calls of `Training` under the profiler."""


def model_of(case: Case) -> Model:
    image: dict[str, Any] = {}
    if case.image == "vit":
        image = {
            "width": case.image_width,
            "layers": case.image_layers,
            "heads": case.image_width // 64,
            "head_width": None,
            "activation": "gelu",
        }
    text: dict[str, Any] = {
        "layers": case.text_layers,
        "width": case.text_width,
        "heads": case.text_heads,
        "positions": case.tokens,
        "head_width": None,
        "activation": "gelu",  # open_clip's, unless told otherwise
    }
    name = "clip_vit_b16" if case.image == "vit" else case.image
    config = ModelConfig(
        image=EncoderConfig(name=name),
        text=EncoderConfig(name="clip_text"),
        critic=CriticConfig(options={"width": EMBEDDING, "hidden": EMBEDDING}),
        dtype=case.dtype,  # type: ignore[arg-type]
    )
    model = build_model(config, case.size, case.vocabulary, case.tokens)
    module: Any = model.module
    towers = {
        "image_encoder": module.image_encoder.clone(**image),
        "text_encoder": module.text_encoder.clone(**text),
    }
    return replace(model, module=module.clone(**towers))


def batch_of(case: Case, seed: int) -> Batch:
    tokens = captions(case, seed)
    index = np.arange(case.batch, dtype=np.int32)
    group = np.stack([index, index], axis=1)
    valid = np.ones(case.batch, bool)
    return Batch(pixels(case, seed), tokens, tokens != 0, group, valid, index)


class Training:
    """`case.steps` steps, and to the end of the last; the value is the loss."""

    def __init__(self, case: Case, loss: str) -> None:
        mesh = build_mesh(jax.devices()[:1])
        self.case, self.model = case, model_of(case)
        objective, negatives = LOSSES[loss]
        learner = build_learner(self.model, objective, negatives, case.batch, mesh, seed=0)
        settings = OptimConfig(learning_rate=1e-4, weight_decay=0.2, clip_norm=None)
        self.state, optimizer = init_state(
            self.model, lambda params: build_optimizer(settings, 10_000, params), 0, False, mesh
        )
        self.parameters = sizes(self.state.params)
        self.batches = [put_batch(mesh, batch_of(case, seed)) for seed in range(BATCHES)]
        start = time.perf_counter()
        step = make_train_step(learner, optimizer, mesh)
        self.program = step.lower(self.state, self.batches[0]).compile()  # type: ignore[attr-defined]
        self.compile_seconds = time.perf_counter() - start
        self.taken = 0
        self()  # whether it fits shows here

    def __call__(self) -> float:
        running: list[Any] = []
        metrics: Any = None
        for _ in range(self.case.steps):
            batch = self.batches[self.taken % BATCHES]
            self.state, metrics = self.program(self.state, batch)
            self.taken += 1
            running.append(metrics)
            if len(running) > AHEAD:  # as the training loop
                jax.block_until_ready(running.pop(0))
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def facts(training: Training | Failed) -> dict[str, Any]:
    if isinstance(training, Failed):
        return {"failed": training.reason}
    memory = training.program.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "parameters": training.parameters,
        "compile_seconds": training.compile_seconds,
        "bytes": used - memory.alias_size_in_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),  # of all steps of the process
        "flops": 3 * forward_flops(training.case),  # the backward pass has two for each product
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def trace(training: Training) -> dict[str, Any]:
    """Where the time of a step goes; see `device_trace.costs`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                training()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return costs(file, training.program.as_text(), TRACED * training.case.steps)


def sizes(params: Mapping[str, Any]) -> dict[str, int]:
    """Numbers in the parameters of the towers, and of what makes embeddings of features."""
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()
    }
    return {
        "image": count.pop("image_encoder"),
        "text": count.pop("text_encoder"),
        "head": sum(count.values()),
    }


def forward_flops(case: Case) -> int:
    """Of the products and convolutions of a batch through towers and heads, two a multiply-add.

    Attention counts in whole, though a causal one has no use for half of it.
    """
    model = model_of(case)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    inputs = jax.eval_shape(lambda: model.example_inputs(case.batch))

    def forward(variables: Any, inputs: Inputs) -> Any:
        params, model_state = variables
        return (
            model.encode_image(params, model_state, inputs.image),
            model.encode_text(params, model_state, inputs.tokens, inputs.mask),
        )

    return flops(jax.jit(forward).trace(variables, inputs))


def jitter(size: int, batch: int, hue: bool, calls: int = 20) -> dict[str, Any]:
    """Seconds of `color_jitter` of a batch, the median over calls."""
    rng = np.random.default_rng(0)
    shape = (batch, size, size, 3)
    images = jax.device_put(rng.integers(0, 256, shape, dtype=np.uint8))
    changes = np.stack(
        [rng.permutation(3)[None].repeat(batch, 0), rng.uniform(0.6, 1.4, (batch, 3))]
    )
    changes = np.moveaxis(changes, 0, -1)
    if hue:
        turns = np.stack([rng.integers(0, 4, batch), rng.uniform(-0.1, 0.1, batch)], axis=-1)
        changes = np.concatenate([changes, turns[:, None]], axis=1)
    placed = jax.device_put(jnp.asarray(changes, jnp.float32))
    apply = jax.jit(color_jitter)
    jax.block_until_ready(apply(images, placed))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(apply(images, placed))
        seconds.append(time.perf_counter() - start)
    return {"size": size, "batch": batch, "hue": hue, "seconds": float(np.median(seconds))}


def build(loss: str, **options: Any) -> Training | Failed:
    try:
        return Training(Case(**options), loss)
    except Exception as error:
        traceback.print_exc()
        return Failed(error)


if __name__ == "__main__":
    if sys.argv[1:] == ["--jitter"]:
        sizes_of = ((224, 256), (48, 128))
        print(json.dumps([jitter(*size, hue) for size in sizes_of for hue in (False, True)]))
    else:
        serve(build, {"facts": facts, "trace": trace, "rest": lambda _: None})
