"""Linear classifiers on features: by SGD as VirTex trains them, by L-BFGS as CLIP does."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from clip_lite_jax.errors import DataError

Classifier = Callable[[np.ndarray], np.ndarray]
"""Features ``[N, F]`` → scores ``[N, C]``."""

STEPS = 32
"""Of SGD in one call: their features are all that must fit on the device."""

PER_DECADE = 8
FIRST = (-6, -4, -2, 0, 2, 4, 6)
"""Decimal logarithms of the strengths of regularisation that are tried first."""


def fit_sgd(
    features: np.ndarray,
    codes: np.ndarray,
    classes: int,
    *,
    learning_rate: float = 0.3,
    momentum: float = 0.9,
    batch_size: int = 256,
    epochs: int = 100,
    seed: int = 0,
) -> Classifier:
    """Softmax regression on features ``[N, F]``, or on V views of each, ``[N, V, F]``, of
    which one is drawn at every epoch.

    SGD with momentum, no weight decay, cosine schedule to 0 without warm-up, weights drawn from
    N(0, 0.01²), biases 0; an epoch ends with a smaller batch, and is shuffled by seed and number.
    Source: VirTex, ``scripts/clf_linear.py`` and ``configs/downstream/imagenet_clf.yaml``, which
    CLIP-Lite's ``linear_clf.py`` repeats: there 0.3, 0.9, 256 and 100.

    Raises:
      DataError: it diverged.
    """
    views = features if features.ndim == 3 else features[:, None]
    size = min(batch_size, len(views))
    per_epoch = -(-len(views) // size)
    schedule = optax.cosine_decay_schedule(learning_rate, per_epoch * epochs)
    optimizer = optax.sgd(schedule, momentum)
    weight = 0.01 * np.random.default_rng(seed).standard_normal((views.shape[2], classes))
    params = {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.zeros(classes)}
    state = (params, optimizer.init(params))
    run = jax.jit(partial(_sgd_steps, optimizer), donate_argnums=0)
    steps = min(STEPS, per_epoch)
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        for rows, real in _batches(rng.permutation(len(views)), size, steps):
            chosen = rng.integers(views.shape[1], size=rows.shape)
            state = run(state, views[rows, chosen], codes[rows], real)
    params = jax.tree.map(np.asarray, state[0])
    if not np.isfinite(params["weight"]).all():
        raise DataError(
            f"the linear probe diverged at learning_rate={learning_rate}: features of root mean "
            f"square {np.sqrt(np.mean(np.square(views, dtype=np.float64))):.3g} need a smaller one"
        )
    return lambda some: some @ params["weight"] + params["bias"]


def _batches(order: np.ndarray, size: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`steps` batches at once: rows ``[S, B]`` and whether they are real; padding is not."""
    for start in range(0, len(order), steps * size):
        rows = order[start : start + steps * size]
        padded = np.pad(rows, (0, steps * size - len(rows)))
        real = np.arange(steps * size) < len(rows)
        yield padded.reshape(steps, size), real.reshape(steps, size)


def _sgd_steps(
    optimizer: optax.GradientTransformation, state: Any, rows: Array, codes: Array, real: Array
) -> Any:
    def loss_of(params: Any, x: Array, y: Array, real: Array) -> Array:
        logits = x @ params["weight"] + params["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.sum(losses * real) / jnp.sum(real)

    def step(state: Any, batch: Any) -> tuple[Any, None]:
        def taken(state: Any) -> Any:
            params, memory = state
            updates, memory = optimizer.update(jax.grad(loss_of)(params, *batch), memory, params)
            return optax.apply_updates(params, updates), memory

        # A batch of padding alone is no step: the schedule counts those of an epoch.
        return lax.cond(jnp.any(batch[2]), taken, lambda state: state, state), None

    return lax.scan(step, state, (rows, codes, real))[0]


def fit_lbfgs(
    features: np.ndarray, codes: np.ndarray, classes: int, c: float, max_iter: int = 1000
) -> tuple[Classifier, bool]:
    """Logistic regression with penalty ``|w|² / (2 c)`` beside the summed loss; and whether it
    converged within `max_iter` iterations.

    A class without examples is never chosen.  Source: CLIP (arXiv 2103.00020), appendix A.3, and
    its README, "Linear-probe evaluation"; scikit-learn's L-BFGS.
    """
    there = np.unique(codes)
    if len(there) < 2:
        raise DataError(f"a linear probe needs two classes to train on, not {len(there)}")
    model = LogisticRegression(C=c, max_iter=max_iter, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, codes)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)

    def classify(some: np.ndarray) -> np.ndarray:
        scores = model.decision_function(some)
        if len(there) == 2:
            scores = np.stack([-scores, scores], axis=1)
        found = np.full((len(some), classes), -np.inf)
        found[:, there] = scores
        return found

    return classify, converged


def sweep(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The best C of 96 steps between 1e-6 and 1e6, and the score of each that was tried.

    The first seven stand two decades apart; the distance to both sides of the best is then halved
    until it is an eighth of a decade.  Of equals the smallest C, the most regularised, is taken.
    Source: CLIP (arXiv 2103.00020), appendix A.3, "parametric binary search".
    """
    found: dict[int, float] = {}

    def tried(step: int) -> None:
        if -6 * PER_DECADE <= step <= 6 * PER_DECADE and step not in found:
            found[step] = score(10.0 ** (step / PER_DECADE))

    def best() -> int:
        return min(found, key=lambda step: (-found[step], step))

    for decade in FIRST:
        tried(decade * PER_DECADE)
    distance = PER_DECADE
    while distance:
        middle = best()
        tried(middle - distance)
        tried(middle + distance)
        distance //= 2
    by_c = {10.0 ** (step / PER_DECADE): value for step, value in sorted(found.items())}
    return 10.0 ** (best() / PER_DECADE), by_c
