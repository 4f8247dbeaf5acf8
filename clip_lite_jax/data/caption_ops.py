"""Random changes to a training caption."""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

# Whole words, and "leftward" or "rightmost", but not the "right" in "bright" or "copyright".
_LEFT_RIGHT = re.compile(r"\b(?:left|right)(?=(?:wards?|most)?\b)", re.IGNORECASE)
LIST_SEPARATOR = ", "

_PUNCTUATION = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


def normalize_as_published(caption: str) -> str:
    """Lower case, without punctuation and accents, as the published code prepares captions.

    Hyphens and slashes part words; at most 30 words are kept.  Source: github.com/4m4n5/CLIP-Lite,
    data/transforms.py.
    """
    caption = caption.lower().translate(_PUNCTUATION).replace("<person>", "person")
    words = re.sub(r"\s{2,}", " ", caption).strip("\n ").split(" ")
    decomposed = unicodedata.normalize("NFKD", " ".join(words[:30]))
    return "".join(c for c in decomposed if not unicodedata.combining(c))


NORMALIZATIONS: dict[str, Callable[[str], str]] = {
    "none": lambda caption: caption,
    "published": normalize_as_published,
}


def swap_left_right(caption: str) -> str:
    """Turns "Left arrow" into "Right arrow": what a mirrored picture shows; keeps the case."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        other = "right" if word.lower() == "left" else "left"
        return other.upper() if word.isupper() else other.title() if word[0].isupper() else other

    return _LEFT_RIGHT.sub(swap, caption)


def choose(captions: Sequence[str], which: str) -> Sequence[str]:
    """The ``first`` caption alone, all of them ``joined`` to one, or (any other word) all."""
    if which == "joined":
        return (join(captions),)
    return captions[:1] if which == "first" else captions


def join(captions: Sequence[str]) -> str:
    """All captions of an image as one list of tags, each once: "ant, animal, garden, insect"."""
    tags = (tag for caption in captions for tag in caption.split(LIST_SEPARATOR))
    return LIST_SEPARATOR.join(dict.fromkeys(tags))


def drop_from_list(caption: str, dropout: float, rng: np.random.Generator) -> str:
    """A caption that is a list of tags ("card, game, wildcard") loses some and changes their order.

    Every tag goes with probability `dropout`, but never the last one.  Other captions stay.
    """
    tags = caption.split(LIST_SEPARATOR)
    if len(tags) < 2 or dropout == 0:
        return caption
    order = rng.permutation(len(tags))
    kept = order[rng.random(len(tags)) >= dropout]
    return LIST_SEPARATOR.join(tags[i] for i in (kept if len(kept) else order[:1]))
