"""Optimizers: schedules, per-path learning rates and weight decay, Lookahead."""

import re
from typing import Any

import jax
import optax

from clip_lite_jax.config import OptimConfig
from clip_lite_jax.errors import ConfigError


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

    Raises:
      ConfigError: a pattern that is not a regular expression or that matches no parameter.
    """
    no_decay = _compile("optim.no_decay", config.no_decay)
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
    if config.lookahead_steps:
        return _lookahead(optimizer, config.lookahead_steps, config.lookahead_alpha)
    return optimizer


def path_tree(params: Any) -> Any:
    """A tree like `params` whose leaves are their paths, ``image_encoder/Conv_0/kernel``."""

    def name(path: tuple[Any, ...], _: Any) -> str:
        return "/".join(str(getattr(key, "key", key)) for key in path)

    return jax.tree_util.tree_map_with_path(name, params)


def _scale_by_path(multipliers: dict[str, float], params: Any) -> optax.GradientTransformation:
    patterns = {text: _compile("optim.multipliers", text) for text in multipliers}
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


def _compile(field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}={pattern!r} is not a regular expression: {error}") from error
