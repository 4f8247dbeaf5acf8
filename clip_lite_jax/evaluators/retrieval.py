"""Cross-modal retrieval: text → image and image → text on one gallery."""

import hashlib

import numpy as np

from clip_lite_jax.config import Config, RetrievalConfig
from clip_lite_jax.data import caption_ops
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import Source
from clip_lite_jax.evaluators.encoding import encode_captions, encode_images, load_images
from clip_lite_jax.evaluators.ranking import (
    Counts,
    average_precision,
    count,
    dense_counts,
    ranks,
)
from clip_lite_jax.train_step import EncodeFns

RECALLS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")


class Retrieval:
    """R@k, ranks and average precision in both directions, with what chance would give.

    A caption's answer is its image; an image's answer is any of its captions, the best-ranked one
    counts.  Ties count against the model.
    """

    def __init__(
        self,
        config: RetrievalConfig,
        source: Source,
        inputs: TowerInputs,
        batch_size: int,
        bad: BadExamples,
    ) -> None:
        chosen = select(source, config)
        self.examples, self.images = load_images(source, chosen, inputs.image, bad)
        captions = [caption_ops.choose(e.captions, config.captions) for e in self.examples]
        self.captions = self.texts = [text for texts in captions for text in texts]
        counts = np.array([len(texts) for texts in captions], int)
        self.owner = np.repeat(np.arange(len(captions)), counts)
        self.averaged: np.ndarray | None = None
        if config.captions == "averaged":
            self.averaged = counts
            self.captions = [caption_ops.join(texts) for texts in captions]
            self.owner = np.arange(len(captions))
        self.inputs, self.batch_size = inputs, batch_size

    def run(self, fns: EncodeFns) -> dict[str, float]:
        if self.averaged is not None:
            return retrieval_metrics(self.scores(fns), self.owner)
        return metrics_of(count(fns, *self._embedded(fns), self.owner), self.owner)

    def _embedded(self, fns: EncodeFns) -> tuple[np.ndarray, np.ndarray]:
        """Images ``[N, D]`` and texts ``[M, D]``."""
        return (
            encode_images(fns, self.images, self.batch_size),
            encode_captions(fns, self.inputs.text, self.texts, self.batch_size),
        )

    def ranks(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`ranking.ranks` of scores ``[N, M]``."""
        return ranks(dense_counts(scores, self.owner), self.owner)

    def scores(self, fns: EncodeFns) -> np.ndarray:
        """T of every image with every caption, or its mean over those of an image: ``[N, M]``."""
        scores = np.asarray(fns.matrix(*self._embedded(fns)))
        if self.averaged is None:
            return scores
        ends = np.cumsum(self.averaged)
        return np.add.reduceat(scores, ends - self.averaged, axis=1) / self.averaged


def select(source: Source, config: RetrievalConfig) -> list[int]:
    """The gallery's indices: they follow hashes of ids, whatever the order of the source."""

    def order(index: int) -> bytes:
        return hashlib.blake2b(source.metadata(index).id.encode(), digest_size=8).digest()

    chosen = sorted(range(len(source)), key=order)
    if config.one_per_group:
        first: dict[str, int] = {}
        for index in chosen:
            first.setdefault(source.metadata(index).group, index)
        chosen = list(first.values())
    return sorted(chosen[: config.max_images])


def retrieval_metrics(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """`metrics_of` scores ``[images, captions]``; caption c belongs to image owner[c]."""
    return metrics_of(dense_counts(scores, owner), owner)


def metrics_of(counts: Counts, owner: np.ndarray) -> dict[str, float]:
    """Recall, rank and average precision in both directions, with what chance would give."""
    captions, images = len(owner), int(owner[-1]) + 1
    metrics: dict[str, float] = {"images": images, "captions": captions}
    for (name, found, precision), (candidates, right) in zip(
        per_query(counts, owner), ((images, 1.0), (captions, captions / images)), strict=True
    ):
        for k in RECALLS:
            metrics[f"{name}_r{k}"] = float(np.mean(found <= k))
            metrics[f"{name}_r{k}_chance"] = chance_recall(k, candidates, right)
        metrics[f"{name}_median_rank"] = float(np.median(found))
        metrics[f"{name}_mean_rank"] = float(np.mean(found))
        metrics[f"{name}_map"] = float(np.mean(precision))
    return metrics


def per_query(counts: Counts, owner: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Of each direction its name, and ranks and average precisions of its queries."""
    found, precisions = ranks(counts, owner), average_precision(counts, owner)
    return list(zip(DIRECTIONS, found, precisions, strict=True))


def chance_recall(k: int, candidates: int, right: float) -> float:
    """Probability that k random ones of `candidates` hold at least one of `right` right ones."""
    k = min(k, candidates)
    wrong = candidates - right
    return 1 - float(np.prod([max(wrong - i, 0) / (candidates - i) for i in range(k)]))


def build_retrieval(
    config: Config,
    sources: dict[str, Source],
    inputs: TowerInputs,
    bad: BadExamples,
    stage: str,
) -> dict[str, Retrieval]:
    """The galleries of a stage (``validation`` or ``test``) that have two usable examples."""
    galleries = {
        gallery.name: Retrieval(gallery, sources[split], inputs, config.eval.batch_size, bad)
        for gallery in config.eval.retrieval
        if (split := getattr(gallery, stage)) in sources
    }
    return {name: gallery for name, gallery in galleries.items() if len(gallery.examples) > 1}
