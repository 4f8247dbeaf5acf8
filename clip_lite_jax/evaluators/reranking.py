"""Ranks by a critic that no inner product ranks as, without scoring all with all.

The matrix of scores is approximated by some of its rows and columns, those of anchors: T ≈ F U⁺ G
for T of all images with the anchor captions F, of the anchor images with all captions G, and of
anchors with anchors U.  Inner products of rows of F U⁺ and columns of G find the candidates of a
query, and the critic scores those.
Source: Yadav et al. (arXiv 2210.12579), section 3, ANNCUR; CUR: Mahoney and Drineas (2009).
"""

import jax
import jax.numpy as jnp
import numpy as np

from clip_lite_jax.evaluators.ranking import Counts
from clip_lite_jax.train_step import EncodeFns

ANCHORS = 256
QUERIES = 256
"""Whose candidates are scored at a time."""


def reranked(
    fns: EncodeFns,
    images: np.ndarray,
    texts: np.ndarray,
    owner: np.ndarray,
    candidates: int,
    anchors: int = ANCHORS,
    seed: int = 0,
) -> Counts:
    """`ranking.count` among the `candidates` of each query; of images ``[N, D]``, texts ``[M, D]``.

    A right answer that is no candidate counts as one behind them all.  What wrong answers outside
    the candidates would have scored is not seen: the counts can be too low for others.
    """
    rng = np.random.default_rng(seed)
    some_images, some_texts = (
        np.sort(rng.choice(len(x), min(anchors, len(x)), replace=False)) for x in (images, texts)
    )
    image_scores = np.asarray(fns.matrix(images, texts[some_texts]), np.float64)  # F
    text_scores = np.asarray(fns.matrix(images[some_images], texts), np.float64)  # G
    # Small singular values of the anchors' scores are noise that their inverse would magnify.
    inverse = np.linalg.pinv(image_scores[some_images], rcond=1e-4)
    low_images = (image_scores @ inverse).astype(np.float32)
    low_texts = text_scores.T.astype(np.float32)
    to_images = _wrong_above(fns, low_texts, low_images, texts, images, candidates, False, owner)
    # From an image all its captions are right: each is compared with the image's candidates.
    to_texts = _wrong_above(fns, low_images, low_texts, images, texts, candidates, True, owner)
    return Counts(to_images, to_texts)


def _wrong_above(
    fns: EncodeFns,
    low_queries: np.ndarray,
    low_answers: np.ndarray,
    queries: np.ndarray,
    answers: np.ndarray,
    candidates: int,
    from_images: bool,
    owner: np.ndarray,
) -> np.ndarray:
    """For each caption ``[M]``: wrong candidates that score at least as it does with its image."""
    kept = min(candidates, len(answers))
    reached = np.zeros(len(owner), np.int64)
    for start in range(0, len(queries), QUERIES):
        chosen = np.arange(start, min(start + QUERIES, len(queries)))
        _, top = _top(
            np.resize(low_queries[chosen], (QUERIES, low_queries.shape[1])), low_answers, kept
        )
        found = np.asarray(top)[: len(chosen)]  # [Q, K]
        scores = _scores(fns, queries[chosen], answers, found, from_images)
        captions = (
            np.flatnonzero((owner >= chosen[0]) & (owner <= chosen[-1])) if from_images else chosen
        )
        rows = (owner[captions] if from_images else captions) - start
        right = captions if from_images else owner[captions]
        hit = found[rows] == right[:, None]  # [C, K]
        own = np.max(np.where(hit, scores[rows], -np.inf), axis=1)
        wrong = (owner[found[rows]] != owner[captions][:, None]) if from_images else ~hit
        above = np.sum(wrong & ~(scores[rows] < own[:, None]), axis=1)
        reached[captions] = np.where(hit.any(axis=1), above, kept)
    return reached


@jax.jit
def _products(queries: jax.Array, answers: jax.Array) -> jax.Array:
    return queries @ answers.T


def _top(queries: np.ndarray, answers: np.ndarray, kept: int) -> tuple[jax.Array, jax.Array]:
    return jax.lax.top_k(_products(jnp.asarray(queries), jnp.asarray(answers)), kept)


def _scores(
    fns: EncodeFns, queries: np.ndarray, answers: np.ndarray, found: np.ndarray, from_images: bool
) -> np.ndarray:
    """T of each query with its candidates, ``[Q, K]``."""
    one = np.broadcast_to(queries[:, None], (*found.shape, queries.shape[1]))
    other = answers[found]
    return np.asarray(fns.pairs(one, other) if from_images else fns.pairs(other, one))
