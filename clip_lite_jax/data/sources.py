"""Where pairs come from: named splits of random-access sequences of `Example`.

Files come from strangers.  What cannot be used is listed with its reason in `BadExamples`, and a
path never leaves the folder it belongs to.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import annotations, folders, parquet, record_files, shapes, shards, tables
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.pairs import Found, Pairs, RecordImages, build_pairs
from clip_lite_jax.data.records import Example, RecordSource
from clip_lite_jax.data.rows import Rows, texts
from clip_lite_jax.data.splits import uniform
from clip_lite_jax.errors import DataError

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
        if isinstance(source, Pairs):
            source.rows.update(digest, source.indices)
        else:
            rows = Rows.of(source.metadata(index) for index in range(len(source)))
            rows.update(digest, np.arange(len(rows)))
    return digest.hexdigest()


def build_sources(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """The splits of the source that `config` names; unusable examples are added to `bad`.

    Raises:
      DataError: an unknown source, or a file that does not hold what it should.
    """
    if config.source in SOURCES:
        splits = SOURCES[config.source](config, bad)
    else:
        splits = dict(build_pairs(FORMATS[format_of(config)](config), config, bad))
    if not len(splits.get("train", ())):
        raise DataError(f"data.source={config.source!r} holds nothing to train on")
    if config.train_share < 1:
        splits["train"] = _share_of(splits["train"], config.train_share)
    return splits


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
    "flickr30k": annotations.read_flickr30k,
    "folder": folders.read_folder,
    "image_folder": folders.read_image_folder,
    "parquet": parquet.read_parquet,
    "records": record_files.read_records,
    "table": tables.read_table,
    "tfds": record_files.read_tfds,
    "webdataset": shards.read_shards,
}
"""Readers of files, by the name of their format."""

ENDINGS = dict.fromkeys(tables.READERS, "table") | {
    ".arrayrecord": "records",
    ".json": "annotations",
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
    path = Path(config.source)
    if path.suffix.lower() in ENDINGS:
        return ENDINGS[path.suffix.lower()]
    if path.is_dir():
        return _format_of_folder(path)
    raise DataError(
        f"data.source={config.source!r}: neither a built-in source ({', '.join(sorted(SOURCES))}) "
        f"nor a folder, nor a file that ends in {', '.join(ENDINGS)}; data.format says what a file "
        "of another name is"
    )


def _format_of_folder(path: Path) -> str:
    """Shards, or pictures: with texts beside them, or in folders of classes."""
    if (path / "dataset_info.json").is_file():
        return "tfds"
    for ending in (".tar", ".arrayrecord", ".parquet"):
        if next(path.glob(f"*{ending}"), None):
            return ENDINGS[ending]
    some = next(folders.pictures(path))
    return "folder" if next(some.parent.glob("*.txt"), None) else "image_folder"


SOURCES: dict[str, Callable[[DataConfig, BadExamples], dict[str, Source]]] = {
    "emoji": read_emoji,
    "shapes": read_shapes,
}
