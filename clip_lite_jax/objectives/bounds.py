"""Bounds on the mutual information I(image; text), as losses to minimise.

P is the joint distribution of pairs, Q the product of its marginals, r = dP/dQ, sp = softplus.
"""

import jax
import jax.numpy as jnp
from jax import Array

from clip_lite_jax.objectives.scores import Scores, masked_mean


def jsd(scores: Scores) -> tuple[Array, dict[str, Array]]:
    """Jensen–Shannon bound: minimises ``E_P[sp(-T)] + E_Q[sp(T)]``.

    The maximiser is T = log r, where the loss is 2 log 2 - 2 JSD(P || Q); a critic that knows
    nothing scores 2 log 2.  One negative per pair is enough: both terms are plain means.

    Source: CLIP-Lite (arXiv 2112.07133), eq. 5; f-GAN (arXiv 1606.00709), table 2.

    Returns:
      (loss [], metrics) in nats.
    """
    scores = scores.masked()
    positive = masked_mean(jax.nn.softplus(-scores.positive), scores.pair_valid)
    weighted = jnp.exp(scores.log_weight) * jax.nn.softplus(scores.negative)
    loss = positive + masked_mean(weighted, scores.valid)
    return loss, score_metrics(scores)


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
    logits = jnp.where(scores.valid, scores.negative + scores.log_weight, -jnp.inf)  # [S, B, K]
    positive = jnp.broadcast_to(scores.positive[None, :, None], (*logits.shape[:2], 1))
    normaliser = jax.nn.logsumexp(jnp.concatenate([positive, logits], axis=-1), axis=-1)  # [S, B]
    rows = jnp.broadcast_to(scores.pair_valid, normaliser.shape)
    loss = masked_mean(normaliser - scores.positive, rows)
    return loss, score_metrics(scores)


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
