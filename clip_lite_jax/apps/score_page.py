"""The review page of `clip-lite score`: one file of HTML, where a person keeps or drops."""

import base64
import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from clip_lite_jax.apps.data_decisions import FORMAT
from clip_lite_jax.apps.report_gallery import shorten
from clip_lite_jax.apps.report_pages import environment
from clip_lite_jax.apps.report_plots import Plot, Theme, plot
from clip_lite_jax.apps.score import PIECES, Found, summary
from clip_lite_jax.apps.score_drops import unusable
from clip_lite_jax.apps.score_pieces import digest_of
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.errors import BadImage
from clip_lite_jax.files import write_atomic

log = logging.getLogger(__name__)

PAGE_FILE = "review.html"
PICTURE_SIZE = 224
SHOWN_COPIES = 12
"""Of a group of copies so many are shown, and decided about."""
CAPTION_LENGTH = 400


@dataclass(frozen=True)
class Item:
    """One pair as it is shown; what a decision is about."""

    split: str
    id: str
    caption: int
    text: str
    picture: str | None
    """A data URI."""
    score: float
    probability: float | None
    rank: int
    among: int
    key: int
    """Number of the pair."""


@dataclass(frozen=True)
class Card:
    """What is decided about at a time."""

    number: int
    kind: str
    title: str
    items: Sequence[Item]
    drops: Sequence[int]
    """Places of the items that go where the card is answered with drop."""


@dataclass(frozen=True)
class Section:
    name: str
    intro: str
    cards: Sequence[Card]
    total: int
    """Cards of the kind, shown or not."""


def write_page(found: Found, folder: Path, show: int) -> Path:
    """Writes ``review.html``, which loads nothing from the network; returns its path."""
    templates = environment()
    script = templates.get_template("score_page.js.j2").render()
    # The browser runs this script and no other, whatever a caption holds.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = list(build_sections(found, show, folder))
    context = {
        "found": found,
        "known": summary(found),
        "sections": sections,
        "reliability": None if found.fitted is None else reliability_plot(found.fitted.points),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "data": page_data(found, sections),
        "shorten": shorten,
        "show": show,
    }
    path = folder / PAGE_FILE
    write_atomic(path, templates.get_template("score.html.j2").render(context))
    return path


def page_data(found: Found, sections: Sequence[Section]) -> dict[str, Any]:
    """What the script needs to know."""
    cards = [
        {
            "items": [{"split": i.split, "id": i.id, "caption": i.caption} for i in card.items],
            "drops": list(card.drops),
        }
        for section in sections
        for card in section.cards
    ]
    # Another selection has other cards: what was decided about these is not about those.
    shown = hashlib.sha256(repr(cards).encode()).hexdigest()[:16]
    return {
        "format": FORMAT,
        "source": found.fingerprint,
        "store": f"clip-lite-score {found.fingerprint} {shown}",
        "cards": cards,
        "unusable": [{"split": d.split, "id": d.id, "caption": d.caption} for d in unusable(found)],
    }


def build_sections(found: Found, show: int, folder: Path) -> Iterator[Section]:
    """Wrong captions, swapped ones and copies; a pair of a swap is not shown as wrong, too."""
    pictures = Pictures(found)
    number = 0
    swapped = {pair for swap in found.swaps for pair in (swap.pair, swap.other)}
    wrong = [int(n) for n in found.worst_first if found.wrong[n] and int(n) not in swapped]
    cards = []
    for pair in wrong[:show]:
        cards.append(Card(number, "wrong", "", [pictures.item(pair)], [0]))
        number += 1
    yield Section(
        "Wrong captions",
        "Random captions of this source fit the picture as well as its own. The worst come first.",
        cards,
        len(wrong),
    )
    cards = []
    for swap in found.swaps[:show]:
        items = [pictures.item(swap.pair), pictures.item(swap.other)]
        title = f"exchanged they would fit better by {swap.gain:.1f} nats"
        cards.append(Card(number, "swapped", title, items, [0, 1]))
        number += 1
    yield Section(
        "Swapped captions",
        "Each of the two captions fits the other picture better.",
        cards,
        len(found.swaps),
    )
    cards = []
    first = np.searchsorted(found.scores.row, np.arange(len(found.scores.split) + 1))
    for group in found.copies[:show]:
        rows = sorted(group.rows, key=lambda row: -_best(found, first, row))[:SHOWN_COPIES]
        # All captions of an image: a copy is dropped with all it has.
        pairs = [int(n) for row in rows for n in range(first[row], first[row + 1])]
        kept = range(first[rows[0]], first[rows[0] + 1])
        drops = [place for place, pair in enumerate(pairs) if pair not in kept]
        more = len(group.rows) - len(rows)
        alike = {"near": "nearly alike"}.get(group.kind, group.kind)
        title = f"{len(group.rows)} images, {alike}" + (f"; {more} not shown" if more else "")
        items = [pictures.item(pair) for pair in pairs]
        cards.append(Card(number, "copies", title, items, drops))
        number += 1
    yield Section(
        "Copies",
        "Equal files, or pictures that the model can hardly tell apart. Drop keeps the one with "
        "the best score."
        if found.near is not None
        else "Equal files. Drop keeps the one with the best score.",
        cards,
        len(found.copies),
    )
    if pictures.changed:
        log.warning(
            "pictures that are not shown, for they are not those that were scored: %d; delete %s "
            "and score the source again",
            pictures.changed,
            folder / PIECES,
        )


def _best(found: Found, first: np.ndarray, row: int) -> float:
    return float(found.scores.score[first[row] : first[row + 1]].max(initial=-np.inf))


class Pictures:
    """Items with their pictures, each read once."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.changed = 0
        """Pictures that are others than those that were scored, and are not shown."""
        self._known: dict[int, str | None] = {}

    def item(self, pair: int) -> Item:
        found, scores = self.found, self.found.scores
        split, example, place = found.pair(pair)
        probability = found.probability(pair)
        return Item(
            split,
            example.id,
            place,
            shorten(example.captions[place], CAPTION_LENGTH),
            self._picture(int(scores.row[pair])),
            float(scores.score[pair]),
            None if probability is None else float(probability),
            int(scores.rank[pair]),
            int(scores.among[pair]),
            pair,
        )

    def _picture(self, row: int) -> str | None:
        if row not in self._known:
            scores = self.found.scores
            source = self.found.sources[self.found.splits[int(scores.split[row])]]
            try:
                image = source[int(scores.example[row])].image
                same = digest_of(image) == scores.digest[row].tobytes()
                self.changed += not same  # the scores are not those of what is there now
                self._known[row] = _data_uri(Opened(image).decoded(shrink=2)) if same else None
            except BadImage:
                self._known[row] = None
        return self._known[row]


def _data_uri(picture: Image.Image) -> str:
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def reliability_plot(points: Mapping[str, Sequence[Mapping[str, float]]]) -> Plot | None:
    """Probability against the share that is real; None without points."""
    if not points:
        return None

    def paint(axes: Axes, theme: Theme) -> None:
        axes.plot([0, 1], [0, 1], ":", color=theme.ink, linewidth=1.4, label="perfect")
        styles = {
            "uncalibrated": ("o--", theme.second, "σ(T)"),
            "calibrated": ("s-", theme.first, "calibrated"),
        }
        for name, (style, colour, label) in styles.items():
            x, y = ([p[key] for p in points[name]] for key in ("predicted", "observed"))
            axes.plot(x, y, style, color=colour, markersize=4.5, label=label)

    def gap(name: str) -> float:
        return sum(p["share"] * abs(p["predicted"] - p["observed"]) for p in points[name])

    alt = (
        "Share of pairs that are real by predicted probability; the mean distance from the "
        f"diagonal is {gap('uncalibrated'):.3f} for σ(T) and {gap('calibrated'):.3f} after "
        "calibration."
    )
    caption = (
        "Real pairs and random ones at even odds: scale and shift fitted on one half of the "
        "groups, drawn for the other."
    )
    title = "Does the probability hold?"
    return plot(title, caption, alt, "predicted probability", "share that is real", paint)
