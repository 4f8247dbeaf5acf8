"""One learning step of any critic, objective and negatives, on features, without encoders.

`test_combinations` runs some in which every name occurs, ``long/test_every_combination`` all.
"""

import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_lite_jax.combinations import check_combination
from clip_lite_jax.config import NegativesConfig, ObjectiveConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models import CRITICS
from clip_lite_jax.negatives import (
    NEGATIVES,
    Pairs,
    build_sampler,
    init_memory,
    remember,
    uses_memory,
    uses_momentum_encoder,
)
from clip_lite_jax.objectives import OBJECTIVES, STREAMED, build_objective
from clip_lite_jax.sharding import build_mesh, put_batch

Combination = tuple[str, str, str]
"""Objective, critic and negatives, by name."""

BATCH, STEPS = 64, 2
KINDS = {name: NegativesConfig(name=name, sides="both", lanes=8, memory=16) for name in NEGATIVES}
KINDS |= {
    f"{name}, {pool}": NegativesConfig(name=name, sides="both", lanes=8, memory=16, pool=pool)
    for name, pool in (("hard", "block"), ("hard", "memory"), ("importance", "block"))
}
KINDS |= {
    f"all, {way}": NegativesConfig(name="all", sides="both", implementation=way, chunk=3)
    for way in ("gather", "ring")
}
# The published mixes are these across modalities.
CRITIC_NAMES = [name for name in CRITICS if name not in ("condot", "dotcon")]


def is_allowed(combination: Combination) -> bool:
    objective, _, kind = combination
    try:
        check_combination(ObjectiveConfig(name=objective), KINDS[kind], BATCH)
    except ConfigError:
        return False
    return True


def every_combination() -> list[Combination]:
    return [c for c in itertools.product(OBJECTIVES, CRITIC_NAMES, KINDS) if is_allowed(c)]


def covering_set() -> list[Combination]:
    """Combinations in which every name occurs, taken greedily.

    Of each name in `NEGATIVES` its plain kind: `test_whole` and `test_negatives` hold the others
    against it.
    """
    left = [c for c in every_combination() if c[2] in NEGATIVES]
    open_names = {place for c in left for place in enumerate(c)}
    used: Counter[tuple[int, str]] = Counter()
    chosen = []
    while open_names:
        worth = [
            (len(open_names & set(enumerate(c))), -sum(used[place] for place in enumerate(c)))
            for c in left
        ]
        chosen.append(left[worth.index(max(worth))])
        used.update(enumerate(chosen[-1]))
        open_names -= set(enumerate(chosen[-1]))
    return chosen


def learn(combination: Combination, devices: int) -> Any:
    """Of a few steps of gradient descent, on the host.

    ``((parameters, memory), (losses, gradients))``, the latter by step.
    """
    objective, critic_name, kind = combination
    config, mesh = KINDS[kind], build_mesh(jax.devices()[:devices])
    sampler = build_sampler(config, BATCH, mesh, STREAMED.get(objective))
    fn = build_objective(objective)
    sizes = {"hidden": 6} | ({} if critic_name == "concat" else {"width": 4})
    module = CRITICS[critic_name](**sizes, dtype=jnp.float64, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(BATCH, width)) for width in (5, 7))
    group = rng.integers(0, 30, (BATCH, 2), np.int32)
    valid = np.arange(BATCH) != 3

    def project(variables: Any, image: Any, text: Any) -> tuple[Any, Any]:
        return (
            module.apply(variables, image, method="project_image"),
            module.apply(variables, text, method="project_text"),
        )

    def scores(critic: Any, image: Any, text: Any) -> Any:
        return critic.pairs(critic.project_image(image), critic.project_text(text))

    def pairs_of(variables: Any, image: Any, text: Any, memory: Any) -> Pairs:
        embedded = project(variables, image, text)
        keys: tuple[Any, Any] = (None, None)
        if uses_momentum_encoder(config):
            slow = jax.tree.map(lambda x: 0.9 * x, variables)
            keys = jax.lax.stop_gradient(project(slow, image, text))
        return Pairs(*embedded, group, valid, None, *keys, memory)

    def loss(variables: Any, step: Any, memory: Any, image: Any, text: Any) -> Any:
        pairs = pairs_of(variables, image, text, memory)
        drawn = sampler(jax.random.key(step), step, pairs, Critic(variables, module))
        return fn(drawn.scores)[0], pairs

    def init(image: Any, text: Any) -> Any:
        variables = module.init(jax.random.key(0), image, text, method=scores)
        if not uses_memory(config):
            return variables, None
        pairs = pairs_of(variables, image, text, None)
        return variables, init_memory(config, BATCH, mesh, pairs)

    @jax.jit  # one program: to compile is what takes the time
    def steps(image: Any, text: Any) -> Any:
        def learn_once(state: Any, step: Any) -> Any:
            variables, memory = state
            (value, pairs), grads = jax.value_and_grad(loss, has_aux=True)(
                variables, step, memory, image, text
            )
            if memory is not None:
                memory = remember(config, BATCH, mesh, jax.random.key(step), step, pairs)
            new = jax.tree.map(lambda p, g: p - 0.1 * g, variables, grads)
            return (new, memory), (value, grads)

        return jax.lax.scan(learn_once, init(image, text), jnp.arange(STEPS))

    return jax.device_get(steps(*put_batch(mesh, (image, text))))


@jax.tree_util.register_pytree_node_class
class Critic:
    """A critic module with its variables: `negatives.Critic`."""

    def __init__(self, variables: Any, module: Any) -> None:
        self.variables, self.module = variables, module

    def pairs(self, image: Any, text: Any) -> Any:
        return self.module.apply(self.variables, image, text, method="pairs")

    def matrix(self, image: Any, text: Any) -> Any:
        return self.module.apply(self.variables, image, text, method="matrix")

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.variables,), self.module

    @classmethod
    def tree_unflatten(cls, module: Any, variables: tuple[Any]) -> "Critic":
        return cls(variables[0], module)


def assert_devices_make_no_difference(combination: Combination) -> None:
    with jax.enable_x64(True):
        one, eight = (learn(combination, devices) for devices in (1, 8))
    losses, grads = one[1]
    assert np.isfinite(losses).all()
    assert any(np.any(leaf[-1]) for leaf in jax.tree.leaves(grads))

    def compare(path: Any, a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, one, eight)
