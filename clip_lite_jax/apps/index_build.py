"""``clip-lite index``: a source as an index, of which only what is new is encoded.

What has been encoded is put aside in parts, whole or not at all, and only then becomes the new
index: a build that was killed goes on where it was, and searches meanwhile see the one before.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_lite_jax.apps import index_files
from clip_lite_jax.apps.encoding import (
    DTYPES,
    WHAT,
    Counter,
    Passing,
    Progress,
    check_choice,
    encode_pictures,
    encode_texts,
    file_of,
    folders_of,
    only_one,
    open_splits,
    stamp,
)
from clip_lite_jax.apps.identity import check_same, identity_of, whole_path
from clip_lite_jax.apps.index_files import (
    COLUMNS,
    FORMAT,
    INDEX_FILE,
    PARTS,
    SKIPPED_FILE,
    Manifest,
    Set,
)
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.rows import TEXT, array
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.files import read_json_lines, replacing, write_atomic
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.places import is_remote

PART = 2048
"""Rows of a part: what a kill costs at most."""
_COPIED = 65_536
"""Rows of a matrix that pass through memory at a time."""


@dataclass(frozen=True)
class Options:
    """How an index is made."""

    what: str = "image"
    """``image``; ``text``, captions alone; or ``both``."""
    splits: Sequence[str] = ()
    """None: all."""
    dtype: str = "float32"
    """Of the rows as they are kept; float16 takes half the space, and memory as float32."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """That decode pictures."""
    fast: bool = False
    """See `encoding.encode_pictures`."""


@dataclass(frozen=True)
class Built:
    """What became of a build."""

    rows: dict[str, int]
    """``images`` and ``texts`` in the index."""
    encoded: int
    """Rows that were not there before, or have changed."""
    removed: int
    """Rows that were there before, and are gone or have changed."""
    skipped: list[tuple[str, str]]
    """Ids of pictures that cannot be used, now or before, with the reason."""


@dataclass
class _Row:
    """One row that the index shall have."""

    key: str
    id: str
    stamp: str
    path: str | None
    caption: str
    source: Source
    index: int


def build_index(
    model: DualEncoderModel,
    data: DataConfig,
    folder: Path,
    options: Options | None = None,
    path: str = "",
    progress: Progress | None = None,
) -> Built:
    """Makes the index of a source in `folder`, or brings the one there up to date.

    A picture is new when its size or time of change is (`data.pairs.Images.stamp`): of one that is
    no file of its own, in shards and archives, those of the file that it is in.  What could not be
    read is tried again.  `path` is where the model was loaded from.

    Raises:
      ConfigError: the index is of another model or source, or an option is none.
      DataError: the source cannot be read, or holds nothing that can be encoded.
    """
    options = options or Options()
    check_choice("--what", options.what, WHAT)
    check_choice("--dtype", options.dtype, DTYPES)
    _check_ours(folder)
    with only_one(folder):
        bad = BadExamples()
        sources = open_splits(data, options.what, options.splits, bad)
        root = _root(sources)
        manifest = Manifest(
            FORMAT,
            identity_of(model, whole_path(path)),
            _name(data),
            options.what,
            root,
            options.dtype,
            options.fast,
        )
        before = _read_before(folder, manifest)
        known_bad = {(x["id"], x["stamp"]): x["reason"] for x in _skipped(folder)}
        own_files = bool(data.splits)  # the same id may then stand for several pictures
        wanted = {kind: _wanted(kind, sources, root, own_files) for kind in WHAT[options.what]}
        rows = {kind: _Kept(folder, before, manifest, kind) for kind in wanted}
        missing = {
            kind: [
                row
                for row in wanted[kind]
                if (row.key, row.stamp) not in known_bad and not rows[kind].has(row)
            ]
            for kind in wanted
        }
        counter = Counter(progress, sum(map(len, missing.values())))
        for kind, some in missing.items():
            for found in _encode(model, kind, some, options, counter):
                known_bad |= rows[kind].add(found)
        # Those without a stamp are not taken for known at the next build.
        skipped: list[dict[str, str]] = [{"id": x, "reason": y} for x, y in bad.reasons.items()]
        for row in wanted.get("images", ()):
            if reason := known_bad.get((row.key, row.stamp)):
                stamped = {} if isinstance(reason, Passing) else {"stamp": row.stamp}
                skipped.append({"id": row.key, "reason": reason} | stamped)
        removed = sum(rows[kind].gone(wanted[kind]) for kind in wanted)
        reasons = [(known["id"], known["reason"]) for known in skipped]
        new = sum(kept.new for kept in rows.values())
        sets = {kind: rows[kind].finish(wanted[kind]) for kind in wanted}
        if not any(known.count for known in sets.values()):
            example = f": {': '.join(reasons[0])}" if reasons else ""
            raise DataError(f"{data.source}: no readable picture ({len(skipped)} skipped{example})")
        lines = "".join(json.dumps(known) + "\n" for known in skipped)
        write_atomic(folder / SKIPPED_FILE, lines)
        manifest = replace(manifest, sets=sets, skipped=len(skipped))
        index_files.write_manifest(folder, manifest)
        index_files.delete_others(folder, manifest)
        counts = {kind: known.count for kind, known in sets.items()}
        return Built(counts, new, removed, reasons)


class _Kept:
    """The rows of one kind that are encoded: those of the index before, and parts."""

    def __init__(self, folder: Path, before: Manifest | None, manifest: Manifest, kind: str):
        self._folder, self._kind, self._manifest = folder, kind, manifest
        self._known = before.sets.get(kind) if before else None
        old = index_files.read_rows(folder, before or manifest, kind)
        self._matrices: list[np.ndarray] = [old.embeddings]
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        self._remember(0, old.table["key"].to_pylist(), old.table["stamp"].to_pylist())
        self._old, self.new = set(self._places), 0
        (folder / PARTS).mkdir(exist_ok=True)
        for path in sorted((folder / PARTS).glob("*.parquet")):
            self._read_part(path)

    def _remember(self, matrix: int, keys: Sequence[str], stamps: Sequence[str]) -> None:
        for n, place in enumerate(zip(keys, stamps, strict=True)):
            self._places[place] = matrix, n

    def _read_part(self, path: Path) -> None:
        """Takes what a build before has left; what cannot be read is encoded again."""
        try:
            table = pq.read_table(path)
            table.validate(full=True)
            known = table.schema.metadata or {}
            weights, kind = known.get(b"weights", b"").decode(), known.get(b"kind", b"").decode()
            if (weights, kind) != (self._manifest.model.weights, self._kind):
                return
            keys, stamps = table["key"].to_pylist(), table["stamp"].to_pylist()
            rows = np.frombuffer(b"".join(table["embedding"].to_pylist()), "<f4")
            self._matrices.append(rows.reshape(len(keys), self._manifest.model.width))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            return
        self._remember(len(self._matrices) - 1, keys, stamps)

    def has(self, row: _Row) -> bool:
        return (row.key, row.stamp) in self._places

    def add(self, found: Sequence[tuple[_Row, np.ndarray | str]]) -> dict[tuple[str, str], str]:
        """Puts rows aside on the disk; returns those that cannot be used, with the reason."""
        good = [(row, value) for row, value in found if not isinstance(value, str)]
        if good:
            matrix = np.stack([value for _, value in good]).astype("<f4")
            keys, stamps = [row.key for row, _ in good], [row.stamp for row, _ in good]
            table = pa.table(
                {
                    "key": array(keys, TEXT),
                    "stamp": array(stamps, TEXT),
                    "embedding": pa.array([row.tobytes() for row in matrix], pa.binary()),
                }
            ).replace_schema_metadata({"weights": self._manifest.model.weights, "kind": self._kind})
            index_files.write_table(
                self._folder / PARTS / f"{index_files.new_generation()}.parquet", table
            )
            self._matrices.append(matrix)
            self._remember(len(self._matrices) - 1, keys, stamps)
            self.new += len(good)
        return {(row.key, row.stamp): value for row, value in found if isinstance(value, str)}

    def gone(self, wanted: Sequence[_Row]) -> int:
        """How many rows of the index before nobody wants any more."""
        return len(self._old - {(row.key, row.stamp) for row in wanted})

    def finish(self, wanted: Sequence[_Row]) -> Set:
        """Writes the matrix and the table of the rows that are there, in the order wanted."""
        rows = [row for row in wanted if self.has(row)]
        places = [self._places[row.key, row.stamp] for row in rows]
        if self._known and places == [(0, n) for n in range(self._known.count)]:
            return self._known  # nothing has changed
        generation = index_files.new_generation()
        matrix, table = index_files.paths(self._folder, self._kind, generation)
        shape = len(rows), self._manifest.model.width
        if rows:
            with replacing(matrix) as temporary:
                # A map of the file: the matrix may be larger than memory.
                target = np.lib.format.open_memmap(
                    temporary, "w+", np.dtype(self._manifest.dtype).newbyteorder("<"), shape
                )
                self._copy(places, target)
                target.flush()
                del target
            columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS[self._kind]}
            index_files.write_table(
                table, pa.table({name: array(values, TEXT) for name, values in columns.items()})
            )
        return Set(len(rows), generation)

    def _copy(self, places: Sequence[tuple[int, int]], target: np.ndarray) -> None:
        owners = np.array([owner for owner, _ in places])
        numbers = np.array([number for _, number in places])
        for start in range(0, len(places), _COPIED):
            some = slice(start, start + _COPIED)
            for owner in np.unique(owners[some]):
                chosen = np.flatnonzero(owners[some] == owner)
                rows = self._matrices[owner][numbers[some][chosen]]
                target[start + chosen] = rows


def _check_ours(folder: Path) -> None:
    """Raises `ConfigError` where a folder holds something else, before anything is made in it."""
    if not folder.is_dir() or (folder / INDEX_FILE).exists():
        return
    ours = (".lock", PARTS, SKIPPED_FILE)
    for path in folder.iterdir():
        if path.name not in ours and not path.name.startswith(("images-", "texts-")):
            raise ConfigError(f"{folder} is not empty ({path.name}): choose another folder")


def _read_before(folder: Path, manifest: Manifest) -> Manifest | None:
    """The index that is there, if there is one; raises `ConfigError` where it is another."""
    if not (folder / INDEX_FILE).exists():
        return None
    before = index_files.read_manifest(folder)
    check_same(before.model, manifest.model.weights, manifest.model.path, folder)
    for name in ("source", "what", "dtype", "fast"):
        there, now = getattr(before, name), getattr(manifest, name)
        if there != now:
            raise ConfigError(
                f"{folder} is an index of another kind ({name}: {there!r} there, {now!r} now): "
                "choose another folder, or delete this one"
            )
    return before


def _skipped(folder: Path) -> Iterator[dict[str, str]]:
    for line in read_json_lines(folder / SKIPPED_FILE):
        known = {name: line.get(name) for name in ("id", "stamp", "reason")}
        if all(isinstance(value, str) for value in known.values()):
            yield known  # type: ignore[misc]  # all of them are texts


def _wanted(kind: str, sources: dict[str, Source], root: str | None, named: bool) -> list[_Row]:
    """The rows that an index of these sources has, `named` by their split, too."""
    rows = []
    for split, source in sources.items():
        for index in range(len(source)):
            example, changed = source.metadata(index), stamp(source, index)
            file = file_of(source, index)
            path = None
            if file is not None and root is not None:
                path = file.relative_to(root).as_posix()
            key = f"{split}/{example.id}" if named else example.id
            if kind == "images":
                rows.append(_Row(key, example.id, changed, path, "", source, index))
                continue
            for caption in example.captions:
                of_text = f"{key}\x00{caption}"
                rows.append(_Row(of_text, example.id, "", path, caption, source, index))
    return rows


def _encode(
    model: DualEncoderModel,
    kind: str,
    rows: Sequence[_Row],
    options: Options,
    counter: Counter,
) -> Iterator[list[tuple[_Row, np.ndarray | str]]]:
    """Rows with their projections, or why there are none, as many as a part has."""
    if kind == "texts":
        for start in range(0, len(rows), PART):
            some = rows[start : start + PART]
            texts = encode_texts(model, [row.caption for row in some])
            counter.add(len(some))
            yield list(zip(some, texts, strict=True))
        return
    for source in {id(row.source): row.source for row in rows}.values():
        own = [row for row in rows if row.source is source]
        found = encode_pictures(
            model, source, [row.index for row in own], options.threads, options.fast
        )
        pairs = zip(own, counter.each(found), strict=True)
        while part := list(islice(pairs, PART)):
            yield part


def _root(sources: dict[str, Source]) -> str | None:
    """The folder below which all pictures are that are files of their own."""
    folders = set().union(*map(folders_of, sources.values()))
    return os.path.commonpath(folders) if folders else None


def _name(data: DataConfig) -> str:
    """What the index is of: the same from wherever it is called."""

    def absolute(source: str) -> str:
        known = is_remote(source) or not Path(source).exists()
        return source if known else os.path.abspath(source)

    return ", ".join(f"{absolute(source)}" for source in data.sources)
