"""Critics trained to estimate mutual information, and what is read off them.

Names of read-offs, all in nats and of T a critic's score, P the pairs and Q their shufflings:
``score_positive`` E_P[T], ``calibrated`` E_P[scale · T + shift], ``nwj_shifted`` NWJ at T + 1,
``jsd_lower_bound`` `certified_bound`, ``smile``, ``nwj``, ``dv``, ``infonce`` with `GROUP`
candidates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy.special import logsumexp

from clip_lite_jax.evaluators.information import (
    calibrate,
    certified_bound,
    infonce_read_offs,
    read_offs,
)
from clip_lite_jax.models.critics import ConcatCritic, SeparableCritic
from clip_lite_jax.objectives import Scores, build_objective

GROUP = 64
"""Pairs of a training batch, and candidates of InfoNCE whenever it is read."""

BLOCK = 256
"""Held-out pairs are scored against all others of their block of this many."""

TAU = 5.0
"""Where SMILE clips the scores of shuffled pairs."""

READ_OFFS = (
    "score_positive",
    "calibrated",
    "nwj_shifted",
    "jsd_lower_bound",
    "jsd_loss",
    "jsd_loss_error",
    "smile",
    "nwj",
    "dv",
    "infonce",
)

Draw = Callable[[Array, int, Any], tuple[Array, Array]]
"""``(key, count, source) -> x [count, dx], y [count, dy]``."""

CRITICS: dict[str, nn.Module] = {
    "separable": SeparableCritic(width=32, hidden=256, layers=2),
    "concat": ConcatCritic(hidden=128, layers=1),
}


@dataclass(frozen=True)
class Training:
    """How a critic is trained; Adam, the learning rate falls by half a cosine to a fiftieth."""

    objective: str
    negatives: Literal["one", "all"]  # per pair: one of the batch, or all others of it
    chosen_by: str  # read-off of validation pairs that picks the step, where there are some
    options: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 1e-3
    max_norm: float = math.inf  # of the gradient
    moving_average: bool = False  # MINE's: the objective is handed its log_normalizer


TRAININGS = {
    "jsd_one": Training("jsd", "one", "jsd_lower_bound"),
    "jsd_all": Training("jsd", "all", "jsd_lower_bound"),
    "nwj": Training("nwj", "all", "nwj", max_norm=1.0),
    "mine": Training("dv", "all", "dv", {"decay": 0.9}, moving_average=True),
    "dv": Training("dv", "all", "dv"),
    "infonce": Training("infonce", "all", "infonce"),
}


@flax.struct.dataclass
class State:
    params: Any
    opt_state: Any
    log_normalizer: Array  # []


@dataclass(frozen=True)
class Trainer:
    init: Callable[[Array, int, int], State]  # (key, dx, dy)
    run: Callable[[State, Array, Any], tuple[State, dict[str, Array]]]  # (state, key, source)


def make_trainer(
    critic: nn.Module, training: Training, draw: Draw, steps: int, period: int
) -> Trainer:
    """`run` takes `steps` steps at once and returns the read-offs of each batch, ``[steps]``.

    The learning rate starts anew every `period` steps.
    """
    objective = build_objective(training.objective, **training.options)
    decay = optax.cosine_decay_schedule(training.learning_rate, period, alpha=0.02)
    optimizer = optax.chain(
        optax.clip_by_global_norm(training.max_norm), optax.adam(lambda n: decay(n % period))
    )

    def loss_of(params: Any, state: State, key: Array, source: Any) -> tuple[Array, Any]:
        key_pairs, key_negatives = jax.random.split(key)
        x, y = draw(key_pairs, GROUP, source)
        scores = batch_scores(critic, params, x, y, training.negatives, key_negatives)
        if training.moving_average:
            scores = scores.replace(log_normalizer=state.log_normalizer)  # type: ignore[attr-defined]
        loss, metrics = objective(scores)
        log_normalizer = metrics.get("dv_log_normalizer", state.log_normalizer)
        return loss, (log_normalizer, batch_read_offs(training.objective, scores, loss))

    def step(state: State, key: Array, source: Any) -> tuple[State, dict[str, Array]]:
        gradient_of = jax.grad(loss_of, has_aux=True)
        gradient, (log_normalizer, values) = gradient_of(state.params, state, key, source)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state, log_normalizer), values

    @jax.jit
    def run(state: State, key: Array, source: Any) -> tuple[State, dict[str, Array]]:
        keys = jax.random.split(key, steps)
        return jax.lax.scan(lambda carry, one: step(carry, one, source), state, keys)

    def init(key: Array, dx: int, dy: int) -> State:
        params = critic.init(key, jnp.zeros((1, dx)), jnp.zeros((1, dy)), method=_score)
        return State(params, optimizer.init(params), jnp.array(-jnp.inf))

    return Trainer(init, run)


def _score(critic: Any, x: Array, y: Array) -> Array:
    return critic.pairs(critic.project_image(x), critic.project_text(y))


def batch_scores(
    critic: Any,
    params: Any,
    x: Array,
    y: Array,
    negatives: Literal["one", "all"],
    key: Array,
) -> Scores:
    """Scores of pairs ``[B, dx], [B, dy]``; one negative is the y of a random other row."""
    count = len(x)
    image = critic.apply(params, x, method="project_image")
    text = critic.apply(params, y, method="project_text")
    if negatives == "one":
        others = jnp.roll(text, jax.random.randint(key, (), 1, count), axis=0)
        positive = critic.apply(params, image, text, method="pairs")
        negative = critic.apply(params, image, others, method="pairs")[None, :, None]
        valid = jnp.ones(negative.shape, bool)
    else:
        matrix = critic.apply(params, image, text, method="matrix")
        positive, negative = jnp.diagonal(matrix), jnp.stack([matrix, matrix.T])
        valid = jnp.broadcast_to(~jnp.eye(count, dtype=bool), negative.shape)
    return Scores(positive, negative, valid, jnp.zeros(negative.shape))


def batch_read_offs(objective: str, scores: Scores, loss: Array) -> dict[str, Array]:
    """What the literature reads off a training batch, each []."""
    if objective == "infonce":
        return {"infonce": math.log(scores.negative.shape[-1]) - loss}
    if objective != "jsd":
        return {objective: -loss}
    shifted = scores.replace(positive=scores.positive + 1, negative=scores.negative + 1)  # type: ignore[attr-defined]
    return {
        "score_positive": jnp.mean(scores.positive),
        "nwj_shifted": -build_objective("nwj")(shifted)[0],
        "smile": -build_objective("smile", tau=TAU)(scores)[0],
        "jsd_loss": loss,
    }


def make_held_out(critic: Any) -> Callable[[Any, Array, Array], np.ndarray]:
    """``(params, x [N, dx], y [N, dy])`` → scores ``[N // BLOCK, BLOCK, BLOCK]``."""

    @jax.jit
    def score(params: Any, x: Array, y: Array) -> Array:
        def block(pair: tuple[Array, Array]) -> Array:
            image = critic.apply(params, pair[0], method="project_image")
            text = critic.apply(params, pair[1], method="project_text")
            return critic.apply(params, image, text, method="matrix")

        count = len(x) // BLOCK
        blocks = [v[: count * BLOCK].reshape(count, BLOCK, -1) for v in (x, y)]
        return jax.lax.map(block, tuple(blocks))

    return lambda params, x, y: np.asarray(score(params, x, y))


def held_out_read_offs(scores: np.ndarray, names: Sequence[str] = READ_OFFS) -> dict[str, float]:
    """Read-offs of scores ``[G, N, N]`` of G blocks of held-out pairs; nan for a broken critic.

    ``jsd_loss_error`` is the standard error of ``jsd_loss``.
    """
    if not np.all(np.isfinite(scores)):
        return dict.fromkeys(names, math.nan)
    positive, negative = _pairs_and_others(scores)
    score = float(np.mean(positive))

    def log_mean_exp(values: np.ndarray) -> float:
        return float(logsumexp(values) - math.log(len(values)))

    @cache
    def base() -> dict[str, float]:
        return read_offs(positive, negative)

    def normalizer() -> float:
        value = log_mean_exp(negative) - 1
        return math.exp(value) if value < 700 else math.inf

    read = {
        "score_positive": lambda: score,
        "calibrated": lambda: calibrated_score(scores),
        "nwj_shifted": lambda: base()["nwj_lower_bound"],
        "jsd_lower_bound": lambda: base()["jsd_lower_bound"],
        "jsd_loss": lambda: base()["jsd_loss"],
        "jsd_loss_error": lambda: jsd_loss_error(scores),
        "smile": lambda: score - log_mean_exp(np.clip(negative, -TAU, TAU)),
        "nwj": lambda: score - normalizer(),
        "dv": lambda: score - log_mean_exp(negative),
        "infonce": lambda: _infonce(scores),
    }
    return {name: read[name]() for name in names}


def _infonce(scores: np.ndarray) -> float:
    size, parts = len(scores), scores.shape[1] // GROUP
    groups = scores.reshape(size, parts, GROUP, parts, GROUP)
    own = [groups[g, i, :, i] for g in range(size) for i in range(parts)]
    return float(np.mean([infonce_read_offs(part)["infonce_lower_bound"] for part in own]))


def calibrated_score(scores: np.ndarray) -> float:
    """E_P[scale · T + shift]: fitted on one half of the blocks ``[G, N, N]``, read on the other.

    Both ways, averaged.
    """
    halves = scores[::2], scores[1::2]
    values = []
    for fit, read in (halves, halves[::-1]):
        positive, negative = _pairs_and_others(fit)
        scale, shift = calibrate(positive, negative[::4])  # more would not change it
        values.append(scale * float(np.mean(_pairs_and_others(read)[0])) + shift)
    return float(np.mean(values))


def jsd_loss_error(scores: np.ndarray) -> float:
    """Standard error of the JSD loss of scores ``[G, N, N]``, shuffled within blocks.

    The loss is a sum over pairs and over all their pairings; the deviation of what each pair adds
    to it counts the pairings of its x and of its y.  Source: Hoeffding (1948), section 7.
    """
    size = scores.shape[1]
    own = np.diagonal(scores, axis1=1, axis2=2)
    push = np.logaddexp(0, scores)
    rows, columns = push.sum(axis=2), push.sum(axis=1)
    own_push = np.diagonal(push, axis1=1, axis2=2)
    added = np.logaddexp(0, -own) + (rows + columns - 2 * own_push) / (size - 1)
    return float(np.std(added, ddof=1) / math.sqrt(added.size))


def certified_excess(values: dict[str, float], information: float, errors: float = 3.0) -> float:
    """By how much the certified bound exceeds the truth beyond `errors` standard errors, in nats.

    Not above 0 unless the bound is broken.
    """
    loss = values["jsd_loss"] + errors * values["jsd_loss_error"]
    return certified_bound(loss) - information


def _pairs_and_others(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``[G, N, N]`` of the pairs ``[G N]`` and of all other pairings in their blocks."""
    others = ~np.eye(scores.shape[1], dtype=bool)
    positive = np.diagonal(scores, axis1=1, axis2=2).ravel()
    return positive.astype(np.float64), scores[:, others].ravel().astype(np.float64)
