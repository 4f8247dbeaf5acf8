"""Images with captions: what is known of them in columns, the images wherever they lie."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import rows, splits
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.records import Example, RecordSource
from clip_lite_jax.data.rows import TEXTS, Rows
from clip_lite_jax.errors import BadImage, DataError, Unreadable
from clip_lite_jax.places import Place, as_place, at_once, stamp_of
from clip_lite_jax.remote import RemotePath

CHECKED_FILES = 200_000
"""Of so many images it is looked up at the start whether their files are there; of longer tables
those that are missing are found when they are read."""

PICTURES = "pictures"
"""The split of a source that has no captions."""

MAX_BYTES = 200_000_000
"""Larger files are refused unread: none of them is a picture to train on."""


class Images(Protocol):
    """Random access to encoded images; safe to share between threads."""

    def read(self, index: int) -> bytes:
        """The image of a row; raises `BadImage` where there is none."""
        ...

    def missing(self) -> dict[int, str]:
        """Rows that are known to have no image, with the reason."""
        return {}

    def take(self, indices: np.ndarray) -> Images:
        """Those of some rows."""
        ...

    def stamp(self, index: int) -> str:
        """Another text when the image of a row has changed, as far as that is cheap to tell.

        Of an image that is no file of its own that of the file it is in: where that has changed,
        all images in it may have.
        """
        del index
        return ""


@dataclass(frozen=True)
class Pairs:
    """Some of the rows of a source, with their images."""

    rows: Rows
    images: Images
    indices: np.ndarray
    """int64 ``[N]``: the rows that are meant, in order."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return replace(self.metadata(index), image=self.images.read(self.row(index)))

    def metadata(self, index: int) -> Example:
        return self.rows[self.row(index)]

    def stamp(self, index: int) -> str:
        return self.images.stamp(self.row(index))

    def row(self, index: int) -> int:
        return int(self.indices[index])

    def chosen(self, indices: np.ndarray) -> Pairs:
        return replace(self, indices=self.indices[indices])


@dataclass(frozen=True)
class FileImages(Images):
    """Images in files below one folder."""

    root: Path
    paths: pa.Array
    """Relative to `root`, `rows.TEXT`."""

    def read(self, index: int) -> bytes:
        path = inside(self.root, self.paths[index].as_py())
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise BadImage(f"{size:,} bytes, over {MAX_BYTES:,}")
            return path.read_bytes()
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error

    def missing(self) -> dict[int, str]:
        checked = np.arange(len(self.paths))
        if len(checked) > CHECKED_FILES:
            checked = np.flatnonzero(pc.match_substring_regex(self.paths, _SUSPICIOUS))
        reasons = {}
        for row in checked.tolist():
            try:
                inside(self.root, self.paths[row].as_py() or "")
            except Unreadable:  # perhaps not for long: that is found out when it is read
                continue
            except BadImage as error:
                reasons[row] = str(error)
        return reasons

    def stamp(self, index: int) -> str:
        return stamp_of(self.root / (self.paths[index].as_py() or ""))

    def take(self, indices: np.ndarray) -> FileImages:
        return FileImages(self.root, self.paths.take(pa.array(indices)))


_SUSPICIOUS = r"^$|^[/\\]|\.\.|[:?#\x00-\x1f]"
"""Paths that may be none, or leave the folder."""


@dataclass(frozen=True)
class RemoteImages(Images):
    """Images below one folder of a bucket or server, each read when it is asked for."""

    root: RemotePath
    paths: pa.Array
    """Relative to `root`, `rows.TEXT`."""

    def read(self, index: int) -> bytes:
        path = self._place(index)
        try:
            data = path.read(0, MAX_BYTES + 1)
        except FileNotFoundError as error:
            raise BadImage("no such file") from error
        except DataError as error:
            raise Unreadable(f"cannot be read: {error}") from error
        if len(data) > MAX_BYTES:
            raise BadImage(f"over {MAX_BYTES:,} bytes")
        return data

    def missing(self) -> dict[int, str]:
        """What a look at the names tells: to look for the files would take a request for each."""
        reasons = {}
        suspicious = pc.fill_null(pc.match_substring_regex(self.paths, _SUSPICIOUS), True)
        for row in np.flatnonzero(suspicious).tolist():
            try:
                self._place(row)
            except BadImage as error:
                reasons[row] = str(error)
        return reasons

    def stamp(self, index: int) -> str:
        """As the folder's listing has it; nothing of servers and buckets that do not list."""
        name = self.paths[index].as_py()
        return self._stamps.get(name, "") if name else ""

    @cached_property
    def _stamps(self) -> dict[str, str]:
        """By name, of one listing of each folder that rows are in: not a request for each row."""
        if self.root.url.startswith(("http://", "https://")):  # a listing there has no times
            return {}
        names = {str(name) for name in self.paths.to_pylist() if name}
        parents = sorted({name.rpartition("/")[0] for name in names})
        found: dict[str, str] = {}
        for parent, stamps in zip(parents, at_once(self._listed, parents), strict=True):
            named = ((f"{parent}/{name}" if parent else name, x) for name, x in stamps.items())
            found |= {name: x for name, x in named if name in names}
        return found

    def _listed(self, parent: str) -> dict[str, str]:
        try:
            folder = self.root / parent if parent else self.root
            return {path.name: stamp_of(path) for path in folder.iterdir()}
        except DataError:  # one may be allowed to read, and not to list
            return {}

    def take(self, indices: np.ndarray) -> RemoteImages:
        return RemoteImages(self.root, self.paths.take(pa.array(indices)))

    def _place(self, index: int) -> RemotePath:
        name = self.paths[index].as_py()
        if not name:
            raise BadImage("no image path")
        try:
            return self.root / name
        except DataError as error:
            raise BadImage(str(error)) from error


def images_in(folder: Place, paths: pa.Array) -> FileImages | RemoteImages:
    """Images below a folder, `paths` relative to it."""
    if isinstance(folder, RemotePath):
        return RemoteImages(folder, paths)
    return FileImages(folder, paths)


@dataclass(frozen=True)
class RecordImages(Images):
    """Images in records of our own format."""

    files: tuple[RecordSource, ...]
    owner: np.ndarray
    """int32 ``[N]``: the file of each row."""
    number: np.ndarray
    """int64 ``[N]``: its record there."""

    def read(self, index: int) -> bytes:
        try:
            return self.files[self.owner[index]][int(self.number[index])].image
        except ValueError as error:
            raise BadImage(str(error)) from error
        except OSError as error:
            raise Unreadable(f"cannot be read: {error}") from error

    def stamp(self, index: int) -> str:
        return self._stamps[self.owner[index]]

    @cached_property
    def _stamps(self) -> list[str]:
        return [stamp_of(as_place(file.path)) for file in self.files]

    def take(self, indices: np.ndarray) -> RecordImages:
        return RecordImages(self.files, self.owner[indices], self.number[indices])


def inside(root: Path, name: str) -> Path:
    """The file that a name means; raises `BadImage` unless it is there, below `root`."""
    if not name:
        raise BadImage("no image path")
    root = root.resolve()
    try:
        target = (root / name).resolve()
        is_file = target.is_file()
    # A name that no file can have: too long, a null byte, links in a circle (on Python 3.11 and
    # 3.12 a RuntimeError).
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        raise BadImage(f"not a path: {error}") from error
    if not target.is_relative_to(root):
        raise BadImage(f"the path leaves {root}")
    if not is_file:
        with_slashes = root / name.replace("\\", "/")
        hint = "; folders are parted by / here" if "\\" in name and with_slashes.is_file() else ""
        if _is_there_otherwise(root, name):
            raise BadImage("its name is not UTF-8: rename it")
        raise BadImage(f"no such file{hint}")
    return target


def _is_there_otherwise(root: Path, name: str) -> bool:
    """Whether a file's name has bytes that are no UTF-8, which `rows.array` has written out."""
    original = re.sub(r"\\(udc[89a-f][0-9a-f])", lambda match: chr(int(match[1][1:], 16)), name)
    try:
        return original != name and (root / original).is_file()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Found:
    """What a reader found, ``R`` rows, before it is checked, grouped and split."""

    path: str
    """Of the source, for messages."""
    images: Images
    ids: pa.Array
    """`TEXT` ``[R]``; rows of equal ids are one image."""
    captions: Sequence[pa.Array]
    """`TEXT` or `TEXTS` ``[R]`` each."""
    groups: pa.Array | None = None
    splits: pa.Array | None = None
    """Names of splits; the rows that have none are split by hash."""
    place: Callable[[int], str] | None = None
    """Where in the source a row stands: ``pairs.csv:3``."""
    bad: Mapping[int, str] = field(default_factory=dict)
    """Rows that could not be read, with the reason."""
    attributes: pa.Array | None = None
    """`rows.ATTRIBUTES` ``[R]``."""
    captionless: bool = False
    """Pictures alone: no caption is missed."""

    def take(self, indices: np.ndarray) -> Found:
        """Some rows, none of them bad."""
        some = pa.array(indices)
        return Found(
            self.path,
            self.images.take(indices),
            self.ids.take(some),
            [column.take(some) for column in self.captions],
            None if self.groups is None else self.groups.take(some),
            None if self.splits is None else self.splits.take(some),
            attributes=None if self.attributes is None else self.attributes.take(some),
            captionless=self.captionless,
        )


def build_pairs(
    found: Found, config: DataConfig, bad: BadExamples, split: str | None = None
) -> dict[str, Pairs]:
    """The usable examples by split, rows of one image as one example with all its captions.

    With `split` all of them belong to that one, whatever the source says; pictures without captions
    are one split, too, called `PICTURES`.  Rows without a caption,
    and those without an image as far as that is known, are added to `bad`.

    Raises:
      DataError: no usable row, or too many that are not.
    """
    count = len(found.ids)
    reasons = found.images.missing() | dict(found.bad)
    if found.captionless:
        split = split or PICTURES
    else:
        for row in np.flatnonzero(~_captioned(found.captions)).tolist():
            reasons.setdefault(row, "empty caption")
    bad.expect(bad.total + count)
    bad.extend((_place(found, row), reasons[row]) for row in sorted(reasons))
    if len(reasons) == count:
        example = next(iter(reasons.values()), "it has none")
        listed = f"; {len(bad)} are listed in {bad.path}" if bad.path else ""
        raise DataError(f"{found.path}: no usable row ({example}){listed}")
    usable = np.ones(count, bool)
    usable[list(reasons)] = False
    if reasons and not rows.all_different(found.ids):
        found = found.take(np.flatnonzero(usable))  # what belongs to an image decides its captions
        usable = usable[usable]
    first, captions = rows.group(found.ids, found.captions)
    if len(first) < len(found.ids):
        found, usable = found.take(first), usable[first]
    groups = found.ids
    if found.groups is not None:
        # An empty cell is no group: the rows without one do not all show the same thing.
        groups = pc.if_else(_filled(found.groups), found.groups, found.ids)
    known = Rows(found.ids, groups, captions, found.attributes)
    if split is not None:
        return {split: Pairs(known, found.images, np.flatnonzero(usable))}
    if found.splits is None:
        codes = splits.split_by_hash(groups, config.held_out)
    else:
        codes = splits.split_by_name(found.splits, groups, config.held_out, found.path)
    places = enumerate(splits.SPLITS)
    chosen = {name: np.flatnonzero(usable & (codes == code)) for code, name in places}
    return {name: Pairs(known, found.images, some) for name, some in chosen.items() if len(some)}


def _place(found: Found, row: int) -> str:
    id = found.ids[row].as_py() or ""
    return id if found.place is None else f"{found.place(row)}: {id}"


def _captioned(captions: Sequence[pa.Array]) -> np.ndarray:
    """Which rows have a caption."""
    return np.logical_or.reduce([np.asarray(_filled(column)) for column in captions])


def _filled(column: pa.Array) -> pa.Array:
    """Which cells hold anything."""
    length = pc.list_value_length if column.type == TEXTS else pc.binary_length
    return pc.fill_null(pc.greater(length(column), 0), False)
