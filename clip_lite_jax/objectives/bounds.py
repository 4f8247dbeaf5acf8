"""Bounds on the mutual information I(image; text), as losses to minimise.

P is the joint distribution of pairs, Q the product of its marginals, r = dP/dQ, sp = softplus.
A bound is declared once, as a `Bound`: what is averaged over P, what over Q, and how.  `loss_of`
evaluates it over `Scores`, or over `RowScores` that a streaming sampler has summed up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from clip_lite_jax.objectives.scores import RowScores, Scores, Sums

Reduction = Literal["mean", "sum", "logsumexp"]
Result = tuple[Array, dict[str, Array]]


@dataclass(frozen=True)
class Bound:
    """Maximises ``E_P[positive(T)] - reduce_Q[negative(T)]``; both terms act elementwise.

    `reduction` says what becomes of the negatives: their ``mean``; their ``sum`` for each pair and
    side, averaged over both; or ``logsumexp``, the log of the sum of exp for each pair and side,
    the pair itself included, averaged over both.
    """

    name: str
    positive: Callable[[Array], Array]
    negative: Callable[[Array], Array]
    reduction: Reduction


def _identity(t: Array) -> Array:
    return t


def _minus_softplus_minus(t: Array) -> Array:
    return -jax.nn.softplus(-t)


def _exp_minus_one(t: Array) -> Array:
    return jnp.exp(t - 1)


JSD = Bound("jsd", _minus_softplus_minus, jax.nn.softplus, "mean")
NWJ = Bound("nwj", _identity, _exp_minus_one, "mean")
INFONCE = Bound("infonce", _identity, _identity, "logsumexp")
SIGMOID = Bound("sigmoid", _minus_softplus_minus, jax.nn.softplus, "sum")


def sum_negatives(
    bound: Bound,
    negative: Array,
    valid: Array,
    positive: Array,
    log_weight: Array | float = 0.0,
    times: Array | float = 1.0,
) -> Sums:
    """Sums over the last dimension of scores ``[..., B, K]`` of the negatives of pairs.

    `positive` ``[..., B]`` is T of the pairs; `log_weight` and `times` are as in `Scores`.  Only
    `Sums.reduced` has a gradient.
    """
    terms = bound.negative(negative)
    if bound.reduction == "logsumexp":
        terms = jnp.where(valid, terms + log_weight + jnp.log(times), -jnp.inf)
        reduced = jax.nn.logsumexp(terms, axis=-1)
    else:
        weighted = times * jnp.exp(log_weight) * terms
        reduced = jnp.sum(jnp.where(valid, weighted, 0.0), axis=-1)

    def total(values: Array) -> Array:
        return lax.stop_gradient(jnp.sum(jnp.where(valid, times * values, 0.0), axis=-1))

    return Sums(
        reduced,
        count=total(jnp.ones_like(negative)),
        score_sum=total(negative),
        rejected=total((negative < 0).astype(negative.dtype)),
        outranked=total((negative < positive[..., None]).astype(negative.dtype)),
    )


def reduce_rows(bound: Bound, scores: Scores) -> RowScores:
    """Sums over the negatives of each pair and side of masked scores (`Scores.masked`)."""
    sums = sum_negatives(
        bound,
        scores.negative,
        scores.valid,
        scores.positive,
        scores.log_weight,
        scores.multiplicity,
    )
    return RowScores(
        positive=scores.positive,
        sums=sums,
        share_valid=jnp.mean(scores.valid.astype(scores.positive.dtype))
        / (scores.totals.parts if scores.totals else 1),
        pair_valid=scores.pair_valid,
        totals=scores.totals,
        bound=bound.name,
    )


def loss_of(bound: Bound, rows: RowScores) -> Array:
    """The loss [] of a bound, in nats.

    Raises:
      ValueError: the rows were summed up for another bound.
    """
    if rows.bound != bound.name:
        raise ValueError(f"scores were summed up for {rows.bound}, not for {bound.name}")
    positive = rows.pair_mean(bound.positive(rows.positive))
    if bound.reduction == "mean":
        return rows.negative_mean(rows.sums.reduced) - positive
    if bound.reduction == "sum":
        return rows.pair_mean(rows.sums.reduced) - positive
    return (
        rows.pair_mean(jnp.logaddexp(bound.negative(rows.positive), rows.sums.reduced)) - positive
    )


def rows_of(bound: Bound, scores: Scores | RowScores) -> RowScores:
    return scores if isinstance(scores, RowScores) else reduce_rows(bound, scores.masked())


def jsd(scores: Scores | RowScores) -> Result:
    """Jensen–Shannon bound: minimises ``E_P[sp(-T)] + E_Q[sp(T)]``.

    The maximiser is T = log r, where the loss is 2 log 2 - 2 JSD(P || Q); a critic that knows
    nothing scores 2 log 2.  One negative per pair is enough: both terms are plain means.

    Source: CLIP-Lite (arXiv 2112.07133), eq. 5; f-GAN (arXiv 1606.00709), table 2.

    Returns:
      (loss [], metrics) in nats.
    """
    rows = rows_of(JSD, scores)
    return loss_of(JSD, rows), score_metrics(rows)


def nwj(scores: Scores | RowScores) -> Result:
    """NWJ bound: minimises ``-E_P[T] + E_Q[exp(T - 1)]``.

    The maximiser is T = 1 + log r, where the loss is minus the mutual information; for any critic
    minus the loss is, in expectation over plain negatives, a lower bound on it.  The exponential
    makes its variance grow with the scores.

    Source: Nguyen, Wainwright, Jordan (arXiv 0809.0853), eq. 7; Poole et al. (arXiv 1905.06922),
    eq. 4.

    Returns:
      (loss [], metrics) in nats.
    """
    rows = rows_of(NWJ, scores)
    return loss_of(NWJ, rows), score_metrics(rows)


def dv(scores: Scores, decay: float = 0.99) -> Result:
    """Donsker–Varadhan bound, as MINE trains it: minimises ``-E_P[T] + log E_Q[exp T]``.

    The maximiser is T = log r plus a constant.  On a batch the gradient of the logarithm is biased:
    E_Q[exp T ∇T] is divided by the batch's own mean of exp T.  Here it is divided by a moving
    average over the steps, ``a ← decay · a + (1 - decay) · mean exp T``, which starts as the mean
    of the first batch that has negatives.  `Scores.log_normalizer` is log a before this step and
    the metric ``dv_log_normalizer`` after it; without it the plain gradient is taken.

    ``dv_estimate``, minus the value of the loss, is biased upwards on a batch and no bound.

    Source: Donsker and Varadhan (1983); MINE (arXiv 1801.04062), eq. 5 and section 3.2.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    log_mean_exp = _log_mean_exp(scores, scores.negative)
    running = kept = lax.stop_gradient(log_mean_exp)
    if scores.log_normalizer is not None:
        started = jnp.isfinite(scores.log_normalizer)
        before = jnp.where(started, scores.log_normalizer, running)
        running = jnp.logaddexp(jnp.log(decay) + before, jnp.log1p(-decay) + running)
        kept = jnp.where(jnp.any(scores.valid), running, scores.log_normalizer)
    trained = loss_of(NWJ, reduce_rows(NWJ, _shifted(scores, 1 - running)))
    rows = reduce_rows(INFONCE, scores)
    estimate = rows.pair_mean(scores.positive) - log_mean_exp
    loss = trained + lax.stop_gradient(-estimate - trained)
    own = {"dv_estimate": estimate, "dv_log_normalizer": kept}
    return loss, score_metrics(rows) | own


def smile(scores: Scores, tau: float = 5.0) -> Result:
    """SMILE: the gradient of `jsd`, with a clipped Donsker–Varadhan estimate as its value.

    ``smile_estimate = E_P[T] - log E_Q[exp clip(T, -tau, tau)]`` is no bound; T = log r at the
    optimum, as for `jsd`.  The loss is minus the estimate in value and `jsd` in gradient.

    Source: Song and Ermon (arXiv 1910.06222), eq. 14 and section 5; trained by the Jensen–Shannon
    objective as in their experiments.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    rows = reduce_rows(JSD, scores)
    clipped = _log_mean_exp(scores, jnp.clip(scores.negative, -tau, tau))
    estimate = rows.pair_mean(scores.positive) - clipped
    trained = loss_of(JSD, rows)
    loss = trained + lax.stop_gradient(-estimate - trained)
    return loss, score_metrics(rows) | {"smile_estimate": estimate}


def infonce(scores: Scores | RowScores) -> Result:
    """InfoNCE: minimises ``-T_ii + log(exp T_ii + sum_k exp T_ik)``, averaged over the sides.

    With both sides and all in-batch negatives this is CLIP's symmetric cross-entropy.  ``log K -
    loss``, K the candidates per row, bounds the mutual information from below and never exceeds
    log K.

    Source: CPC (arXiv 1807.03748), eq. 4; CLIP (arXiv 2103.00020), fig. 3.

    Returns:
      (loss [], metrics) in nats.
    """
    rows = rows_of(INFONCE, scores)
    return loss_of(INFONCE, rows), score_metrics(rows)


def sigmoid(scores: Scores | RowScores) -> Result:
    """Sigmoid loss: minimises ``(1/B) sum_i [sp(-T_ii) + sum_k sp(T_ik)]``, averaged over sides.

    With one side and all in-batch negatives this is SigLIP's loss.  It sums the negatives of a pair
    where `jsd` averages them, so its optimum is T = log r - log(negatives per pair): give the
    critic room with a negative bias (SigLIP starts at -10).

    Source: SigLIP (arXiv 2303.15343), section 3.2.

    Returns:
      (loss [], metrics) in nats.
    """
    rows = rows_of(SIGMOID, scores)
    return loss_of(SIGMOID, rows), score_metrics(rows)


def score_metrics(rows: RowScores) -> dict[str, Array]:
    """What every objective logs: mean scores of pairs and of negatives, and how T tells them apart.

    Of the negatives that were drawn: chosen ones (`hard`, `importance`) score far above a mean
    under Q, and make both accuracies low.  Read-offs on held-out pairs are what to compare by.

    ``critic_accuracy`` is the balanced accuracy of the classifier T > 0, Bayes-optimal where T =
    log r.  ``ranking_accuracy`` asks only T(pair) > T(negative), so a constant added to T, which
    InfoNCE leaves free, does not matter.
    """
    accepted = rows.pair_mean((rows.positive > 0).astype(rows.positive.dtype))
    return {
        "score_positive": rows.pair_mean(rows.positive),
        "score_negative": rows.negative_mean(rows.sums.score_sum),
        "critic_accuracy": (accepted + rows.negative_mean(rows.sums.rejected)) / 2,
        "ranking_accuracy": rows.negative_mean(rows.sums.outranked),
        "valid_negatives": rows.share_valid,
    }


def _log_mean_exp(scores: Scores, negative: Array) -> Array:
    """log E_Q[exp negative] [] over masked scores; 0 where no negative is left."""
    times = scores.multiplicity
    terms = jnp.where(scores.valid, negative + scores.log_weight + jnp.log(times), -jnp.inf)
    count = jnp.sum(jnp.where(scores.valid, times, 0.0))
    some = count > 0
    finite = jax.nn.logsumexp(jnp.where(some, terms, 0.0))
    return jnp.where(some, finite - jnp.log(jnp.where(some, count, 1.0)), 0.0)


def _shifted(scores: Scores, by: Array) -> Scores:
    """The scores with a constant added to T."""
    moved = scores.replace(positive=scores.positive + by, negative=scores.negative + by)  # type: ignore[attr-defined]
    return moved.masked()
