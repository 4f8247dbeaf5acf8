"""``clip-lite score``: what a trained critic says about the pairs of a source, to clean it by."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_lite_jax.apps.identity import NOT_AFFINE
from clip_lite_jax.apps.score_calibration import Fitted, fit, own_calibration, why_not_log_r
from clip_lite_jax.apps.score_find import (
    SUSPECTS,
    Copies,
    Scores,
    Swap,
    copies,
    embeddings_of,
    gathered,
    repeated_captions,
    swaps,
    wrong_share,
)
from clip_lite_jax.apps.score_folder import folder_of_scores
from clip_lite_jax.apps.score_pieces import Piece, score_all
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.rows import TEXT, array
from clip_lite_jax.data.sources import Source, build_sources, fingerprint
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.calibration import Calibration
from clip_lite_jax.files import SKIPPED_FILE, replacing, write_atomic
from clip_lite_jax.inference import DualEncoderModel

log = logging.getLogger(__name__)

SCORES_FILE, FINDINGS_FILE, PIECES = "scores.parquet", "findings.json", "pieces"
UNREAD_FILE = "unread.jsonl"
ROWS = 65_536
"""Rows of the table that are written at a time."""

SCHEMA = pa.schema(
    [
        ("split", TEXT),
        ("id", TEXT),
        ("caption_index", pa.int32()),
        ("caption", TEXT),
        ("score", pa.float32()),  # T, in nats
        ("probability", pa.float32()),  # that it is real, at even odds; null if not calibrated
        ("contrast", pa.float32()),  # T less log mean exp T of the image's other captions
        ("rank", pa.int32()),  # of its own caption among `ranked_among` others and itself
        ("ranked_among", pa.int32()),
        ("wrong_suspect", pa.bool_()),
        ("swap_with", pa.int64()),  # row of this table, or null
        ("copies", pa.int32()),  # number of the group of equal or near images, or null
    ]
)


@dataclass(frozen=True)
class Settings:
    """What `score` looks for."""

    splits: tuple[str, ...] = ()
    """Splits to look at; none: all."""
    others: int = 256
    """Random captions beside which every caption is ranked."""
    wrong_rank: float = 0.2
    """A caption is suspected where a larger share of the others fits its image as well."""
    swap_gain: float | None = None
    """Nats by which two captions have to fit better when exchanged; None: log of the suspects."""
    near: float | None = 0.98
    """Cosine of embeddings from which on two images are near-duplicates; None: equal files only."""
    calibrate: DataConfig | None = None
    """Pairs that scale and shift are fitted on; None: the model's own."""
    calibrate_split: str | None = None
    calibration: bool = True

    def __post_init__(self) -> None:
        for name, value, good, rule in (
            ("others", self.others, self.others >= 2, "2 or more"),
            ("wrong-rank", self.wrong_rank, 0 <= self.wrong_rank < 1, "from 0 to below 1"),
            ("near", self.near, self.near is None or 0 < self.near <= 1, "above 0, up to 1"),
        ):
            if not good:
                raise ConfigError(f"--{name} {value}: {rule} is needed")


@dataclass(frozen=True)
class Found:
    """What is known of a source after it was scored."""

    source: str
    fingerprint: str
    """Of all splits, looked at or not: decisions are about it."""
    sources: Mapping[str, Source]
    splits: tuple[str, ...]
    """Those that were looked at; `Scores.split` counts in them."""
    scores: Scores
    wrong: np.ndarray
    """bool ``[m]``: suspected of a wrong caption."""
    swaps: list[Swap]
    copies: list[Copies]
    repeated: list[tuple[str, int]]
    fitted: Fitted | None
    warnings: list[str]
    near: float | None
    """From which cosine on near-duplicates were looked for; None: they were not."""
    bad: BadExamples
    unread: BadExamples
    """Those that could not be read this time: neither scored nor dropped."""
    unusable: list[tuple[str, int]]
    """Split and place of the examples whose image cannot be used."""
    settings: Settings

    def pair(self, number: int) -> tuple[str, Example, int]:
        """The split, the example without its image, and the place of the caption of a pair."""
        row = int(self.scores.row[number])
        split, example = self.image(row)
        return split, example, int(self.scores.caption[number])

    def image(self, row: int) -> tuple[str, Example]:
        split = self.splits[int(self.scores.split[row])]
        return split, self.sources[split].metadata(int(self.scores.example[row]))

    def probability(self, numbers: Any = slice(None)) -> np.ndarray | None:
        if self.fitted is None:
            return None
        return self.fitted.calibration.probability(self.scores.score[numbers])

    @cached_property
    def worst_first(self) -> np.ndarray:
        """All pairs, int64 ``[m]``: the lowest contrast first, which ranks as T where an image
        has one caption and is fair to images that fit everything or nothing."""
        return np.argsort(self.order_by, kind="stable")

    @cached_property
    def order_by(self) -> np.ndarray:
        contrast = self.scores.contrast
        return np.where(np.isnan(contrast), self.scores.score, contrast)


def score(model: DualEncoderModel, data: DataConfig, folder: Path, settings: Settings) -> Found:
    """Scores all pairs, looks for what is wrong, and writes ``scores.parquet``.

    Raises:
      ConfigError: no such split, or the folder holds something else.
      DataError: the source cannot be read, or holds nothing that can be used.
    """
    with folder_of_scores(folder):
        return _score(model, data, folder, settings)


def _score(model: DualEncoderModel, data: DataConfig, folder: Path, settings: Settings) -> Found:
    skipped, unread = folder / SKIPPED_FILE, folder / UNREAD_FILE
    for old in (skipped, unread):
        old.unlink(missing_ok=True)
    bad, passing = BadExamples(skipped), BadExamples(unread)
    sources = build_sources(data, bad, training=False)
    splits = _splits(settings.splits, sources)
    warnings = why_not_log_r(model.config)
    for warning in warnings:
        log.warning("T of this model is not log p(x, y) / p(x) p(y): %s", warning)
    fitted = _fitted(model, settings)
    if warnings and fitted is None:
        log.warning("ranks and orders can be used as they are; probabilities need --calibrate")
    near = _near(model, settings)
    chosen = {split: sources[split] for split in splits}
    pieces = score_all(model, chosen, folder / PIECES, settings.others, bad, passing)
    scores = gathered(pieces, splits)
    if not len(scores.score):
        listed = unread if len(passing) else skipped
        total = len(bad) + len(passing)
        raise DataError(f"{data.source}: none of {total} examples can be used; see {listed}")
    found = Found(
        source=data.source if not data.mixture else "mixture",
        fingerprint=fingerprint(sources),
        sources=sources,
        splits=splits,
        scores=scores,
        wrong=scores.worse > settings.wrong_rank,
        swaps=[],
        copies=copies(scores, pieces, str(pieces[0].path.parent), near),
        repeated=[],
        fitted=fitted,
        warnings=warnings,
        near=near,
        bad=bad,
        unread=passing,
        unusable=list(_unusable(pieces)),
        settings=settings,
    )
    found.swaps.extend(_swaps(found, pieces, model))
    found.repeated.extend(_write(found, folder / SCORES_FILE))
    write_atomic(folder / FINDINGS_FILE, json.dumps(summary(found), indent=2) + "\n")
    return found


def _splits(wanted: Sequence[str], sources: Mapping[str, Source]) -> tuple[str, ...]:
    for split in wanted:
        if split not in sources:
            raise ConfigError(f"--split {split}: choose from {', '.join(sources)}")
    return tuple(wanted) or tuple(sources)


def _fitted(model: DualEncoderModel, settings: Settings) -> Fitted | None:
    if not settings.calibration:
        return None
    if settings.calibrate is None:
        return own_calibration(model)
    source = settings.calibrate
    return fit(model, source, settings.calibrate_split, source.source)


def _near(model: DualEncoderModel, settings: Settings) -> float | None:
    critic = model.config.model.critic.name
    if settings.near is None or critic not in NOT_AFFINE:
        return settings.near
    log.warning(
        "the cosine of two images says nothing with a %s critic: only equal files are looked for "
        "as copies",
        critic,
    )
    return None


def _unusable(pieces: Sequence[Piece]) -> Iterator[tuple[str, int]]:
    for piece in pieces:
        every = np.arange(piece.start, piece.stop)
        known = piece.read()
        for index in np.setdiff1d(every, [*known.example, *known.unread]):
            yield piece.split, int(index)


def _swaps(found: Found, pieces: Sequence[Piece], model: DualEncoderModel) -> list[Swap]:
    worst = found.worst_first[:SUSPECTS]
    images, texts = embeddings_of(pieces, worst)

    def alike(one: int, other: int) -> bool:
        (_, a, i), (_, b, j) = found.pair(one), found.pair(other)
        return a.id == b.id or a.group == b.group or a.captions[i] == b.captions[j]

    calibration = found.fitted.calibration if found.fitted else Calibration()
    return swaps(
        worst,
        images,
        texts,
        alike,
        lambda i, t: np.asarray(model.fns.matrix(i, t)),
        calibration,
        found.settings.swap_gain,
    )


def _write(found: Found, path: Path) -> list[tuple[str, int]]:
    """Writes the table of all pairs; returns the captions that stand beside several images."""
    scores, count = found.scores, len(found.scores.score)
    partner = np.full(count, -1, np.int64)
    for swap in found.swaps:
        partner[swap.pair], partner[swap.other] = swap.other, swap.pair
    group = np.full(len(scores.split), -1, np.int32)
    for number, one in enumerate(found.copies):
        group[one.rows] = number
    probability = found.probability()
    captions = []
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for start in range(0, count, ROWS):
            part = slice(start, min(start + ROWS, count))
            known = [found.pair(number) for number in range(part.start, part.stop)]
            texts = array([example.captions[place] for _, example, place in known])
            own = group[scores.row[part]]
            columns = [
                array([split for split, _, _ in known]),
                array([example.id for _, example, _ in known]),
                pa.array(scores.caption[part]),
                texts,
                pa.array(scores.score[part]),
                pa.nulls(len(known), pa.float32())
                if probability is None
                else pa.array(probability[part].astype(np.float32)),
                pa.array(scores.contrast[part]),
                pa.array(scores.rank[part]),
                pa.array(scores.among[part]),
                pa.array(found.wrong[part]),
                pa.array(partner[part], mask=partner[part] < 0),
                pa.array(own, mask=own < 0),
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))
            captions.append(texts)
    return repeated_captions(pa.concat_arrays(captions), scores.row)


def summary(found: Found) -> dict[str, Any]:
    """The numbers, as plain data."""
    scores = found.scores
    extra = [group.rows for group in found.copies]
    result: dict[str, Any] = {
        "source": found.source,
        "fingerprint": found.fingerprint,
        "splits": list(found.splits),
        "images": len(scores.split),
        "pairs": len(scores.score),
        "skipped": len(found.bad),
        "unread": len(found.unread),
        "score": _quantiles(scores.score),
        "wrong_suspects": int(found.wrong.sum()),
        "wrong_share_at_most": wrong_share(scores.worse),
        "swaps": len(found.swaps),
        "copies": {
            kind: sum(len(group.rows) - 1 for group in found.copies if group.kind == kind)
            for kind in ("same file", "near")
        },
        "copy_groups": len(extra),
        "near": found.near,
        "repeated_captions": [list(item) for item in found.repeated[:20]],
        "warnings": found.warnings,
        "calibration": None,
    }
    if found.fitted is not None:
        fitted = found.fitted
        result["calibration"] = asdict(fitted.calibration) | {
            "fitted_on": fitted.fitted_on,
            "pairs": fitted.pairs,
            "metrics": dict(fitted.metrics),
        }
    return result


def _quantiles(values: np.ndarray) -> dict[str, float]:
    levels = (0, 0.05, 0.5, 0.95, 1)
    return {f"{100 * q:g}": float(np.quantile(values, q)) for q in levels}


def describe(found: Found) -> str:
    """What a person reads first, in lines."""
    known = summary(found)
    t, copied = known["score"], known["copies"]
    near = f"{copied['near']:,} near ones"
    if found.near is None:
        near = "near ones not looked for"
    lines = [
        f"pairs             {known['pairs']:,} of {known['images']:,} images; T from {t['5']:.2f} "
        f"to {t['95']:.2f}, half {t['50']:.2f}",
        f"wrong captions    {known['wrong_suspects']:,} suspects (more than "
        f"{found.settings.wrong_rank:.0%} of random captions fit as well); wrong at most, about: "
        f"{known['wrong_share_at_most']:.1%}",
        f"swapped           {known['swaps']:,} times two captions",
        f"copies            {copied['same file']:,} of equal files, {near}",
        f"same captions     {len(found.repeated):,} stand beside several images",
        f"cannot be used    {known['skipped']:,}",
    ]
    if known["unread"]:
        lines.append(
            f"could not be read {known['unread']:,} this time (in {UNREAD_FILE}): not scored, and "
            "not dropped; the same command tries them again"
        )
    if found.fitted is None:
        lines.append("probabilities     none: not calibrated")
    else:
        c, metrics = found.fitted.calibration, found.fitted.metrics
        lines.append(
            f"probabilities     σ({c.scale:.3g} T {c.shift:+.3g}), fitted on "
            f"{found.fitted.pairs:,} pairs of {found.fitted.fitted_on}"
        )
        if metrics:
            lines[-1] += (
                f"; ECE of one half after a fit to the other {metrics['ece']:.3f}, before "
                f"{metrics['uncalibrated_ece']:.3f}"
            )
    return "\n".join(lines)
