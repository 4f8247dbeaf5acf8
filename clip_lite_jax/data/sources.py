"""Where pairs come from: named splits of random-access sequences of `Example`.

Files come from strangers.  What cannot be used is listed with its reason in `BadExamples`, and a
path never leaves the folder it belongs to.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pydantic

from clip_lite_jax.config import DataConfig, explain
from clip_lite_jax.data import (
    annotations,
    folders,
    labelled,
    parquet,
    record_files,
    refcoco,
    shapes,
    shards,
    tables,
)
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.leaks import leaks_into_training
from clip_lite_jax.data.pairs import Found, Pairs, RecordImages, build_pairs
from clip_lite_jax.data.records import Example, RecordSource
from clip_lite_jax.data.rows import Rows, texts
from clip_lite_jax.data.splits import uniform
from clip_lite_jax.errors import DataError
from clip_lite_jax.places import Place, place

log = logging.getLogger(__name__)

EMOJI_FILE = Path(__file__).parent / "builtin" / "emoji.arrayrecord"


class Source(Protocol):
    """Random access to examples; safe to share between threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example with its encoded image; raises `BadImage` where there is none."""
        ...

    def metadata(self, index: int) -> Example:
        """The example without its image: cheap."""
        ...


@runtime_checkable
class IndependentPairs(Source, Protocol):
    """Independent draws from one distribution P, whose mutual information is known.

    The caption of any other example, equal or not, is then a fair draw from the product of the
    marginals: masking equal captions would bias Q, and training does not.
    """

    @property
    def true_information(self) -> float:
        """I(image; caption) in nats."""
        ...


def captions_of(source: Source) -> Iterator[str]:
    """All captions of all examples."""
    for index in range(len(source)):
        yield from source.metadata(index).captions


def fingerprint(sources: Mapping[str, Source]) -> str:
    """A hash of the ids, groups and captions of all splits: do the data of a run stay the same?"""
    digest = hashlib.blake2b(digest_size=16)
    for split, source in sorted(sources.items()):
        digest.update(f"{split}\x00{len(source)}\n".encode())
        _update(digest, source)
    return digest.hexdigest()


def _update(digest: Any, source: Source) -> None:
    if isinstance(source, Pairs):
        source.rows.update(digest, source.indices)
    elif isinstance(source, Mixture):
        for name, part in source.parts.items():
            digest.update(f"{name}\x00{len(part)}\n".encode())
            _update(digest, part)
    else:
        rows = Rows.of(source.metadata(index) for index in range(len(source)))
        rows.update(digest, np.arange(len(rows)))


def build_sources(config: DataConfig, bad: BadExamples, training: bool = True) -> dict[str, Source]:
    """The splits of the source that `config` names; unusable examples are added to `bad`.

    Raises:
      DataError: an unknown source, or a file that does not hold what it should; for `training`
        also nothing to train on, or pictures that other splits hold, too.
    """
    splits = _mixed(config, bad) if config.mixture else _splits(config, bad)
    if not training:
        return splits
    if bare := [split for split, source in splits.items() if _captionless(source)]:
        raise DataError(
            f"{', '.join(bare)}: pictures without captions (data.format='pictures') can be encoded "
            "and searched, not trained on or evaluated with"
        )
    if not len(splits.get("train", ())):
        named = "data.mixture" if config.mixture else f"data.source={config.source!r}"
        raise DataError(f"{named} holds nothing to train on")
    # Within one source no picture is in two splits.
    several = config.splits or config.mixture
    if several and not config.allow_leaks and (leaks := leaks_into_training(splits)):
        raise DataError(
            f"{'; '.join(map(str, leaks))}: what is measured there would be too good. `clip-lite "
            "data splits` writes training data without them; data.allow_leaks=True takes them"
        )
    return splits


def _captionless(source: Source) -> bool:
    if isinstance(source, Mixture):
        return any(map(_captionless, source.parts.values()))
    return len(source) > 0 and not source.metadata(0).captions


def _splits(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    if config.source in SOURCES:
        splits = SOURCES[config.source](config, bad)
    else:
        split = "train" if config.splits else None
        splits = dict(build_pairs(_read(config), config, bad, split))
    for split, path in config.splits.items():
        if split in splits:
            raise DataError(f"data.splits names {split!r}, which data.source={config.source!r} is")
        splits |= build_pairs(_read(replace(config, source=path)), config, bad, split)
    if config.train_share < 1 and "train" in splits:
        splits["train"] = _share_of(splits["train"], config.train_share)
    return splits


def _read(config: DataConfig) -> Found:
    name = format_of(config)
    log.info("%s is read as %s (data.format)", config.source, name)
    return FORMATS[name](config)


def _mixed(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """The splits of all parts of a mixture, each part's examples after those of the one before."""
    if config.source not in ("", DataConfig().source):
        raise DataError(
            f"data.source={config.source!r} beside data.mixture: make it a part of the mixture, or "
            "leave it empty (--config.data.source=)"
        )
    parts: dict[str, dict[str, Source]] = {}
    for name, part in config.mixture.items():
        try:
            own = replace(config, mixture={}, source=part.source, **part.fields)
        except pydantic.ValidationError as error:
            raise DataError(f"data.mixture.{name}.fields: {explain(error)}") from error
        found = BadExamples()
        try:
            parts[name] = build_sources(own, found, training=False)
        finally:
            bad.expect(bad.total + found.total)
            bad.extend((f"{name}/{id}", reason) for id, reason in found.reasons.items())
    mixed: dict[str, Source] = {}
    for split in dict.fromkeys(split for splits in parts.values() for split in splits):
        sources = {name: splits[split] for name, splits in parts.items() if split in splits}
        mixed[split] = Mixture(sources, shares(config, sources))
    return mixed


KINDS = ("weight", "epochs")


def shares(config: DataConfig, sources: Mapping[str, Source]) -> np.ndarray:
    """The part of the examples that each source of a mixture gives, float64, its sum 1.

    A source's `weight` counts, or `epochs` times its size; of one that states neither, its size to
    the power of 1 / `data.mixture_temperature`.

    Raises:
      DataError: some parts state weights and others not, which then mean nothing beside sizes.
    """
    parts = [config.mixture[name] for name in sources]
    sizes = np.array([len(source) for source in sources.values()], np.float64)
    weighted, counted = ([getattr(part, key) is not None for part in parts] for key in KINDS)
    if all(weighted) and not any(counted):
        weights = np.array([part.weight for part in parts], np.float64)
    elif all(counted) and not any(weighted):
        weights = sizes * np.array([part.epochs for part in parts], np.float64)
    elif not any(weighted) and not any(counted):
        weights = sizes ** (1 / config.mixture_temperature)
    else:
        raise DataError("data.mixture: give all parts a weight, or all of them epochs, or none any")
    return weights / weights.sum()


@dataclass(frozen=True)
class Mixture:
    """Several sources as one, each with its name before its ids and groups."""

    parts: Mapping[str, Source]
    shares: np.ndarray
    """float64 ``[parts]``: how much of what is drawn each part gives."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 ``[parts + 1]``: the first example of each part, and the end."""
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts.values()])])

    def __getitem__(self, index: int) -> Example:
        name, part, place = self.located(index)
        return _named(name, part[place])

    def metadata(self, index: int) -> Example:
        name, part, place = self.located(index)
        return _named(name, part.metadata(place))

    def stamp(self, index: int) -> str:
        _, part, place = self.located(index)
        return part.stamp(place) if isinstance(part, Pairs) else ""

    def located(self, index: int) -> tuple[str, Source, int]:
        """The name of the part that an example is of, that part, and its place there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        name, part = list(self.parts.items())[number]
        return name, part, index - int(self.starts[number])


def _named(name: str, example: Example) -> Example:
    return replace(example, id=f"{name}/{example.id}", group=f"{name}/{example.group}")


def _share_of(source: Source, share: float) -> Source:
    """The examples whose group is chosen by its hash."""
    if isinstance(source, IndependentPairs):
        raise DataError(
            f"data.train_share={share}: these pairs are drawn to order; set how many there are, "
            "data.shapes.examples"
        )

    assert isinstance(source, Pairs)
    groups = texts(source.rows.groups, source.indices)
    # Not the hash of `splits`: what that left to train on is no even draw.
    chosen = np.flatnonzero(uniform(groups, "train_share ") < share)
    if not len(chosen):
        raise DataError(f"data.train_share={share} of {len(source)} training examples is none")
    return source.chosen(chosen)


def read_emoji(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """The built-in emoji pairs; see ``data/builtin/NOTICE.md`` for their makers and licences."""
    del config, bad
    records = RecordSource(EMOJI_FILE)
    examples = [replace(records[index], image=b"") for index in range(len(records))]
    numbers = np.arange(len(records))
    rows, images = Rows.of(examples), RecordImages((records,), np.zeros_like(numbers), numbers)
    names = np.array([example.attributes["split"] for example in examples])
    return {name: Pairs(rows, images, np.flatnonzero(names == name)) for name in np.unique(names)}


def read_shapes(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """Drawn scenes whose captions carry a known amount of information."""
    del bad
    return dict(shapes.build_splits(config.shapes, config.image_size))


FORMATS: dict[str, Callable[[DataConfig], Found]] = {
    "annotations": annotations.read_annotations,
    "cifar": labelled.read_cifar,
    "flickr30k": annotations.read_flickr30k,
    "folder": folders.read_folder,
    "idx": labelled.read_idx,
    "image_folder": folders.read_image_folder,
    "imagenet": labelled.read_imagenet,
    "inaturalist": labelled.read_inaturalist,
    "parquet": parquet.read_parquet,
    "pictures": folders.read_pictures,
    "records": record_files.read_records,
    "refcoco": refcoco.read_refcoco,
    "table": tables.read_table,
    "tfds": record_files.read_tfds,
    "voc": labelled.read_voc,
    "webdataset": shards.read_shards,
}
"""Readers of files, by the name of their format."""

ENDINGS = dict.fromkeys(tables.READERS, "table") | {
    ".arrayrecord": "records",
    ".json": "annotations",
    ".p": "refcoco",
    ".parquet": "parquet",
    ".token": "flickr30k",
    ".tar": "webdataset",
}


def format_of(config: DataConfig) -> str:
    """`data.format`, or the one that the path speaks of.

    Raises:
      DataError: it speaks of none.
    """
    if config.format is not None:
        if config.format not in FORMATS:
            raise DataError(f"data.format={config.format!r}: choose from {', '.join(FORMATS)}")
        return config.format
    if config.source.startswith(record_files.TFDS):
        return "tfds"
    path = place(config.source)
    if path.suffix.lower() in ENDINGS:
        return ENDINGS[path.suffix.lower()]
    if path.is_dir():
        return _format_of_folder(path)
    raise DataError(
        f"data.source={config.source!r}: neither a built-in source ({', '.join(sorted(SOURCES))}) "
        f"nor a folder, nor a file that ends in {', '.join(ENDINGS)}; data.format says what a file "
        "of another name is"
    )


TELLING = {
    "dataset_info.json": "tfds",
    "batches.meta.txt": "cifar",
    "fine_label_names.txt": "cifar",
    "train-images-idx3-ubyte*": "idx",
    labelled.SYNSETS: "imagenet",
    "JPEGImages": "voc",
    "refs(*).p": "refcoco",
}
"""What a folder of a format holds that others do not."""


def _format_of_folder(path: Place) -> str:
    """Shards, a published set, or pictures: with texts beside them, or in folders of classes."""
    for name, format in TELLING.items():
        if next(path.glob(name), None):
            return format
    for ending in (".tar", ".arrayrecord", ".parquet"):
        if next(path.glob(f"*{ending}"), None):
            return ENDINGS[ending]
    some = next(folders.pictures(path))
    return "folder" if next(some.parent.glob("*.txt"), None) else "image_folder"


SOURCES: dict[str, Callable[[DataConfig, BadExamples], dict[str, Source]]] = {
    "emoji": read_emoji,
    "shapes": read_shapes,
}
