"""What a check finds in captions."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.rows import in_chunks
from clip_lite_jax.data.sources import Source
from clip_lite_jax.data.tokenizer import LONGEST, Tokenizer, load_or_train_tokenizer

LOOKED_AT = 200_000
"""Captions whose text is looked at, evenly spread; all are counted."""
SHOWN = 10

PROBLEMS = {
    "hold a replacement character: they were decoded wrongly": re.compile("\ufffd"),
    "look like UTF-8 read as Latin-1": re.compile("Ã[\x80-\xbf]|Â[\xa0-\xbf]|â€[\x80-\xbf™œ]"),
    "hold HTML": re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]+|#\d+);", re.IGNORECASE),
    "hold an address of the web": re.compile(r"https?://|\bwww\.", re.IGNORECASE),
    "hold the name of a file": re.compile(r"\.(?:jpe?g|png|gif|webp|tiff?)\b", re.IGNORECASE),
    "hold control characters": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "hold no letter": re.compile(r"[\W\d_]*\Z"),
}


def caption_findings(data: DataConfig, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Counts of captions, their lengths in words and tokens, and what is odd about them."""
    per_image: Counter[int] = Counter()
    for source in sources.values():
        per_image.update(len(captions) for captions in _captions(source))
    count = sum(number * images for number, images in per_image.items())
    every = max(1, count // LOOKED_AT)
    texts = [
        text
        for place, text in enumerate(t for s in sources.values() for ts in _captions(s) for t in ts)
        if place % every == 0
    ]
    words = np.array([len(text.split()) for text in texts] or [0])
    tokens = _token_counts(texts, data)
    return {
        "count": count,
        "looked_at": len(texts),
        "per_image": {str(number): per_image[number] for number in sorted(per_image)},
        "words": {str(q): int(np.quantile(words, q / 100)) for q in (0, 5, 50, 95, 100)},
        "word_counts": np.bincount(np.minimum(words, 40), minlength=41).tolist(),
        "tokens_50": int(np.quantile(tokens, 0.5, method="higher")),
        "tokens_99": int(np.quantile(tokens, 0.99, method="higher")),
        "truncated_share": float(np.mean(tokens > data.max_tokens)),
        "problems": problems(texts),
        "scripts": _shares(filter(None, map(script, texts))),
        "repeated": [(t, n) for t, n in Counter(texts).most_common(SHOWN) if n > 1],
        "longest": sorted(texts, key=len, reverse=True)[:SHOWN],
    }


def problems(texts: Sequence[str]) -> list[dict[str, Any]]:
    """What is wrong with some of the captions, how many, and the first of them."""
    found = []
    for what, pattern in PROBLEMS.items():
        search = pattern.match if what == "hold no letter" else pattern.search
        hits = [text for text in texts if search(text)]
        if hits:
            share = len(hits) / len(texts)
            found.append({"what": what, "count": len(hits), "share": share, "first": hits[:SHOWN]})
    return sorted(found, key=lambda problem: -problem["count"])


def script(text: str) -> str:
    """The script of a text's first letter, ``latin`` or ``cjk``; nothing where it has none."""
    letter = next((c for c in text if c.isalpha()), None)
    return "" if letter is None else unicodedata.name(letter, "unknown").split()[0].lower()


def _captions(source: Source) -> Iterator[Sequence[str]]:
    return (source.metadata(index).captions for index in range(len(source)))


def _token_counts(texts: Sequence[str], data: DataConfig) -> np.ndarray:
    """How many tokens each caption would have if none were cut off."""
    if not texts:
        return np.zeros(1, np.int64)
    tokenizer: Tokenizer = load_or_train_tokenizer(iter(texts), replace(data, max_tokens=LONGEST))
    counts = [tokenizer(chunk)[1].sum(axis=1) for chunk in in_chunks(texts, 2048)]
    return np.concatenate(counts)


def _shares(items: Iterable[str]) -> dict[str, float]:
    counts = Counter(items)
    total = max(1, sum(counts.values()))
    return {item: count / total for item, count in counts.most_common()}
