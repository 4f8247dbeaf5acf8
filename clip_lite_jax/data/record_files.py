"""Whole data sets in ArrayRecord files: our own, and those of TensorFlow Datasets."""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.index import indices
from clip_lite_jax.data.pairs import Found, Images, RecordImages
from clip_lite_jax.data.records import Example, RecordSource
from clip_lite_jax.data.rows import TEXT, Rows, all_different, array, in_one_piece
from clip_lite_jax.data.shards import shard_paths
from clip_lite_jax.data.splits import splits_of_files
from clip_lite_jax.errors import BadImage, DataError, Unreadable
from clip_lite_jax.places import Place, each, is_remote, stamp_of

TFDS = "tfds:"
"""Before the name of a data set that TensorFlow Datasets has prepared."""


def read_records(config: DataConfig) -> Found:
    """Files that ``clip-lite data convert`` wrote: one, a folder, or a pattern.

    An example's split is its attribute of that name, or else the one that its file's name begins
    with.

    Raises:
      DataError: no such files.
    """
    paths = shard_paths(config.source, ".arrayrecord")
    list(each(os.fspath, paths))  # of remote files a copy, several at a time
    tables = list(indices(paths, _index_records, ("records", 1), config.threads))
    owner = np.repeat(np.arange(len(paths), dtype=np.int32), [len(table) for table in tables])
    number = np.concatenate([np.arange(len(table)) for table in tables])
    images = RecordImages(tuple(map(RecordSource, paths)), owner, number)
    found = _of_index(config.source, pa.concat_tables(tables), images)
    if found.splits is None:
        found = replace(found, splits=splits_of_files([path.name for path in paths], owner))
    found = replace(found, ids=_told_apart(found.ids, found.splits))
    return replace(found, place=lambda row: f"{paths[owner[row]].name}, record {number[row]}")


def _told_apart(ids: pa.Array, splits: pa.Array | None) -> pa.Array:
    """Ids that several records have, with the split before them: pictures of one name may have come
    from two tables, and what has one id is one image."""
    if splits is None or all_different(ids):
        return ids
    counts = ids.value_counts()
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    named = pc.binary_join_element_wise(splits, ids, pa.scalar("/", TEXT))
    return pc.if_else(pc.is_in(ids, several), named, ids)


def _index_records(path: Place) -> pa.Table:
    source = RecordSource(path)
    try:
        count = len(source)
    except ValueError as error:
        raise DataError(str(error)) from error

    def examples() -> Iterator[tuple[Example, str]]:
        for index in range(count):
            try:
                yield source[index], ""
            except ValueError as error:
                yield Example(f"record {index}", "", (), b"", {}), str(error)

    return index_table(examples())


def index_table(examples: Iterator[tuple[Example, str]]) -> pa.Table:
    """Examples without images, each with the reason why it cannot be used, or nothing."""
    found, reasons = [], []
    for example, reason in examples:
        found.append(replace(example, image=b""))
        reasons.append(reason)
    rows = Rows.of(found)
    names = [example.attributes.get("split", "") for example in found]
    return pa.table(
        {
            "id": rows.ids,
            "group": rows.groups,
            "captions": rows.captions,
            "attributes": rows.attributes,
            "split": array(names, TEXT),
            "reason": array(reasons, TEXT),
        }
    )


def _of_index(source: str, table: pa.Table, images: Any) -> Found:
    def column(name: str) -> pa.Array:
        return in_one_piece(table[name].chunks, table.schema.field(name).type)

    splits, reasons = column("split"), column("reason")
    refused = np.flatnonzero(np.asarray(pc.binary_length(reasons)))
    return Found(
        source,
        images,
        column("id"),
        [column("captions")],
        column("group"),
        splits if pc.any(pc.not_equal(splits, "")).as_py() else None,
        bad={row: reasons[row].as_py() for row in refused.tolist()},
        attributes=column("attributes"),
    )


def read_tfds(config: DataConfig) -> Found:
    """A data set of TensorFlow Datasets, prepared as ArrayRecord: ``tfds:NAME`` or its folder.

    TensorFlow is not needed.  Columns are features, nested ones as ``captions/text``; a feature of
    classes becomes `data.class_caption`.  ``restval`` (of coco_captions) is for training.

    Raises:
      DataError: not prepared, prepared in another format, or without these features.
    """
    builder = _builder(config.source)
    folder = Path(builder.data_path)
    info = [folder / "dataset_info.json"]
    settings = (config.image_column, *config.caption_columns, config.group_column or "")
    make = partial(_index_tfds, config=config)
    version = ("tfds", 1, *settings, config.class_caption)
    (table,) = indices(info, make, version, processes=1)
    counts = {name: builder.info.splits[name].num_examples for name in sorted(builder.info.splits)}
    owner = np.repeat(np.arange(len(counts), dtype=np.int32), list(counts.values()))
    number = np.concatenate([np.arange(count) for count in counts.values()])
    images = TfdsImages(str(folder), tuple(counts), config.image_column, owner, number)
    return _of_index(config.source, table, images)


class TfdsImages(Images):
    """Encoded images of a prepared data set."""

    def __init__(
        self,
        folder: str,
        splits: Sequence[str],
        feature: str,
        owner: np.ndarray,
        number: np.ndarray,
    ) -> None:
        """`owner` ``[N]``: the split of each row; `number` ``[N]``: its place there."""
        self.folder, self.splits, self.feature = folder, tuple(splits), feature
        self.owner, self.number = owner, number
        self._lock = threading.Lock()
        self._opened: dict[str, Any] = {}

    def read(self, index: int) -> bytes:
        split = self.splits[self.owner[index]]
        with self._lock:
            if split not in self._opened:
                builder = _builder(self.folder)
                self._opened[split] = _data_source(builder, split, self.feature)
        try:
            return feature_of(self._opened[split][int(self.number[index])], self.feature)
        except OSError as error:
            raise Unreadable(f"{self.folder}, {split} {self.number[index]}: {error}") from error
        # A damaged record fails anywhere between ArrayRecord, protocol buffers and NumPy.
        except Exception as error:
            raise BadImage(f"{self.folder}, {split} {self.number[index]}: {error}") from error

    def stamp(self, index: int) -> str:
        """That of the whole data set: which of its files an example is in is for TFDS to know."""
        del index
        return self._stamp

    @cached_property
    def _stamp(self) -> str:
        files = sorted(Path(self.folder).iterdir())
        known = "\n".join(f"{file.name} {stamp_of(file)}" for file in files)
        return hashlib.blake2b(known.encode(errors="replace"), digest_size=16).hexdigest()

    def take(self, indices: np.ndarray) -> "TfdsImages":
        owner, number = self.owner[indices], self.number[indices]
        return TfdsImages(self.folder, self.splits, self.feature, owner, number)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.splits, self.feature, self.owner, self.number)


def _builder(source: str) -> Any:
    import tensorflow_datasets as tfds  # takes a second

    name = source.removeprefix(TFDS)
    if is_remote(name):
        raise DataError(
            f"data.source={source!r}: prepared data sets of TFDS are read from a local disk. Copy "
            "the folder there; or convert it there once with `clip-lite data convert` and read "
            "the records from the bucket"
        )
    try:
        if Path(name).is_dir():
            return tfds.builder_from_directory(name)
        builder = tfds.builder(name)
    except Exception as error:  # it has no common class for what can be wrong
        raise DataError(f"data.source={source!r}: {error}") from error
    if not builder.is_prepared():
        raise DataError(
            f"data.source={source!r} is not prepared in {builder.data_path}: run "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        )
    return builder


def _data_source(builder: Any, split: str, image: str) -> Any:
    import tensorflow_datasets as tfds

    decoders: dict[str, Any] = {image: tfds.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split, decoders=decoders)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise DataError(
            f"{builder.data_path}: {error}. Data sets are read as ArrayRecord, and images from a "
            f"feature of that name (data.image_column={image!r}; there are "
            f"{', '.join(builder.info.features)})"
        ) from error


@cache
def tfds_features() -> Any:
    """What `Example` is in a data set of TensorFlow Datasets, but for its attributes."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "group": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
        }
    )


def write_tfds_metadata(
    folder: Path, name: str, lengths: Mapping[str, Sequence[int]], sizes: Mapping[str, int]
) -> None:
    """Makes a folder of shards of `tfds_features` one that `tfds.builder_from_directory` reads.

    `lengths` are the examples of each shard of each split, `sizes` the bytes of each split; the
    shards are named ``NAME-SPLIT.array_record-00000-of-00002``.
    """
    import tensorflow_datasets as tfds

    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=list(counts),
            num_bytes=sizes[split],
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=name, data_dir=folder, split=split, filetype_suffix="array_record"
            ),
        )
        for split, counts in lengths.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds_features(),
        split_infos=splits,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,  # that would need TensorFlow
    )


def feature_of(example: Mapping[str, Any], name: str) -> Any:
    """A feature by its name, ``captions/text``; raises ``KeyError`` where there is none."""
    if name in example:
        return example[name]
    first, slash, rest = name.partition("/")
    if not slash:
        raise KeyError(name)
    return feature_of(example[first], rest)


def _index_tfds(info: Place, config: DataConfig) -> pa.Table:
    builder = _builder(str(info.parent))
    columns, group = list(config.caption_columns), config.group_column
    classes = {}
    for name in [*columns, *([group] if group else [])]:
        try:
            feature = feature_of(builder.info.features, name)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{info.parent}: no feature {name!r} for data.caption_columns or "
                f"data.group_column; there are {', '.join(builder.info.features)}, and parts of "
                "them as captions/text"
            ) from error
        if hasattr(feature, "int2str"):
            classes[name] = feature.int2str

    def text(name: str, value: Any) -> str:
        if name in classes:
            value = classes[name](int(value))
            return config.class_caption.replace("{}", value) if name in columns else value
        return value.decode() if isinstance(value, bytes) else str(value)

    def examples() -> Iterator[tuple[Example, str]]:
        for split in sorted(builder.info.splits):
            source = _data_source(builder, split, config.image_column)
            attributes = {"split": "train" if split == "restval" else split}
            for number in range(len(source)):
                id, reason, captions, key = f"{split}/{number}", "", [], ""
                try:
                    example = source[number]
                    for name in columns:
                        values = feature_of(example, name)
                        if not isinstance(values, (list, tuple, np.ndarray)):
                            values = [values]
                        captions += [text(name, value).strip() for value in values]
                    key = text(group, feature_of(example, group)) if group else ""
                except Exception as error:  # see `TfdsImages.read`
                    reason = f"cannot be read: {error}"
                yield Example(id, key, tuple(filter(None, captions)), b"", attributes), reason

    return index_table(examples())
