"""Bounds on the mutual information I(image; text), as losses to minimise.

P is the joint distribution of pairs, Q the product of its marginals, r = dP/dQ, sp = softplus.
A bound is declared once, as a `Bound`: what is averaged over P, what over Q, and how.  `loss_of`
evaluates it over `Scores`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from clip_lite_jax.objectives.scores import Scores, masked_mean


@dataclass(frozen=True)
class Bound:
    """Maximises ``E_P[positive(T)] - reduce_Q[negative(T)]``; both terms act elementwise.

    `reduction` says what becomes of the negatives: their ``mean``; their ``sum`` for each pair and
    side, averaged over both; or ``logsumexp``, the log of the sum of exp for each pair and side,
    the pair itself included, averaged over both.
    """

    positive: Callable[[Array], Array]
    negative: Callable[[Array], Array]
    reduction: Literal["mean", "sum", "logsumexp"]


def loss_of(bound: Bound, scores: Scores) -> Array:
    """The loss [] of a bound over masked scores (`Scores.masked`), in nats."""
    pairs = jnp.broadcast_to(scores.pair_valid, scores.negative.shape[:2])  # [S, B]
    positive = masked_mean(bound.positive(scores.positive), scores.pair_valid)
    if bound.reduction == "logsumexp":
        terms = jnp.where(
            scores.valid, bound.negative(scores.negative) + scores.log_weight, -jnp.inf
        )
        own = jnp.broadcast_to(bound.negative(scores.positive)[None, :, None], (*pairs.shape, 1))
        rows = jax.nn.logsumexp(jnp.concatenate([own, terms], axis=-1), axis=-1)  # [S, B]
        return masked_mean(rows, pairs) - positive
    weighted = jnp.exp(scores.log_weight) * bound.negative(scores.negative)
    if bound.reduction == "sum":
        rows = jnp.sum(jnp.where(scores.valid, weighted, 0.0), axis=-1)  # [S, B]
        return masked_mean(rows, pairs) - positive
    return masked_mean(weighted, scores.valid) - positive


JSD = Bound(lambda t: -jax.nn.softplus(-t), jax.nn.softplus, "mean")
NWJ = Bound(lambda t: t, lambda t: jnp.exp(t - 1), "mean")
INFONCE = Bound(lambda t: t, lambda t: t, "logsumexp")
SIGMOID = Bound(lambda t: -jax.nn.softplus(-t), jax.nn.softplus, "sum")


def jsd(scores: Scores) -> tuple[Array, dict[str, Array]]:
    """Jensen–Shannon bound: minimises ``E_P[sp(-T)] + E_Q[sp(T)]``.

    The maximiser is T = log r, where the loss is 2 log 2 - 2 JSD(P || Q); a critic that knows
    nothing scores 2 log 2.  One negative per pair is enough: both terms are plain means.

    Source: CLIP-Lite (arXiv 2112.07133), eq. 5; f-GAN (arXiv 1606.00709), table 2.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    return loss_of(JSD, scores), score_metrics(scores)


def nwj(scores: Scores) -> tuple[Array, dict[str, Array]]:
    """NWJ bound: minimises ``-E_P[T] + E_Q[exp(T - 1)]``.

    The maximiser is T = 1 + log r, where the loss is minus the mutual information; for any critic
    minus the loss is, in expectation over plain negatives, a lower bound on it.  The exponential
    makes its variance grow with the scores.

    Source: Nguyen, Wainwright, Jordan (arXiv 0809.0853), eq. 7; Poole et al. (arXiv 1905.06922),
    eq. 4.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    return loss_of(NWJ, scores), score_metrics(scores)


def smile(scores: Scores, tau: float = 5.0) -> tuple[Array, dict[str, Array]]:
    """SMILE: the gradient of `jsd`, with a clipped Donsker–Varadhan estimate as its value.

    ``smile_estimate = E_P[T] - log E_Q[exp clip(T, -tau, tau)]`` is no bound; T = log r at the
    optimum, as for `jsd`.  The loss is minus the estimate in value and `jsd` in gradient.

    Source: Song and Ermon (arXiv 1910.06222), eq. 14 and section 5; trained by the Jensen–Shannon
    objective as in their experiments.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    clipped = jnp.where(
        scores.valid, jnp.clip(scores.negative, -tau, tau) + scores.log_weight, -jnp.inf
    )
    count = jnp.maximum(jnp.sum(scores.valid), 1)
    # One floor for the sum keeps a step without any negative finite.
    log_mean_exp = jnp.maximum(jax.nn.logsumexp(clipped), -tau) - jnp.log(count)
    estimate = masked_mean(scores.positive, scores.pair_valid) - log_mean_exp
    trained = loss_of(JSD, scores)
    loss = trained + jax.lax.stop_gradient(-estimate - trained)
    return loss, score_metrics(scores) | {"smile_estimate": estimate}


def infonce(scores: Scores) -> tuple[Array, dict[str, Array]]:
    """InfoNCE: minimises ``-T_ii + log(exp T_ii + sum_k exp T_ik)``, averaged over the sides.

    With both sides and all in-batch negatives this is CLIP's symmetric cross-entropy.  ``log K -
    loss``, K the candidates per row, bounds the mutual information from below and never exceeds
    log K.

    Source: CPC (arXiv 1807.03748), eq. 4; CLIP (arXiv 2103.00020), fig. 3.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    return loss_of(INFONCE, scores), score_metrics(scores)


def sigmoid(scores: Scores) -> tuple[Array, dict[str, Array]]:
    """Sigmoid loss: minimises ``(1/B) sum_i [sp(-T_ii) + sum_k sp(T_ik)]``, averaged over sides.

    With one side and all in-batch negatives this is SigLIP's loss.  It sums the negatives of a pair
    where `jsd` averages them, so its optimum is T = log r - log(negatives per pair): give the
    critic room with a negative bias (SigLIP starts at -10).

    Source: SigLIP (arXiv 2303.15343), section 3.2.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    return loss_of(SIGMOID, scores), score_metrics(scores)


def score_metrics(scores: Scores) -> dict[str, Array]:
    """What every objective logs: mean scores under P and Q, and how well T tells them apart.

    ``critic_accuracy`` is the balanced accuracy of the classifier T > 0, Bayes-optimal where T =
    log r.  ``ranking_accuracy`` asks only T(pair) > T(negative), so a constant added to T, which
    InfoNCE leaves free, does not matter.
    """
    pairs, negatives = scores.pair_valid, scores.valid
    accepted = masked_mean((scores.positive > 0).astype(jnp.float32), pairs)
    rejected = masked_mean((scores.negative < 0).astype(jnp.float32), negatives)
    ranked = (scores.positive[None, :, None] > scores.negative).astype(jnp.float32)
    return {
        "score_positive": masked_mean(scores.positive, pairs),
        "score_negative": masked_mean(scores.negative, negatives),
        "critic_accuracy": (accepted + rejected) / 2,
        "ranking_accuracy": masked_mean(ranked, negatives),
        "valid_negatives": jnp.mean(negatives.astype(jnp.float32)),
    }
