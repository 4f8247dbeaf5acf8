"""What is wrong with a source, by the scores of its pairs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import logsumexp

from clip_lite_jax.apps.score_pieces import Piece
from clip_lite_jax.evaluators.calibration import Calibration
from clip_lite_jax.vectors import unit

SUSPECTS = 4096
"""Of so many pairs, the worst, it is looked up whether two of them were exchanged."""
EXACT = 20_000
"""Up to so many images all are compared with all."""
BITS, TABLES = 14, 24
"""Of longer sources those are compared that fall on the same side of `BITS` random planes, in one
of `TABLES` attempts: at a cosine of .98, 1 - (1 - (1 - .0638)^14)^24 = .9999 of the pairs."""
BLOCK, COMPARED = 2048, 1024
"""Rows at a time: of scores, and of images that are compared with as many others."""

Matrix = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``[N, D], [M, D] -> [N, M]``: T."""


@dataclass(frozen=True)
class Scores:
    """All m pairs of all pieces, in columns; of n images."""

    split: np.ndarray  # int8 [n]: number of the split
    example: np.ndarray  # int64 [n]
    digest: np.ndarray  # uint8 [n, 16]
    row: np.ndarray  # int64 [m]: which of the n images
    caption: np.ndarray  # int32 [m]
    score: np.ndarray  # float32 [m]
    contrast: np.ndarray  # float32 [m]
    rank: np.ndarray  # int32 [m]
    among: np.ndarray  # int32 [m]

    @property
    def worse(self) -> np.ndarray:
        """The share of other captions that fit the image at least as well as its own, ``[m]``.

        A random caption has an even one, from 0 to 1.
        """
        return (self.rank - 1) / np.maximum(self.among, 1)


def gathered(pieces: Sequence[Piece], splits: Sequence[str]) -> Scores:
    """The columns of all pieces; embeddings stay where they are."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Scores.__annotations__}
    images = 0
    for piece in pieces:
        found = piece.read()
        number = np.full(len(found.example), splits.index(piece.split), np.int8)
        own: dict[str, np.ndarray] = {"split": number, "row": found.row.astype(np.int64) + images}
        for name, parts in columns.items():
            parts.append(own[name] if name in own else getattr(found, name))
        images += len(found.example)
    return Scores(**{name: np.concatenate(parts) for name, parts in columns.items()})


def wrong_share(worse: np.ndarray) -> float:
    """How many of the captions are wrong at most, about: the share that a random one would be.

    Twice the share of pairs whose caption does worse than half of the others.  Right captions among
    them make it too high, and never too low but by chance.
    Source: Storey (2002), with λ = 1/2.
    """
    return min(1.0, 2 * float(np.mean(worse > 0.5))) if len(worse) else 0.0


@dataclass(frozen=True)
class Swap:
    """Two pairs whose captions seem to be exchanged."""

    pair: int
    other: int
    gain: float
    """log of how much likelier the four are the other way round, in nats (calibrated)."""


def swaps(
    worst: np.ndarray,
    images: np.ndarray,
    texts: np.ndarray,
    alike: Callable[[int, int], bool],
    matrix: Matrix,
    calibration: Calibration,
    least: float | None,
) -> list[Swap]:
    """Pairs among the `worst` ``[S]`` that fit better after an exchange; each at most once.

    `images` and `texts` ``[S, D]`` are theirs; two that are `alike` are left out.  What T has too
    much for all captions of an image, or all images of a caption, is taken away.  `least` is
    the smallest gain; None takes log S: among so many partners one will fit well by chance.  Each
    image alone has to gain half of that, or the caption of one has merely moved to the other.
    """
    count = len(worst)
    if count < 2:
        return []
    least = math.log(count) if least is None else least
    logits = np.empty((count, count), np.float32)
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        logits[part] = calibration.scale * matrix(images[part], texts)
    for axis in (1, 0):
        logits -= logsumexp(logits, axis=axis, keepdims=True)
    own = np.diagonal(logits).copy()
    candidates: list[Swap] = []
    for i in range(count):
        gain = logits[i] + logits[:, i] - own[i] - own
        gain[: i + 1] = -np.inf  # each two once
        alone = np.minimum(logits[i] - own[i], logits[:, i] - own)
        for j in np.flatnonzero((gain > least) & (alone > least / 2)):
            candidates.append(Swap(i, int(j), float(gain[j])))
    taken: set[int] = set()
    found = []
    for swap in sorted(candidates, key=lambda swap: -swap.gain):
        if swap.pair in taken or swap.other in taken:
            continue
        pair, other = int(worst[swap.pair]), int(worst[swap.other])
        if not alike(pair, other):
            taken |= {swap.pair, swap.other}
            found.append(Swap(pair, other, swap.gain))
    return found


def embeddings_of(pieces: Sequence[Piece], pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of some of all pairs, by number: those of their images and texts, float32 ``[S, D]`` each."""
    order = np.argsort(pairs, kind="stable")
    wanted, start = pairs[order], 0
    images: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    for piece in pieces:
        first, last = np.searchsorted(wanted, (start, start + (count := _pairs_in(piece))))
        if last > first:
            found = piece.read()
            own = wanted[first:last] - start
            images.append(found.image[found.row[own]])
            texts.append(found.text[own])
        start += count
    back = np.argsort(order, kind="stable")
    if not images:
        return np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32)
    return np.concatenate(images)[back], np.concatenate(texts)[back]


def _pairs_in(piece: Piece) -> int:
    with np.load(piece.path, allow_pickle=False) as file:
        return len(file["row"])


@dataclass(frozen=True)
class Copies:
    """Images that are the same, or nearly."""

    rows: np.ndarray  # int64 [k], numbers of images
    kind: str
    """``same file``, or ``near``: some of them are."""


def copies(
    scores: Scores, pieces: Sequence[Piece], folder: str, near: float | None
) -> list[Copies]:
    """Groups of images that have equal bytes, or a cosine of `near` and more; the largest first.

    `near` None looks at bytes alone.  Groups are closed: what is near to one of them belongs to it.
    """
    _, first, codes = np.unique(scores.digest, axis=0, return_index=True, return_inverse=True)
    label = codes = codes.reshape(-1)  # which of the different files
    if near is not None and len(first) > 1:
        # One image of each file: of equal ones there may be thousands, of one placeholder.
        order = np.argsort(first, kind="stable")
        groups = np.empty(len(first), np.int64)
        groups[order] = near_groups(_units(pieces, first[order], folder), near)
        label = groups[codes]
    sizes = np.bincount(label, minlength=1)
    members = np.argsort(label, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    found = []
    for number in np.flatnonzero(sizes > 1):
        rows = members[starts[number] : starts[number + 1]]
        kind = "same file" if (codes[rows] == codes[rows[0]]).all() else "near"
        found.append(Copies(rows, kind))
    return sorted(found, key=lambda group: (-len(group.rows), int(group.rows[0])))


def _units(pieces: Sequence[Piece], chosen: np.ndarray, folder: str) -> np.ndarray:
    """Some images' embeddings at unit length, float32 ``[k, D]``, in a file; `chosen` is sorted."""
    width = pieces[0].read().image.shape[1]
    units = np.memmap(f"{folder}/images.f32", np.float32, "w+", shape=(len(chosen), width))
    start = 0
    for piece in pieces:
        image = piece.read().image
        first, last = np.searchsorted(chosen, (start, start + len(image)))
        units[first:last] = unit(image[chosen[first:last] - start])
        start += len(image)
    return units


def near_groups(units: np.ndarray, near: float) -> np.ndarray:
    """Numbers ``[n]``, equal for rows of ``[n, D]`` that pairs of a cosine of `near` lead between.

    Of many rows not all pairs are looked at; see `BITS`.
    """
    count, width = units.shape
    label = np.arange(count)
    if count <= EXACT:
        return _joined(units, label, label, near)
    rng = np.random.default_rng(0)
    for _ in range(TABLES):
        planes = rng.standard_normal((width, BITS)).astype(np.float32)
        codes = np.empty(count, np.int64)
        for start in range(0, count, BLOCK):
            sides = units[start : start + BLOCK] @ planes > 0
            codes[start : start + BLOCK] = sides @ (1 << np.arange(BITS))
        order = np.argsort(codes, kind="stable")
        ends = np.flatnonzero(np.diff(codes[order], append=-1)) + 1
        links = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            rows = order[start:end]
            if (label[rows] == label[rows[0]]).all():
                continue
            if len(rows) <= COMPARED:
                links.append(rows[_among(units[rows], near)])
            else:
                links.append(_links(_joined(units, rows, label[rows], near), rows))
        label = _merged(label, links)
    return label


def _among(units: np.ndarray, near: float) -> np.ndarray:
    """Links ``[2, links]`` between near ones of a few rows ``[k, D]``, at most some k of them.

    Most of many thousand such handfuls have none.
    """
    found = units @ units.T >= near - 1e-6  # equal ones come out a hair below 1
    a, b = np.nonzero(found)
    if len(a) > 8 * len(units):
        return _block(found, 0, 0)
    return np.stack([a[a < b], b[a < b]])


def _joined(units: np.ndarray, rows: np.ndarray, label: np.ndarray, near: float) -> np.ndarray:
    """The groups `label` ``[k]`` of some `rows`, joined where two of them are near.

    Pairs are kept no longer than their block: where all are alike there are millions.  Blocks that
    are one group already have nothing to tell.
    """
    count = len(rows)
    for start in range(0, count, COMPARED):
        one = slice(start, min(start + COMPARED, count))
        left = None
        links = []
        for second in range(start, count, COMPARED):
            other = slice(second, min(second + COMPARED, count))
            if (label[one] == label[start]).all() and (label[other] == label[start]).all():
                continue
            left = units[rows[one]] if left is None else left
            cosine = left @ units[rows[other]].T
            links.append(_block(cosine >= near - 1e-6, start, second))
        label = _merged(label, links)
    return label


def _block(near: np.ndarray, start: int, second: int) -> np.ndarray:
    """What a block of comparisons joins, int64 ``[2, links]``: at most one link a row or column."""
    height, width = near.shape
    numbers = np.concatenate([start + np.arange(height), second + np.arange(width)])
    if near.all():
        return _links(np.zeros_like(numbers), numbers)
    ends = np.concatenate([[0], np.cumsum(near.sum(axis=1)), np.full(width, near.sum())])
    columns = height + np.nonzero(near)[1]
    shape = (height + width, height + width)
    graph = csr_array((np.ones(len(columns), bool), columns, ends), shape=shape)
    _, label = connected_components(graph, directed=False)
    return _links(label, numbers)


def _links(label: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Links ``[2, links]`` of `numbers` ``[k]`` to the first of their group `label` ``[k]``."""
    _, first, code = np.unique(label, return_index=True, return_inverse=True)
    leader = numbers[first[code.reshape(-1)]]
    some = leader != numbers
    return np.stack([numbers[some], leader[some]])


def _merged(label: np.ndarray, links: Sequence[np.ndarray]) -> np.ndarray:
    """Groups `label` ``[n]`` after links between their members."""
    if not sum(part.shape[1] for part in links):
        return label
    a, b = np.concatenate([_links(label, np.arange(len(label))), *links], axis=1)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(label), len(label)))
    return connected_components(graph, directed=False)[1]


def repeated_captions(captions: pa.Array, rows: np.ndarray) -> list[tuple[str, int]]:
    """Texts that stand beside several images, with the number of images, the commonest first."""
    table = pa.table({"caption": captions, "image": pa.array(rows)})
    counted = table.group_by("caption").aggregate([("image", "count_distinct")])
    counted = counted.filter(pc.greater(counted["image_count_distinct"], 1))
    found = zip(
        counted["caption"].to_pylist(), counted["image_count_distinct"].to_pylist(), strict=True
    )
    return sorted(found, key=lambda item: (-item[1], item[0]))
