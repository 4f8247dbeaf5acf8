"""One run of `one_negative`: a projection of frozen features per side, trained and evaluated."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from benchmarks.frozen_features import Features
from benchmarks.frozen_linear import unit
from benchmarks.frozen_pairs import GALLERIES, STAGES
from benchmarks.one_negative_methods import Recipe
from clip_lite_jax.config import OptimConfig
from clip_lite_jax.evaluators.retrieval import retrieval_metrics
from clip_lite_jax.models.critics import DotCritic
from clip_lite_jax.negatives import (
    Memory,
    Pairs,
    build_sampler,
    init_memory,
    remember,
    uses_memory,
)
from clip_lite_jax.objectives import build_objective
from clip_lite_jax.optim import build_schedule, path_tree
from clip_lite_jax.sharding import build_mesh


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    epochs: float = 25
    components: int = 128
    """Principal components of either side's features, by the training examples."""
    width: int = 64
    hidden: int = 128
    temperature: float = 0.07
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    warmup: float = 0.05
    """Share of the steps."""


@dataclass(frozen=True)
class TrainSet:
    image: Array  # [N, components]
    caption: Array  # [C, components]
    first: np.ndarray  # [N] the first caption of an example
    count: np.ndarray  # [N] captions of an example
    group: Array  # [N] int32


@dataclass(frozen=True)
class Task:
    train: TrainSet
    galleries: dict[str, list[tuple[np.ndarray, np.ndarray]]]
    """By stage; images and texts ``[N, components]``, of which row i belongs to row i."""


def rotation(x: np.ndarray, components: int) -> Callable[[np.ndarray], np.ndarray]:
    """Projection to the principal components of `x` ``[N, F]``, of mean variance 1."""
    mean = x.mean(0)
    _, scale, axes = np.linalg.svd(x - mean, full_matrices=False)
    scale, axes = scale[:components], axes[:components]
    axes = axes * np.sqrt(len(scale) * len(x)) / np.linalg.norm(scale)
    return lambda y: ((y - mean) @ axes.T).astype(np.float32)


def build_task(features: Features, components: int) -> Task:
    """The training pairs and the galleries, rotated by the statistics of training alone."""
    train = features.rows("train")
    of_train = np.flatnonzero(np.isin(features.owner, train))
    rotate_image = rotation(features.image[train], components)
    rotate_text = rotation(unit(features.caption[of_train]), components)
    owner = np.searchsorted(train, features.owner[of_train])
    data = TrainSet(
        image=jnp.asarray(rotate_image(features.image[train])),
        caption=jnp.asarray(rotate_text(unit(features.caption[of_train]))),
        first=np.searchsorted(owner, np.arange(len(train))),
        count=np.bincount(owner),
        group=jnp.asarray(features.group[train]),
    )

    def gallery(split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = features.gallery(split)
        return rotate_image(features.image[rows]), rotate_text(unit(features.joined[rows]))

    return Task(data, {s: [gallery(f"{s}/{name}") for name in GALLERIES] for s in STAGES})


@flax.struct.dataclass
class Visits:
    """Which examples and captions a step sees; the leading dimension of all may be steps."""

    step: Any  # [] int32
    example: Any  # [B] int32
    caption: Any  # [B] int32


def visits(seed: int, data: TrainSet, epochs: float, batch: int) -> Visits:
    """One shuffled epoch after the other; which examples does not depend on the batch size."""
    rng = np.random.default_rng(seed)
    examples = len(data.count)
    order = np.concatenate([rng.permutation(examples) for _ in range(int(np.ceil(epochs)))])
    steps = int(epochs * examples) // batch
    caption = data.first[order] + (rng.random(len(order)) * data.count[order]).astype(int)
    cut = [x[: steps * batch].reshape(steps, batch).astype(np.int32) for x in (order, caption)]
    return Visits(np.arange(steps, dtype=np.int32), *cut)


@flax.struct.dataclass
class BoundCritic:
    """`negatives.EmbeddingCritic`; its inputs are features ``[N, components]``."""

    params: Any
    module: DotCritic = flax.struct.field(pytree_node=False)

    def pairs(self, image: Any, text: Any) -> Any:
        return self.module.apply({"params": self.params}, image, text, method="pairs")

    def matrix(self, image: Any, text: Any) -> Any:
        return self.module.apply({"params": self.params}, image, text, method="matrix")

    def embed_image(self, features: Any) -> Any:
        return self.module.apply({"params": self.params}, features, method="project_image")

    def embed_text(self, features: Any) -> Any:
        return self.module.apply({"params": self.params}, features, method="project_text")


@flax.struct.dataclass
class State:
    params: Array  # [P] all parameters as one vector: one update instead of one per array
    moments: Any
    memory: Memory | None


@dataclass(frozen=True)
class Trainer:
    """The program of a recipe at one batch size; seeds and learning rates share it."""

    setting: Setting
    recipe: Recipe
    batch: int
    task: Task

    @property
    def module(self) -> DotCritic:
        return DotCritic(
            self.setting.width,
            self.setting.hidden,
            temperature=self.setting.temperature,
            bias=self.recipe.bias(self.batch),
        )

    @property
    def steps(self) -> int:
        return int(self.setting.epochs * len(self.task.train.count)) // self.batch

    def init(self, seed: int) -> Any:
        def every(module: DotCritic, image: Array, text: Array) -> Array:
            return module.pairs(module.project_image(image), module.project_text(text))

        example = self.task.train.image[:1], self.task.train.caption[:1]
        return self.module.init(jax.random.key(seed), *example, method=every)["params"]

    def pairs(self, critic: BoundCritic, visit: Visits, memory: Memory | None) -> Pairs:
        data = self.task.train
        image, caption = data.image[visit.example], data.caption[visit.caption]
        return Pairs(
            critic.embed_image(image),
            critic.embed_text(caption),
            data.group[visit.example][:, None],
            jnp.ones(visit.example.shape, bool),
            memory=memory,
            inputs=(image, caption),
        )

    def build(self) -> tuple[Callable[..., State], Callable[[int], State]]:
        """``step(key, rate, state, visit) -> state`` and ``start(seed) -> state``."""
        setting, negatives = self.setting, self.recipe.negatives_at(self.batch)
        mesh = build_mesh(jax.devices()[:1])
        objective = build_objective(self.recipe.objective)
        sampler = build_sampler(negatives, self.batch, mesh)
        params = self.init(0)
        _, unravel = ravel_pytree(params)
        decays = ravel_pytree(
            jax.tree.map(
                lambda path, x: jnp.full(x.shape, path.endswith("kernel"), x.dtype),
                path_tree(params),
                params,
            )
        )[0]
        adam = optax.scale_by_adam(setting.b1, setting.b2)
        warmup = max(1, round(setting.warmup * self.steps))
        schedule = build_schedule(OptimConfig(learning_rate=1.0, warmup_steps=warmup), self.steps)

        def step(key: Array, rate: Array, state: State, visit: Visits) -> State:
            draw_key, keep_key = jax.random.split(jax.random.fold_in(key, visit.step))

            def loss(flat: Array) -> tuple[Array, Pairs]:
                critic = BoundCritic(unravel(flat), self.module)
                pairs = self.pairs(critic, visit, state.memory)
                scores = sampler(draw_key, visit.step, pairs, critic).scores
                return objective(scores)[0], jax.lax.stop_gradient(pairs)

            gradient, pairs = jax.grad(loss, has_aux=True)(state.params)
            update, moments = adam.update(gradient, state.moments)
            update += setting.weight_decay * decays * state.params
            params = state.params - rate * schedule(visit.step) * update
            memory = None
            if uses_memory(negatives):
                memory = remember(negatives, self.batch, mesh, keep_key, visit.step, pairs)
            return State(params, moments, memory)

        def start(seed: int) -> State:
            params = self.init(seed)
            memory = None
            if uses_memory(negatives):
                rows = np.zeros(self.batch, np.int32)
                critic = BoundCritic(params, self.module)
                pairs = self.pairs(critic, Visits(0, rows, rows), None)
                memory = init_memory(negatives, self.batch, mesh, pairs)
            flat = ravel_pytree(params)[0]
            return State(flat, adam.init(flat), memory)

        return step, start

    def compile(self) -> Callable[[int, float], tuple[Any, float]]:
        """``(seed, learning rate) -> (trained parameters, seconds of the steps)``."""
        step, start = self.build()

        def run(key: Array, rate: Array, state: State, plan: Visits) -> Array:
            return jax.lax.scan(lambda s, v: (step(key, rate, s, v), None), state, plan)[0].params

        def inputs(seed: int, rate: float) -> tuple[Array, Array, State, Visits]:
            plan = visits(seed, self.task.train, self.setting.epochs, self.batch)
            return jax.random.key(seed), jnp.float32(rate), start(seed), plan

        _, unravel = ravel_pytree(self.init(0))
        compiled = jax.jit(run).lower(*inputs(0, 0.0)).compile()

        def train(seed: int, rate: float) -> tuple[Any, float]:
            given = jax.block_until_ready(inputs(seed, rate))
            begin = time.perf_counter()
            flat = jax.block_until_ready(compiled(*given))
            return unravel(flat), time.perf_counter() - begin

        return train

    def temporaries(self) -> int:
        """Bytes of temporaries of one compiled step."""
        step, start = self.build()
        plan = visits(0, self.task.train, 1, self.batch)
        visit = jax.tree.map(lambda x: jnp.asarray(x[0]), plan)
        key, rate = jax.random.key(0), jnp.float32(1e-3)
        compiled = jax.jit(step).lower(key, rate, start(0), visit).compile()
        analysis: Any = compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    def top_1(self, params: Any, stage: str) -> list[float]:
        """Mean of text → image and image → text R@1 on every gallery of a stage."""
        return [self._top_1(params, *gallery) for gallery in self.task.galleries[stage]]

    def _top_1(self, params: Any, image: np.ndarray, text: np.ndarray) -> float:
        apply = partial(self.module.apply, {"params": params})
        images = np.asarray(apply(image, method="project_image"))
        texts = np.asarray(apply(text, method="project_text"))
        found = retrieval_metrics(images @ texts.T, np.arange(len(images)))
        return (found["text_to_image_r1"] + found["image_to_text_r1"]) / 2
