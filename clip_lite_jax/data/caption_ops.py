"""Random changes to a training caption."""

import re

import numpy as np

_LEFT_RIGHT = re.compile(r"left|right", re.IGNORECASE)
LIST_SEPARATOR = ", "


def swap_left_right(caption: str) -> str:
    """Turns "Left arrow" into "Right arrow": what a mirrored picture shows; keeps the case."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        other = "right" if word.lower() == "left" else "left"
        return other.upper() if word.isupper() else other.title() if word[0].isupper() else other

    return _LEFT_RIGHT.sub(swap, caption)


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
