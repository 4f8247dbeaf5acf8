"""The held-out objective and what the critic's scores say about mutual information."""

import math
from typing import Literal

import numpy as np

from clip_lite_jax.config import RetrievalConfig
from clip_lite_jax.data.sources import BadExamples, Source
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.evaluators.retrieval import Retrieval
from clip_lite_jax.train_step import EncodeFns

CHANCE_LOSS = 2 * math.log(2)
"""JSD loss of a critic that knows nothing, in nats."""


class Information:
    """Scores of held-out pairs, one caption each, against all other pairings of them.

    Pairs are used as they come, nothing masked and nothing weighted, so that P and Q are the joint
    distribution and the product of its marginals.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        image_size: int,
        batch_size: int,
        captions: Literal["first", "joined"],
        max_pairs: int,
        bad: BadExamples,
    ) -> None:
        gallery = RetrievalConfig(
            name="information", validation="", test="", captions=captions, max_images=max_pairs
        )
        self.pairs = Retrieval(gallery, source, tokenizer, image_size, batch_size, bad)

    def run(self, fns: EncodeFns) -> dict[str, float]:
        scores = self.pairs.scores(fns)
        return read_offs(np.diagonal(scores), scores[~np.eye(len(scores), dtype=bool)])


def read_offs(positive: np.ndarray, negative: np.ndarray) -> dict[str, float]:
    """Mutual information read off critic scores under P ``[N]`` and Q ``[M]``, in nats.

    Only names that say ``lower_bound`` are lower bounds, in expectation, whatever the critic:
    ``jsd_lower_bound`` (`certified_bound`) and ``nwj_lower_bound``, NWJ at T + 1 (arXiv 0809.0853).
    ``score_positive`` estimates the information at the optimum T = log r and bounds nothing.
    """
    positive, negative = positive.astype(np.float64), negative.astype(np.float64)
    loss = float(np.mean(np.logaddexp(0, -positive)) + np.mean(np.logaddexp(0, negative)))
    # exp overflows only where the bound is worthless anyway; -inf says so.
    log_mean_exp = float(np.logaddexp.reduce(negative) - math.log(len(negative)))
    nwj = (
        1 + float(np.mean(positive)) - (math.exp(log_mean_exp) if log_mean_exp < 700 else math.inf)
    )
    accuracy = (float(np.mean(positive > 0)) + float(np.mean(negative < 0))) / 2
    return {
        "jsd_loss": loss,
        "jsd_loss_chance": CHANCE_LOSS,
        "score_positive": float(np.mean(positive)),
        "score_negative": float(np.mean(negative)),
        "critic_accuracy": accuracy,
        "jsd_lower_bound": certified_bound(loss),
        "nwj_lower_bound": nwj,
        "pairs": len(positive),
    }


def certified_bound(jsd_loss: float) -> float:
    """A lower bound on the mutual information from the JSD loss of *any* critic, in nats.

    With D = log 2 - loss / 2, which never exceeds JSD(P || Q), the information is at least log c,
    where D = log 2 - log(1 + 1/c) / 2 - log(1 + c) / (2 c): among all density ratios with that
    divergence the one that takes only the values 0 and c has the least information.  The map is
    convex; apply it to a mean loss, not to batches.
    """
    divergence = math.log(2) - jsd_loss / 2
    if divergence <= 0:
        return 0.0

    def divergence_at(log_c: float) -> float:
        log_1p_c = float(np.logaddexp(0, log_c))
        log_1p_inverse = float(np.logaddexp(0, -log_c))
        return math.log(2) - log_1p_inverse / 2 - math.exp(-log_c) * log_1p_c / 2

    low, high = 0.0, 700.0  # divergence_at rises from 0 to log 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence_at(middle) < divergence else (low, middle)
    return low
