"""Optimizers: schedules, frozen parameters, learning rates and decay by path, Lookahead."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from clip_lite_jax.config import OptimConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.parameter_paths import compile_pattern, path_tree


def build_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine that reaches 0 at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / max(config.warmup_steps, 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
    )


def build_optimizer(config: OptimConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """The optimizer for `params`: clip, precondition, decay, per-path factors, schedule, Lookahead.

    What is never trained takes no part in any of it, and has no state.

    Raises:
      ConfigError: a pattern that is not a regular expression or that matches no parameter.
    """
    never = never_trained(config, steps, params)
    if not any(jax.tree.leaves(never)):
        return _build_optimizer(config, steps, params)
    names = path_tree(params)

    def trained(tree: Any) -> dict[str, Any]:
        leaves = zip(*map(jax.tree.leaves, (names, tree, never)), strict=True)
        return {name: leaf for name, leaf, still in leaves if not still}

    inner = _build_optimizer(config, steps, trained(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(trained(updates), state, trained(params))
        whole = jax.tree.map(lambda name, x: new.get(name, jnp.zeros_like(x)), names, updates)
        return whole, state

    return optax.GradientTransformation(lambda params: inner.init(trained(params)), update)


def never_trained(config: OptimConfig, steps: int, params: Any) -> Any:
    """A tree like `params`, True where `config.frozen` holds from the first step to the last.

    Raises:
      ConfigError: a pattern that is not a regular expression or that matches no parameter.
    """
    spans = _frozen_spans(config, params)
    return jax.tree.map(
        lambda path: any(a == 0 and (b is None or b >= steps) for a, b in spans[path]),
        path_tree(params),
    )


def frozen_towers(config: OptimConfig, steps: int, params: Any) -> tuple[str, ...]:
    """The towers, ``image`` and ``text``, none of whose parameters is ever trained."""
    never = never_trained(config, steps, params)
    return tuple(t for t in ("image", "text") if all(jax.tree.leaves(never[f"{t}_encoder"])))


def _build_optimizer(config: OptimConfig, steps: int, params: Any) -> optax.GradientTransformation:
    no_decay = compile_pattern("optim.no_decay", config.no_decay)
    decays = jax.tree.map(lambda path: not no_decay.search(path), path_tree(params))
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    decay = optax.add_decayed_weights(config.weight_decay, decays)
    if config.name == "adamw":
        parts += [optax.scale_by_adam(config.b1, config.b2), decay]
    else:
        parts += [decay, optax.trace(config.momentum)]
    if config.multipliers:
        parts.append(_scale_by_path(config.multipliers, params))
    parts.append(optax.scale_by_learning_rate(build_schedule(config, steps)))
    optimizer = optax.chain(*parts)
    spans = _frozen_spans(config, params, must_match=False)
    if any(spans.values()):
        optimizer = _with_rests(optimizer, jax.tree.map(spans.__getitem__, path_tree(params)))
    if config.lookahead_steps:
        return _lookahead(optimizer, config.lookahead_steps, config.lookahead_alpha)
    return optimizer


Span = tuple[int, int | None]
"""Steps from the first up to the second, or to the end."""


def _frozen_spans(
    config: OptimConfig, params: Any, must_match: bool = True
) -> dict[str, tuple[Span, ...]]:
    """When each parameter is not trained, by path."""
    patterns = {text: compile_pattern("optim.frozen", text) for text in config.frozen}
    paths = jax.tree.leaves(path_tree(params))
    for text, pattern in patterns.items():
        first, last = config.frozen[text]
        if last is not None and last <= first:
            raise ConfigError(f"optim.frozen: {text!r} is frozen from {first} to {last}: no step")
        if must_match and not any(pattern.search(path) for path in paths):
            some = ", ".join(paths[:4])
            raise ConfigError(f"optim.frozen: {text!r} matches no parameter; some are {some}")
    return {
        path: tuple(config.frozen[text] for text, p in patterns.items() if p.search(path))
        for path in paths
    }


def _with_rests(inner: optax.GradientTransformation, spans: Any) -> optax.GradientTransformation:
    """Parameters rest during their `spans` (a tree of tuples of `Span`).

    Their gradients do not count towards the clipped norm, and neither decay nor the momentum of
    earlier steps moves them.
    """

    def moving(step: Array, of: tuple[Span, ...]) -> Array:
        rests = [(step >= a) & (step < (b if b is not None else jnp.inf)) for a, b in of]
        return ~jnp.any(jnp.array([False, *rests]))

    def masked(tree: Any, step: Array) -> Any:
        return jax.tree.map(lambda x, of: jnp.where(moving(step, of), x, 0.0), tree, spans)

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step, inner_state = state
        updates, inner_state = inner.update(masked(updates, step), inner_state, params)
        return masked(updates, step), (step + 1, inner_state)

    return optax.GradientTransformation(init, update)


def _scale_by_path(multipliers: dict[str, float], params: Any) -> optax.GradientTransformation:
    patterns = {text: compile_pattern("optim.multipliers", text) for text in multipliers}
    paths = path_tree(params)
    for text, pattern in patterns.items():
        if not any(pattern.search(path) for path in jax.tree.leaves(paths)):
            some = ", ".join(jax.tree.leaves(paths)[:4])
            raise ConfigError(f"optim.multipliers: {text!r} matches no parameter; some are {some}")

    def factor(path: str) -> float:
        found = (multipliers[text] for text, p in patterns.items() if p.search(path))
        return next(found, 1.0)

    factors = jax.tree.map(factor, paths)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))


def _lookahead(
    inner: optax.GradientTransformation, steps: int, alpha: float
) -> optax.GradientTransformation:
    """`optax.lookahead` over ordinary parameters: the slow copy lives in the optimizer's state."""
    lookahead = optax.lookahead(inner, steps, alpha)

    def init(params: Any) -> Any:
        return lookahead.init(optax.LookaheadParams(fast=params, slow=params)), params

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        inner_state, slow = state
        both = optax.LookaheadParams(fast=params, slow=slow)
        updates, inner_state = lookahead.update(updates, inner_state, both)
        return updates.fast, (inner_state, optax.apply_updates(slow, updates.slow))

    return optax.GradientTransformation(init, update)
