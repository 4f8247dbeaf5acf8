"""Cross-modal retrieval: text → image and image → text on one gallery."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_lite_jax.config import Config, RetrievalConfig
from clip_lite_jax.data import caption_ops
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import Source
from clip_lite_jax.evaluators.bootstrap import with_shared_intervals
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
KEPT_QUERIES = 30_000
"""Captions; of larger galleries the ranks of single queries are not kept, which are narrow enough
without: ``results.json`` is to stay small."""


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
        return self.measure(fns)[0]

    def measure(self, fns: EncodeFns) -> tuple[dict[str, float], "Queries"]:
        """The metrics, recalls and mean average precisions with intervals, and what they are of.

        Intervals are over the groups, as far as they are in the gallery: the captions of an image
        and the images of one thing are drawn together.
        """
        counts = (
            count(fns, *self.embedded(fns), self.owner)
            if self.averaged is None
            else dense_counts(self.scores(fns), self.owner)
        )
        _, groups = np.unique([example.group for example in self.examples], return_inverse=True)
        metrics = metrics_of(counts, self.owner) | retrieval_intervals(counts, self.owner, groups)
        ids = hashlib.blake2b(digest_size=16)
        for text in [example.id for example in self.examples] + self.captions:
            ids.update(f"{len(text)} {text}\n".encode(errors="surrogatepass"))
        found = dict(zip(DIRECTIONS, ranks(counts, self.owner), strict=True))
        return metrics, Queries(ids.hexdigest(), groups, self.owner, found)

    def embedded(self, fns: EncodeFns) -> tuple[np.ndarray, np.ndarray]:
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
        return self.scores_of(fns, *self.embedded(fns))

    def scores_of(self, fns: EncodeFns, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """`scores` of what was `embedded`."""
        scores = np.asarray(fns.matrix(images, texts))
        if self.averaged is None:
            return scores
        ends = np.cumsum(self.averaged)
        return np.add.reduceat(scores, ends - self.averaged, axis=1) / self.averaged


@dataclass(frozen=True)
class Queries:
    """The ranks of a gallery's single queries: what two runs are compared by, query by query."""

    ids: str
    """A hash of the ids and captions of the gallery: equal ones have the same queries."""
    groups: np.ndarray
    """int ``[images]``: what is drawn together."""
    owner: np.ndarray
    """int ``[captions]``: the image of each."""
    ranks: dict[str, np.ndarray]
    """By direction."""

    def to_json(self) -> dict[str, Any]:
        """Numbers as text, which takes a line of JSON each; nothing where there are too many."""
        if len(self.owner) > KEPT_QUERIES:
            return {}
        each = np.bincount(self.owner, minlength=len(self.groups))
        return {"ids": self.ids} | {
            name: " ".join(map(str, array.tolist()))
            for name, array in ({"groups": self.groups, "captions": each} | self.ranks).items()
        }

    @staticmethod
    def from_json(values: Any) -> "Queries | None":
        """None where there are none, or they do not fit together."""
        try:
            arrays = {
                name: np.array(values[name].split(), np.int64)
                for name in ("groups", "captions", *DIRECTIONS)
            }
            ids = str(values["ids"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None
        groups, each = arrays.pop("groups"), arrays.pop("captions")
        to_image, to_text = arrays.values()
        if not len(groups) or len(groups) != len(each) or len(to_text) != len(groups):
            return None
        if each.min() < 1 or each.max() > len(to_image) or each.sum() != len(to_image):
            return None
        return Queries(ids, groups, np.repeat(np.arange(len(groups)), each), arrays)


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


def retrieval_intervals(counts: Counts, owner: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """``NAME_low`` and ``NAME_high`` of the recalls and mean average precisions; groups
    ``[images]`` are drawn with replacement, once for all of them.

    The gallery stays as it is: how the numbers change with the wrong answers is not in it.
    """
    parts = []
    for (name, found, precision), clusters in zip(
        per_query(counts, owner), (groups[owner], groups), strict=True
    ):
        values = {f"{name}_r{k}": found <= k for k in RECALLS} | {f"{name}_map": precision}
        parts.append((values, clusters))
    found_ends = with_shared_intervals(parts)
    return {key: end for key, end in found_ends.items() if key.endswith(("_low", "_high"))}


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
