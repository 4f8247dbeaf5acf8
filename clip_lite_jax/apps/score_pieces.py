"""Scores of all pairs of a source, a piece at a time.

A piece holds some hundred examples and is written when it is done: memory does not grow with the
source, and a run that was stopped goes on where it was.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clip_lite_jax.apps.encoding import stamp
from clip_lite_jax.apps.identity import weights_of
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source, fingerprint
from clip_lite_jax.errors import BadImage, DataError, Unreadable
from clip_lite_jax.evaluators.encoding import (
    encode_captions,
    encode_images,
    in_batches,
    stack_or_empty,
)
from clip_lite_jax.evaluators.pair_scores import contrasts, ranks_among
from clip_lite_jax.files import replacing
from clip_lite_jax.inference import DualEncoderModel

PIECE = 512
"""Examples of a piece."""


@dataclass(frozen=True)
class Others:
    """A sample of captions of the source, beside which every caption is ranked; K of them."""

    embeddings: np.ndarray  # [K, D]
    captions: np.ndarray  # [K] text
    groups: np.ndarray  # [K] text


@dataclass(frozen=True)
class Scored:
    """One piece: n images that could be used, and their m pairs."""

    example: np.ndarray  # int64 [n]: place in the split
    digest: np.ndarray  # uint8 [n, 16]: hash of the file's bytes
    image: np.ndarray  # float32 [n, D], as the critic takes it
    row: np.ndarray  # int32 [m]: which of the n images
    caption: np.ndarray  # int32 [m]: which caption of the example
    text: np.ndarray  # float32 [m, D]
    score: np.ndarray  # float32 [m]: T
    contrast: np.ndarray  # float32 [m]
    rank: np.ndarray  # int32 [m]: 1 is best
    among: np.ndarray  # int32 [m]: other captions that it was ranked beside
    bad: np.ndarray  # text [b, 2]: ids and reasons of the examples that cannot be used
    unread: np.ndarray  # int64 [u]: places of those that could not be read; the next run tries them
    reasons: np.ndarray  # text [u, 2]: their ids, and why


@dataclass(frozen=True)
class Piece:
    """Some of the examples of a split, and the file with what was found."""

    split: str
    start: int
    stop: int
    path: Path

    def read(self) -> Scored:
        """Raises `DataError` where the file is damaged."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return Scored(**{field.name: file[field.name] for field in fields(Scored)})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error

    def finished(self) -> bool:
        """Whether it is there, and nothing is left to read; raises as `read`."""
        if not self.path.exists():
            return False
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return not len(file["unread"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path} is damaged ({error}): delete it")


def score_all(
    model: DualEncoderModel,
    sources: Mapping[str, Source],
    folder: Path,
    others: int,
    bad: BadExamples,
    unread: BadExamples,
) -> list[Piece]:
    """Scores what has not been scored yet; returns all pieces, in order.

    What cannot be used is added to `bad`, and what could not be read this time to `unread`.

    Raises:
      DataError: no caption in any split.
    """
    sample = _sample(sources, others)
    known = hashlib.sha256(repr((fingerprint(dict(sources)), others, PIECE)).encode())
    known.update(weights_of(model).encode())
    folder = folder / known.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [
        _piece(folder, split, source, start)
        for split, source in sources.items()
        for start in range(0, len(source), PIECE)
    ]
    missing = [piece for piece in pieces if not piece.finished()]
    total, left = (sum(p.stop - p.start for p in some) for some in (pieces, missing))
    if missing:
        beside = _others(model, sample)
        with tqdm(total=total, initial=total - left, unit="image") as bar:
            for piece in missing:
                found = score_piece(model, sources[piece.split], piece, beside)
                with replacing(piece.path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **{f.name: getattr(found, f.name) for f in fields(Scored)})
                bar.update(piece.stop - piece.start)
    for piece in pieces:
        found = piece.read()
        bad.extend((str(id), str(reason)) for id, reason in found.bad)
        unread.extend((str(id), str(reason)) for id, reason in found.reasons)
    return pieces


def score_piece(model: DualEncoderModel, source: Source, piece: Piece, others: Others) -> Scored:
    """Reads, encodes and scores the examples of a piece."""
    usable: list[tuple[int, Example, bytes]] = []
    bad: list[tuple[str, str]] = []
    unread: list[tuple[int, str, str]] = []
    views = []
    with ThreadPoolExecutor(max(1, model.config.data.threads)) as pool:
        numbers = range(piece.start, piece.stop)
        looks = pool.map(lambda index: _look(model, source, index), numbers)
        for index, (example, digest, view) in zip(numbers, looks, strict=True):
            if isinstance(view, Unreadable):
                unread.append((index, example.id, str(view)))
            elif isinstance(view, BadImage):
                bad.append((example.id, str(view)))
            else:
                usable.append((index, example, digest))
                views.append(view)
    size = model.batch_size
    image = encode_images(model.fns, stack_or_empty(views, model.pixels.blank), size)
    examples = [example for _, example, _ in usable]
    captions = [text for example in examples for text in example.captions]
    text = encode_captions(model.fns, model.tokenizer, captions, size)
    counts = [len(example.captions) for example in examples]
    row = np.repeat(np.arange(len(examples)), counts)
    own = in_batches(model.fns.pairs, (image[row], text), size)
    matrix = in_batches(lambda some: model.fns.matrix(some, others.embeddings), (image,), size)[row]
    valid = _valid(examples, row, others)
    rank, among = ranks_among(own, matrix, valid)
    return Scored(
        example=np.array([index for index, _, _ in usable], np.int64),
        digest=np.frombuffer(b"".join(d for _, _, d in usable), np.uint8).reshape(-1, 16),
        image=image.astype(np.float32),
        row=row.astype(np.int32),
        caption=np.concatenate([np.arange(n, dtype=np.int32) for n in [*counts, 0]]),
        text=text.astype(np.float32),
        score=own.astype(np.float32),
        contrast=contrasts(own, matrix, valid).astype(np.float32),
        rank=rank.astype(np.int32),
        among=among.astype(np.int32),
        bad=np.array(bad, dtype=str).reshape(-1, 2),
        unread=np.array([index for index, _, _ in unread], np.int64),
        reasons=np.array([known[1:] for known in unread], dtype=str).reshape(-1, 2),
    )


def _piece(folder: Path, split: str, source: Source, start: int) -> Piece:
    stop = min(start + PIECE, len(source))
    stamps = "\n".join(stamp(source, index) for index in range(start, stop))
    known = hashlib.blake2b(stamps.encode(), digest_size=8)
    return Piece(split, start, stop, folder / f"{split}-{start:010}-{known.hexdigest()}.npz")


def _look(
    model: DualEncoderModel, source: Source, index: int
) -> tuple[Example, bytes, np.ndarray | BadImage]:
    """An example, the hash of its image, and what the tower reads or why there is nothing."""
    try:
        example = source[index]
        return example, digest_of(example.image), model.pixels.view(Opened(example.image))
    except BadImage as error:
        return source.metadata(index), b"", error


def digest_of(image: bytes) -> bytes:
    """16 bytes, the same for equal files alone."""
    return hashlib.blake2b(image, digest_size=16).digest()


def _sample(sources: Mapping[str, Source], count: int) -> list[Example]:
    """Random examples with one random caption each, the same at every run."""
    rng = np.random.default_rng(0)
    places = list(_captioned(sources, 4 * count, rng))
    if not places:
        raise DataError("no caption to score: the source has no examples")
    chosen = [places[i] for i in rng.permutation(len(places))[:count]]
    found = []
    for source, index in chosen:
        example = source.metadata(index)
        text = example.captions[int(rng.integers(len(example.captions)))]
        found.append(Example(example.id, example.group, (text,), b"", {}))
    return found


def _captioned(
    sources: Mapping[str, Source], count: int, rng: np.random.Generator
) -> Iterator[tuple[Source, int]]:
    """Up to `count` examples that have captions, without looking at all of them."""
    total = sum(map(len, sources.values()))
    chosen = np.sort(rng.choice(total, min(count, total), replace=False))
    start = 0
    for source in sources.values():
        for index in chosen[(chosen >= start) & (chosen < start + len(source))] - start:
            if source.metadata(int(index)).captions:
                yield source, int(index)
        start += len(source)


def _others(model: DualEncoderModel, sample: Sequence[Example]) -> Others:
    captions = [example.captions[0] for example in sample]
    embeddings = encode_captions(model.fns, model.tokenizer, captions, model.batch_size)
    groups = np.array([example.group for example in sample])
    return Others(embeddings, np.array(captions), groups)


def _valid(examples: Sequence[Example], row: np.ndarray, others: Others) -> np.ndarray:
    """Which captions of the sample are those of other things than a pair's image, ``[m, K]``."""
    valid = np.ones((len(examples), len(others.captions)), bool)
    for number, example in enumerate(examples):
        valid[number] &= others.groups != example.group
        valid[number] &= ~np.isin(others.captions, example.captions)
    return valid[row]
