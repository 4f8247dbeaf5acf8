"""Eight devices compute what one computes: loss, gradients, parameters.

Other negatives than on one device would show in all of them; `test_negatives` compares the draws.
Whole training steps, encoders included; `test_combinations` has every couple of objective, critic
and negatives without them.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_model

from clip_lite_jax.batch import Batch
from clip_lite_jax.config import (
    CriticConfig,
    MeshConfig,
    NegativesConfig,
    ObjectiveConfig,
    OptimConfig,
)
from clip_lite_jax.learner import build_learner
from clip_lite_jax.models import build_model
from clip_lite_jax.optim import build_optimizer
from clip_lite_jax.sharding import build_mesh, put_batch
from clip_lite_jax.train_state import init_state
from clip_lite_jax.train_step import make_train_step

BATCH, STEPS = 64, 3


@dataclass(frozen=True)
class Case:
    negatives: NegativesConfig
    objective: str = "jsd"
    critic: str = "dot"
    terms: dict[str, Any] = field(default_factory=dict)
    parts: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # of the critic
    text: dict[str, Any] = field(default_factory=dict)  # options of its encoder

    @property
    def objective_config(self) -> ObjectiveConfig:
        return ObjectiveConfig(name=self.objective)

    @property
    def critic_config(self) -> CriticConfig:
        sizes = {"hidden": 16} | ({} if self.critic.startswith("con") else {"width": 16})
        mild = {"temperature": 0.5} if self.critic.startswith("dot") else {}
        return CriticConfig(name=self.critic, options=sizes | mild | self.options)


def negatives(name: str, **changes: Any) -> NegativesConfig:
    return NegativesConfig(name=name, sides="both", memory=32, **changes)


TEXT = {"width": 16, "layers": 1, "heads": 2}
PUBLISHED = {"norm": "batch", "noisy_identity": True}
TERMS = {"visual_weight": 1.0, "textual_weight": 1.0, "prior_weight": 0.1}
CASES = {
    "all": Case(negatives("all", implementation="ring", chunk=3), "jsd", "separable"),
    "hard": Case(negatives("hard", pool="block"), "jsd", "concat"),
    "importance": Case(negatives("importance")),
    "memory": Case(negatives("hard", pool="memory"), "smile", "bilinear"),
    "reembed": Case(
        negatives("importance", pool="memory", reembed=True, proposal="exp"), "infonce"
    ),
    "queue": Case(negatives("queue"), "infonce"),
    "published": Case(negatives("roll"), "nwj", options=PUBLISHED),
    "terms": Case(negatives("shuffle"), "dv", "dotcon", terms=TERMS),
    "one pass": Case(negatives("hard", pool="block"), parts=2),
    "scan": Case(negatives("shuffle"), text={"layers": 3, "scan": True, "remat": "full"}),
    "two passes": Case(negatives("all", implementation="ring"), "infonce", parts=2),
}
ADAMW = OptimConfig(name="adamw", learning_rate=1e-3, warmup_steps=0, ema_decay=0.9)
SGD = OptimConfig(name="sgd", learning_rate=1e-2, warmup_steps=0, lookahead_steps=2)


def make_batch(step: int, second: bool = False) -> Batch:
    rng = np.random.default_rng(step)
    batch = Batch(
        image=rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
        tokens=rng.integers(0, 40, (BATCH, 8), np.int32),
        mask=np.arange(8) < rng.integers(1, 9, (BATCH, 1)),
        group=rng.integers(0, 60, (BATCH, 2), np.int32),
        valid=rng.random(BATCH) < 0.95,
        index=np.arange(BATCH, dtype=np.int32),
    )
    return replace(batch, second=make_batch(step + 1000).inputs) if second else batch


def train(
    devices: int,
    config: Case,
    optim: OptimConfig,
    dtype: str,
    spread: MeshConfig | None = None,
) -> dict[str, Any]:
    """A few steps; what they computed, on the host."""
    mesh = build_mesh(jax.devices()[:devices], spread)
    # A mild temperature keeps gradients of order one, so that 1e-6 means something in float32.
    settings = replace(tiny_model(dtype, temperature=0.5), critic=config.critic_config)
    settings = replace(settings, text=replace(settings.text, options=TEXT | config.text))
    objective = replace(config.objective_config, **config.terms)
    model = build_model(settings, 16, 40, 8, objective)
    learner = build_learner(model, objective, config.negatives, BATCH, mesh, 0, config.parts)
    state, optimizer = init_state(
        model,
        lambda p: optax.chain(gradients_kept(), build_optimizer(optim, 10, p)),
        0,
        optim.ema_decay > 0,
        mesh,
        config.negatives,
        BATCH,
        mesh_config=spread,
    )
    step = make_train_step(learner, optimizer, mesh, optim.ema_decay, spread)

    def batch(number: int) -> Batch:
        made = make_batch(number, second=bool(config.terms))
        if config.parts > 1:
            made = jax.tree.map(lambda x: x.reshape(config.parts, -1, *x.shape[1:]), made)
        return put_batch(mesh, made, config.parts > 1)

    losses, grads, types = [], [], jax.tree.map(jax.typeof, state)
    for number in range(STEPS):
        state, metrics = step(state, batch(number))
        # Weak types among them: a state of another type would have the step compiled again.
        assert jax.tree.map(jax.typeof, state) == types
        losses.append(metrics["loss"])
        grads.append(jax.device_get(state.opt_state[0]))
    floats = {"losses": losses, "grads": grads, "params": state.params, "ema": state.ema}
    kept = {} if state.target is None else {"target": state.target}
    return dict(jax.device_get(floats | kept))


def gradients_kept() -> optax.GradientTransformation:
    """The state is the gradient, and so comes out of the step: no other program is compiled."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return grads, grads

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def assert_equal(
    one: dict[str, Any], eight: dict[str, Any], tolerance: float, what: str = ""
) -> None:
    def compare(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=f"{path} {what}")

    jax.tree_util.tree_map_with_path(compare, one, eight)


PARTS = MeshConfig(fsdp=8, min_size=1)
SPREAD = {
    "importance": [PARTS],
    "queue": [PARTS],
    "terms": [PARTS],
    "one pass": [PARTS],
    "two passes": [PARTS],
    "scan": [PARTS, MeshConfig(replica=2, fsdp=2, min_size=1)],
}
"""Meshes besides: the parameters in eight parts, and two replicas of two parts."""


LONG = ("terms", "scan", "reembed", "two passes")
"""Cases that take the longest to compile: tests/long/test_parity_full.py."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
def test_float64_adamw(name: str) -> None:
    assert_devices_make_no_difference(name)


def assert_devices_make_no_difference(name: str) -> None:
    with jax.enable_x64(True):
        one = train(1, CASES[name], ADAMW, "float64")
        assert one["losses"][0].dtype == np.float64
        for spread in (None, *SPREAD.get(name, ())):
            eight = train(8, CASES[name], ADAMW, "float64", spread)
            assert_equal(one, eight, 1e-9, str(spread))


@pytest.mark.parametrize("name", ["all", "importance", "one pass"])
def test_float32_sgd(name: str) -> None:
    one, eight = (train(n, CASES[name], SGD, "float32") for n in (1, 8))
    assert_equal(one, eight, 1e-6)
