"""Examples of a source → projections of the critic, decoded in threads while the device works."""

import fcntl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from clip_lite_jax.apps.identity import width_of
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import resize_and_crop
from clip_lite_jax.data.pairs import FileImages, Pairs
from clip_lite_jax.data.sources import SOURCES, Mixture, Source, build_sources, format_of
from clip_lite_jax.errors import ConfigError, Unreadable
from clip_lite_jax.evaluators.encoding import encode_views
from clip_lite_jax.features import text_encoder
from clip_lite_jax.inference import DualEncoderModel

Item = TypeVar("Item")

Progress = Callable[[int, int], None]
"""Is told how many rows are encoded of how many that have to be."""

WHAT = {"image": ("images",), "text": ("texts",), "both": ("images", "texts")}
"""What can be encoded, and the sets of rows that come of it."""
DTYPES = ("float32", "float16")


class Passing(str):
    """Why there is no row this time: what could not be read may be read at the next run."""


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raises `ConfigError`, which names the choices."""
    if value not in choices:
        raise ConfigError(f"{option} {value}: choose from {', '.join(choices)}")


def open_splits(
    data: DataConfig, what: str, names: Sequence[str], bad: BadExamples
) -> dict[str, Source]:
    """The splits of a source that are named, or all.

    Pictures of a folder need no captions where only they are encoded.

    Raises:
      ConfigError: there is no such split.
      DataError: as `build_sources`.
    """
    built_in = data.mixture or data.source in SOURCES
    alone = what == "image" and not built_in and data.format is None
    if alone and format_of(data) in ("folder", "image_folder"):
        data = replace(data, format="pictures")
    sources = build_sources(data, bad, training=False)
    for name in names:
        check_choice("--split", name, sources)
    return {name: source for name, source in sorted(sources.items()) if not names or name in names}


def stamp(source: Source, index: int) -> str:
    """Another text when an example's picture has changed, as far as that is cheap to tell."""
    return source.stamp(index) if isinstance(source, Pairs | Mixture) else ""


def file_of(source: Source, index: int) -> Path | None:
    """The file of an example's picture, where it has one of its own on this machine."""
    if isinstance(source, Mixture):
        _, part, place = source.located(index)
        return file_of(part, place)
    if isinstance(source, Pairs) and isinstance(source.images, FileImages):
        return source.images.root.absolute() / source.images.paths[source.row(index)].as_py()
    return None


def folders_of(source: Source) -> set[Path]:
    """The folders that such files lie in, or below."""
    if isinstance(source, Mixture):
        return set().union(*map(folders_of, source.parts.values()))
    if isinstance(source, Pairs) and isinstance(source.images, FileImages):
        return {source.images.root.absolute()}
    return set()


def encode_pictures(
    model: DualEncoderModel,
    source: Source,
    indices: Sequence[int],
    threads: int,
    fast: bool = False,
) -> Iterator[np.ndarray | str]:
    """Of each example the projection of its picture, float32 ``[D]``, or why there is none; that is
    a `Passing` where the picture could not be read.

    With `fast` a large JPEG is decoded no larger than twice what the model sees, or little more.
    """
    data = model.config.data
    unreadable: set[int] = set()

    def view(index: int) -> np.ndarray:
        try:
            opened = model.pixels.open(source, index)
        except Unreadable:
            unreadable.add(index)
            raise
        if not fast:
            return model.pixels.view(opened)
        shrink = min(opened.size) / (2 * (data.resize or data.image_size))
        return resize_and_crop(opened.decoded(shrink), data.image_size, data.resize)

    found = encode_views(
        model.fns.image, view, model.pixels.blank, indices, model.batch_size, threads
    )
    for index, row in zip(indices, found, strict=True):
        yield Passing(row) if isinstance(row, str) and index in unreadable else row


class Counter:
    """Tells of every row how many there are by now."""

    def __init__(self, progress: Progress | None, total: int, done: int = 0) -> None:
        self._progress, self._total, self._done = progress, total, done

    def add(self, count: int) -> None:
        self._done += count
        if self._progress and count:
            self._progress(self._done, self._total)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted as it comes."""
        for item in items:
            self.add(1)
            yield item


def encode_texts(model: DualEncoderModel, captions: Sequence[str]) -> np.ndarray:
    """The projections of captions, float32 ``[N, D]``; equal ones are encoded once."""
    if not captions:
        return np.zeros((0, width_of(model)), np.float32)
    places = {text: n for n, text in enumerate(dict.fromkeys(captions))}
    encode = text_encoder(
        model.tokenizer, lambda tokens, mask: np.asarray(model.fns.text(tokens, mask), np.float32)
    )
    rows = np.concatenate(list(encode(list(places))))
    return rows[[places[text] for text in captions]]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes from writing to it meanwhile.

    Raises:
      ConfigError: another does, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process writes to {folder}: wait for its end") from error
        yield
