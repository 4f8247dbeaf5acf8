"""Which captions of a source are dropped: the file that `clip-lite score` and its page write."""

import json
import shlex
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydantic
from pydantic.dataclasses import dataclass

from clip_lite_jax.config import explain, from_dict
from clip_lite_jax.config.types import STRICT, NonNegativeInt
from clip_lite_jax.data.pairs import FileImages, Pairs, RemoteImages
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source, fingerprint
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.files import SKIPPED_FILE, read_json, read_json_lines, replacing, write_atomic

FORMAT = "clip-lite decisions 1"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Decision:
    """What becomes of one pair."""

    split: str
    id: str
    caption: NonNegativeInt
    """Place among the captions of the example."""
    drop: bool


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Decisions:
    """Pairs that are dropped, and others that were looked at and stay."""

    format: str
    source: str
    """`data.sources.fingerprint` of what was looked at."""
    decisions: tuple[Decision, ...]

    def __post_init__(self) -> None:
        dropped: dict[tuple[str, str], set[int]] = {}
        for one in self.decisions:
            if one.drop:
                dropped.setdefault((one.split, one.id), set()).add(one.caption)
        object.__setattr__(self, "_dropped", dropped)

    @property
    def dropped(self) -> Mapping[tuple[str, str], set[int]]:
        """Places of dropped captions by split and id."""
        return self._dropped  # type: ignore[attr-defined]

    def kept(self, split: str, example: Example) -> tuple[str, ...]:
        """The captions of an example that stay."""
        gone = self.dropped.get((split, example.id), set())
        return tuple(text for place, text in enumerate(example.captions) if place not in gone)

    def check(self, sources: Mapping[str, Source]) -> None:
        """Raises `DataError` unless they were made for these splits."""
        if self.source != fingerprint(dict(sources)):
            raise DataError(
                "the decisions are about another source, or this one has changed since (other "
                "examples, captions or splits): run `clip-lite score` on it, and decide anew"
            )


def make_decisions(source: str, decisions: Iterable[Decision]) -> Decisions:
    return Decisions(format=FORMAT, source=source, decisions=tuple(decisions))


def as_json(decisions: Decisions) -> dict[str, Any]:
    """Plain data, as `read_decisions` takes it."""
    listed = [
        {"split": d.split, "id": d.id, "caption": d.caption, "drop": d.drop}
        for d in decisions.decisions
    ]
    return {"format": decisions.format, "source": decisions.source, "decisions": listed}


def write_decisions(path: Path, decisions: Decisions) -> None:
    write_atomic(path, json.dumps(as_json(decisions), indent=1) + "\n")


@lru_cache(maxsize=2)
def read_decisions(path: str | Path) -> Decisions:
    """The decisions in a file; each shard of a conversion asks for them.

    Raises:
      DataError: it is no such file.
    """
    if not Path(path).is_file():
        raise DataError(f"--decisions {path}: no such file")
    found = read_json(Path(path))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(
            f"{path} holds no decisions: the review page of `clip-lite score` exports them, "
            f'with "format": "{FORMAT}"'
        )
    try:
        return from_dict(Decisions, found)
    except (ConfigError, pydantic.ValidationError) as error:
        reason = explain(error) if isinstance(error, pydantic.ValidationError) else error
        raise DataError(f"{path}: {reason}") from error


def is_a_table_of_files(sources: Mapping[str, Source]) -> bool:
    """Whether all images are files below one folder, so that a table can name them."""
    roots = _roots(sources)
    return roots is not None and len(roots) == 1


def check_table(sources: Mapping[str, Source]) -> None:
    """Raises `DataError` where a table cannot name the images."""
    if (roots := _roots(sources)) is None:
        raise DataError(
            "only sources whose images are files can be written as a table of them: "
            "--format records"
        )
    if len(roots) != 1:
        raise DataError(
            f"the images lie below {len(roots)} folders ({', '.join(sorted(roots))}), and a table "
            "names those of one: --format records"
        )


def _roots(sources: Mapping[str, Source]) -> set[str] | None:
    """The folders that the images are files below; None where some are none."""
    roots = set()
    for source in sources.values():
        if not isinstance(source, Pairs):
            return None
        if not isinstance(source.images, (FileImages, RemoteImages)):
            return None
        roots.add(str(source.images.root))
    return roots


def write_table(path: Path, sources: Mapping[str, Source], decisions: Decisions) -> str:
    """Writes the pairs that are kept as JSON lines; says how to train on them.

    Raises:
      DataError: the images are not files below one folder.
    """
    check_table(sources)
    decisions.check(sources)
    written = total = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for split, source in sources.items():
            assert isinstance(source, Pairs)
            assert isinstance(source.images, (FileImages, RemoteImages))
            for index in range(len(source)):
                example = source.metadata(index)
                captions = decisions.kept(split, example)
                total += len(example.captions)
                written += len(captions)
                if captions:
                    image = source.images.paths[source.row(index)].as_py()
                    row = {"image": image, "caption": list(captions), "split": split}
                    file.write(json.dumps(row | {"group": example.group}) + "\n")
            root = str(source.images.root)
    told = train_with(source=path, image_folder=root, split_column="split", group_column="group")
    return f"{written:,} of {total:,} pairs written\n{told}"


def train_with(**fields: object) -> str:
    """What a shell takes to train on what was written, by fields of data."""
    given = (shlex.quote(f"--config.data.{name}={value}") for name, value in fields.items())
    return f"train with {' '.join(given)}"


def unread_in(folder: Path) -> int:
    """How many pictures a conversion left out that it could not read, by its own list."""
    listed = read_json_lines(folder / SKIPPED_FILE)
    return sum("cannot be read" in str(one.get("reason", "")) for one in listed)
