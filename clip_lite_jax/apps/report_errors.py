"""What a model takes for what: captions that find a wrong picture first, and which concepts those
pictures are of."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from clip_lite_jax.apps.report_gallery import Item, Search
from clip_lite_jax.evaluators.retrieval import Retrieval

SHOWN = 6


@dataclass(frozen=True)
class Confusion:
    """A caption whose search finds the picture of another concept first."""

    asked: Item
    """The caption with its own picture."""
    found: Item
    """The picture found first, with its first caption."""
    rank: int
    """Of the right picture."""
    candidates: int
    times: int
    """Captions of the one concept that find the other first, and the other way round."""
    mutual: bool
    """Whether each finds the other first."""
    margin: float
    """By how many nats the wrong picture scores higher."""


@dataclass(frozen=True)
class Errors:
    """The wrong answers of one gallery."""

    name: str
    wrong: int
    """Captions that find a wrong picture first."""
    of: int
    within: int | None
    """Those among them whose wrong picture is of the category asked for; None without any."""
    categorised: int
    """Wrong answers to captions that have a category: what `within` is a part of."""
    within_by_chance: float
    """The share that a random wrong picture would give."""
    confusions: list[Confusion]


def build_errors(name: str, retrieval: Retrieval, scores: np.ndarray, shown: int = SHOWN) -> Errors:
    """From scores ``[images, captions]``: the pairs of concepts that are confused most often, and
    among equals those with the widest margin, each once."""
    owner, captions = retrieval.owner, np.arange(len(retrieval.owner))
    own = scores[owner, captions]
    others = scores.astype(np.float64)  # a copy
    others[owner, captions] = -np.inf
    first = np.argmax(others, axis=0)
    margin = others[first, captions] - own
    wrong = np.flatnonzero(~(margin < 0)) if len(scores) > 1 else captions[:0]  # ties are wrong
    groups = [example.group for example in retrieval.examples]
    asked = [(groups[owner[c]], groups[first[c]]) for c in wrong]
    counts = Counter(asked)
    by_pair: dict[frozenset[str], list[int]] = defaultdict(list)
    for caption, (one, other) in zip(wrong.tolist(), asked, strict=True):
        by_pair[frozenset((one, other))].append(caption)
    search = Search(retrieval, scores)
    best = [max(rows, key=lambda c: margin[c]) for rows in by_pair.values()]
    times = {c: len(rows) for c, rows in zip(best, by_pair.values(), strict=True)}
    best.sort(key=lambda c: (-times[c], -margin[c]))
    confusions = []
    for caption in best[:shown]:
        one, other = groups[owner[caption]], groups[first[caption]]
        confusions.append(
            Confusion(
                search.item(caption, int(owner[caption]), right=True),
                search.item(search.first_caption(int(first[caption])), int(first[caption]), False),
                int(search.caption_ranks[caption]),
                len(scores),
                times[caption],
                one != other and counts[other, one] > 0,
                float(margin[caption]),
            )
        )
    within, categorised, by_chance = _within(retrieval, wrong, first)
    return Errors(name, len(wrong), len(owner), within, categorised, by_chance, confusions)


def _within(
    retrieval: Retrieval, wrong: np.ndarray, first: np.ndarray
) -> tuple[int | None, int, float]:
    """How many wrong answers are of the right category, of how many that have one to be in, and the
    share expected of random ones."""
    names = np.array([example.attributes.get("category", "") for example in retrieval.examples])
    wrong = wrong[names[retrieval.owner[wrong]] != ""]
    if len(set(names.tolist()) - {""}) < 2 or not len(wrong):
        return None, len(wrong), 0.0
    asked = names[retrieval.owner[wrong]]
    sizes = Counter(names.tolist())
    by_chance = np.mean([(sizes[name] - 1) / (len(names) - 1) for name in asked.tolist()])
    return int(np.sum(names[first[wrong]] == asked)), len(wrong), float(by_chance)
