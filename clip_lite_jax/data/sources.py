"""Where pairs come from: named splits of random-access sequences of `Example`.

Files come from strangers.  What cannot be used is listed with its reason in `BadExamples`, and a
path never leaves the folder it belongs to.
"""

import csv
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import shapes
from clip_lite_jax.data.records import Example, RecordSource
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.files import read_json_lines

SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}
"""Other words for a split that tables use."""

EMOJI_FILE = Path(__file__).parent / "builtin" / "emoji.arrayrecord"


class Source(Protocol):
    """Random access to examples; safe to share between threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example with its encoded image (empty where the image cannot be read)."""
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
        for index in range(len(source)):
            example = source.metadata(index)
            fields = (split, example.id, example.group, *example.captions, "\n")
            digest.update("\x00".join(fields).encode())
    return digest.hexdigest()


class BadExamples:
    """The examples that could not be used, each once, with the reason; kept in a JSONL file."""

    def __init__(self, path: Path | None = None, max_share: float = 1.0, total: int = 0) -> None:
        """Raises no error until more than `max_share` of `total` examples are bad."""
        self.path, self.max_share, self.total = path, max_share, total
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        if path is not None and path.exists():
            self._reasons = {item["id"]: item["reason"] for item in read_json_lines(path)}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, id: str, reason: str) -> None:
        """Lists an example; raises `DataError` when too large a share of the source is bad."""
        with self._lock:
            if id in self._reasons:
                return
            self._reasons[id] = reason
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"id": id, "reason": reason}) + "\n")
        self._check()

    def expect(self, total: int) -> None:
        """Says how many examples there are, bad ones included; raises as `add` does."""
        self.total = total
        self._check()

    def _check(self) -> None:
        if self.total and len(self) > self.max_share * self.total:
            id, reason = next(reversed(self._reasons.items()))
            raise DataError(
                f"{len(self)} of {self.total} examples cannot be used (data.max_bad_share="
                f"{self.max_share}); the latest: {id}: {reason}; all are listed in {self.path}"
            )


def build_sources(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """The splits of the source that `config` names; unusable examples are added to `bad`.

    Raises:
      DataError: an unknown source, or a file that does not hold what it should.
    """
    if config.source in SOURCES:
        splits = SOURCES[config.source](config, bad)
    elif Path(config.source).suffix.lower() in (".csv", ".tsv"):
        splits = read_table(config, bad)
    else:
        known = ", ".join(sorted(SOURCES))
        raise DataError(
            f"data.source={config.source!r}: neither a built-in source ({known}) nor the path of a "
            ".csv or .tsv table"
        )
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

    def chosen(index: int) -> bool:
        # Not the hash of `split_of`: what that left to train on is no even draw.
        return _uniform(f"train_share {source.metadata(index).group}") < share

    chosen_ones = Chosen(source, [index for index in range(len(source)) if chosen(index)])
    if not len(chosen_ones):
        raise DataError(f"data.train_share={share} of {len(source)} training examples is none")
    return chosen_ones


def read_emoji(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """The built-in emoji pairs; see ``data/builtin/NOTICE.md`` for their makers and licences."""
    del config, bad
    records = RecordSource(EMOJI_FILE)
    splits: dict[str, RecordSplit] = defaultdict(lambda: RecordSplit(records))
    for index in range(len(records)):
        example = records[index]
        splits[example.attributes["split"]].append(index, replace(example, image=b""))
    return dict(splits)


def read_shapes(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """Drawn scenes whose captions carry a known amount of information."""
    del bad
    return dict(shapes.build_splits(config.shapes, config.image_size))


SOURCES: dict[str, Callable[[DataConfig, BadExamples], dict[str, Source]]] = {
    "emoji": read_emoji,
    "shapes": read_shapes,
}


class Chosen:
    """Some of the examples of a source, in its order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]

    def metadata(self, index: int) -> Example:
        return self.source.metadata(self.indices[index])


class RecordSplit:
    """Some of the records of a file; what is not image is kept in memory."""

    def __init__(self, records: RecordSource) -> None:
        self.records = records
        self.indices: list[int] = []
        self.rows: list[Example] = []

    def append(self, index: int, metadata: Example) -> None:
        self.indices.append(index)
        self.rows.append(metadata)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.records[self.indices[index]]

    def metadata(self, index: int) -> Example:
        return self.rows[index]


class ImageFiles:
    """Examples whose images lie in files under one folder."""

    def __init__(self, root: Path, rows: Sequence[Example]) -> None:
        """`rows` have the path relative to `root` as their id and no image yet."""
        self.root, self.rows = root, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        try:
            image = (self.root / row.id).read_bytes()
        except OSError:  # the decoder reports it: an empty image is a bad example
            image = b""
        return replace(row, image=image)

    def metadata(self, index: int) -> Example:
        return self.rows[index]


def read_table(config: DataConfig, bad: BadExamples) -> dict[str, Source]:
    """Pairs from a CSV or TSV file with a header: one row per caption or per image.

    Rows of one image become one example with all its captions.  Image paths are relative to the
    table's folder and may not leave it.  Rows without a caption and rows whose file is missing are
    listed in `bad` and left out; broken images are found when they are read.

    Raises:
      DataError: no such file, a missing column, text that is not UTF-8, or no usable row.
    """
    path = Path(config.source)
    root = path.parent.resolve()
    rows = _table_rows(path, config)
    captions: dict[str, list[str]] = defaultdict(list)
    first: dict[str, dict[str, str]] = {}
    for number, row in rows:
        name = row[config.image_column].strip()
        texts = [text for column in config.caption_columns if (text := row[column].strip())]
        try:
            key = _image_key(root, name)
            if not texts:
                raise BadImage("empty caption")
        except BadImage as error:
            bad.add(f"{path.name}:{number}: {name}", str(error))
            continue
        first.setdefault(key, row)
        captions[key] += [text for text in texts if text not in captions[key]]
    bad.expect(len(first) + len(bad))
    examples: dict[str, list[Example]] = defaultdict(list)
    for key, row in first.items():
        # An empty cell is no group: the rows without one do not all show the same thing.
        group = (row[config.group_column].strip() if config.group_column else "") or key
        stated = row[config.split_column].strip().lower() if config.split_column else ""
        split = SPLIT_NAMES.get(stated, stated)
        if split not in ("train", "validation", "test", ""):
            raise DataError(
                f"{path}: {config.split_column}={stated!r} for {key}: a split is train, validation"
                " or test, or empty to let a hash decide"
            )
        split = split or split_of(group, config.held_out)
        examples[split].append(Example(key, group, tuple(captions[key]), b"", {"split": split}))
    if not first:
        raise DataError(f"{path}: no usable row; {len(bad)} are listed in {bad.path}")
    return {split: ImageFiles(root, chosen) for split, chosen in sorted(examples.items())}


def _image_key(root: Path, name: str) -> str:
    """The path of an existing file relative to `root`; raises `BadImage` for anything else."""
    if not name:
        raise BadImage("no image path")
    try:
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            raise BadImage(f"the path leaves {root}")
        if not target.is_file():
            raise BadImage("no such file")
    except (OSError, ValueError) as error:  # a name no file can have: too long, a null byte
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"not a path: {error}") from error
    return str(target.relative_to(root))


def _table_rows(path: Path, config: DataConfig) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of every row; cells that a short row lacks are empty."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    needed = [config.image_column, *config.caption_columns]
    needed += [c for c in (config.group_column, config.split_column) if c]
    line = 1
    try:
        # utf-8-sig: spreadsheets put a byte-order mark before the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, restval="", strict=True)
            for column in needed:
                if column not in (reader.fieldnames or ()):
                    raise DataError(
                        f"{path}: no column {column!r}; it has {', '.join(reader.fieldnames or ())}"
                        ". Name yours with data.image_column and data.caption_columns"
                    )
            rows = []
            for row in reader:
                line = reader.line_num
                rows.append((line, row))
            return rows
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(
            f"{path}, after line {line}: {error}; a caption that holds a quotation mark needs "
            'quotes around it, and the mark twice: "the ""big"" dog"'
        ) from error
    except OSError as error:
        raise DataError(f"data.source={path}: {error}") from error


def split_of(group: str, held_out: float) -> str:
    """train, validation or test by a hash of the group: stable when other rows come or go."""
    share = _uniform(group)
    return "test" if share < held_out else "validation" if share < 2 * held_out else "train"


def _uniform(text: str) -> float:
    """A hash in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
