"""The findings of a check, for a terminal and as a page of HTML."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.apps.data_check import SKIPPED_FILE, in_order
from clip_lite_jax.apps.report_gallery import picture_uri, shorten
from clip_lite_jax.apps.report_pages import environment
from clip_lite_jax.apps.report_plots import Plot, bars
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import BadImage
from clip_lite_jax.files import write_atomic

PAGE_FILE = "check.html"
SAMPLES = 12


def table_of(found: Mapping[str, Any], cores: int) -> str:
    """What a person reads first, in lines."""
    lines = [f"{'split':20} {'pictures':>12} {'usable':>12} {'shorter side, px':>24}"]
    for split, known in found["splits"].items():
        sides = known["shorter_side"]
        side = f"{sides['5']} to {sides['95']}, half {sides['50']}"
        lines.append(f"{split:20} {known['examples']:12,} {known['usable']:12,} {side:>24}")
    captions, words = found["captions"], found["captions"]["words"]
    rate = found["images_per_second_per_core"]
    lines += [
        "",
        f"captions          {captions['count']:,}; of {words['5']} to {words['95']} words, half of "
        f"them {words['50']}; tokens: half {captions['tokens_50']}, 99 % {captions['tokens_99']}; "
        f"cut at data.max_tokens: {captions['truncated_share']:.1%}",
        f"copies            {found['duplicates']['copies']:,}",
        f"cannot be used    {found['bad']['count']:,}{_reasons(found['bad']['reasons'])}",
        f"decoding          {rate:,.0f} pictures/s on one core: with {cores} cores an accelerator "
        f"that takes more than {rate * cores:,.0f} a second waits",
        "",
        *(f"! {warning}" for warning in found["warnings"]),
    ]
    if not found["warnings"]:
        lines.append("nothing to complain about")
    return "\n".join(lines)


def _reasons(known: Sequence[tuple[str, int]]) -> str:
    some = "; ".join(f"{count:,} {reason}" for reason, count in known[:3])
    return f" ({some}; all in {SKIPPED_FILE})" if some else ""


def write_page(
    found: Mapping[str, Any], sources: Mapping[str, Source], folder: Path, cores: int
) -> Path:
    """Writes ``check.html``, which loads nothing from the network; returns its path."""
    context = {
        "found": found,
        "cores": cores,
        "words": _words(found["captions"]),
        "samples": {split: _samples(sources[split]) for split in in_order(sources)},
        "duplicates": [
            _by_id(sources[group["split"]], group["ids"][:4], group)
            for group in found["duplicates"]["groups"]
        ],
        "leaks": [_by_id(sources[leak["of"]], leak["ids"][:4], leak) for leak in found["leaks"]],
        "shorten": shorten,
    }
    path = folder / PAGE_FILE
    write_atomic(path, environment().get_template("data_check.html.j2").render(context))
    return path


@dataclass(frozen=True)
class Shown:
    """A picture with its captions; no picture where there is none."""

    id: str
    captions: Sequence[str]
    picture: str | None


@dataclass(frozen=True)
class Group:
    """Pictures that belong together, and what was found about them."""

    known: Mapping[str, Any]
    shown: Sequence[Shown]


def _words(captions: Mapping[str, Any]) -> Plot:
    counts = np.array(captions["word_counts"])
    last = int(np.flatnonzero(counts).max(initial=0)) + 1
    return bars(
        "Length of captions",
        "Captions of 40 words and more are counted together." if last > 40 else "",
        f"Bars: how many captions have so many words, up to {last - 1}",
        "words",
        "captions",
        np.arange(last),
        counts[:last],
    )


def _samples(source: Source) -> list[Shown]:
    """A few examples, the same at every check."""
    count = min(SAMPLES, len(source))
    order = sorted(range(len(source)), key=_hash) if len(source) < 10_000 else None
    chosen = order[:count] if order else [i * len(source) // count for i in range(count)]
    return [_shown(source, index) for index in chosen]


def _by_id(source: Source, ids: Sequence[str], known: Mapping[str, Any]) -> Group:
    wanted = set(ids)
    places = (i for i in range(len(source)) if source.metadata(i).id in wanted)
    return Group(known, [_shown(source, index) for index in places])


def _shown(source: Source, index: int) -> Shown:
    known = source.metadata(index)
    try:
        picture = picture_uri(Opened(source[index].image).decoded(shrink=4))
    except BadImage:
        picture = None
    return Shown(known.id, known.captions[:3], picture)


def _hash(index: int) -> bytes:
    return hashlib.blake2b(str(index).encode(), digest_size=8).digest()
