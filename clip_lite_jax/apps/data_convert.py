"""``clip-lite data convert``: any source as ArrayRecord files, in pieces that a kill does not lose.

A shard is written whole or not at all, and beside it what it left out; a conversion that was
stopped goes on with the shards that are missing.  `convert_shard` does the work, here in processes
of this machine and in `data_beam` wherever Apache Beam runs.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_lite_jax.apps.data_jobs import as_text, from_text, open_sources, run_jobs, sources_of
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.record_files import tfds_features, write_tfds_metadata
from clip_lite_jax.data.records import Example, encode_record, write_raw_records
from clip_lite_jax.data.sources import Source, fingerprint
from clip_lite_jax.errors import BadImage, ConfigError
from clip_lite_jax.files import read_json, write_atomic

SETTINGS_FILE, MANIFEST_FILE, SKIPPED_FILE = "convert.json", "manifest.json", "skipped.jsonl"
FORMATS = ("records", "tfds")


@dataclass(frozen=True)
class Conversion:
    """What is to become of a source."""

    data: str
    """The `DataConfig` of the source, as JSON: conversions are compared and travel."""
    folder: str
    format: str = "records"
    """``records``: ours.  ``tfds``: what `tfds.builder_from_directory` reads."""
    resize: int | None = None
    """Pictures whose shorter side is longer than this are written smaller."""
    per_shard: int = 4096
    check: bool = True
    """Decode every picture and leave out those that cannot be; else only what is not there."""
    name: str = "pairs"
    """Of the data set, for ``tfds``."""


@dataclass(frozen=True)
class Job:
    """One shard."""

    conversion: Conversion
    split: str
    number: int
    shards: int

    @property
    def path(self) -> Path:
        place = f"{self.number:05}-of-{self.shards:05}"
        if self.conversion.format == "tfds":
            name = f"{self.conversion.name}-{self.split}.array_record-{place}"
        else:
            name = f"{self.split}-{place}.arrayrecord"
        return Path(self.conversion.folder, name)

    @property
    def note(self) -> Path:
        """The file that says what the shard holds, written after it."""
        return self.path.with_name(f".{self.path.name}.json")


@dataclass(frozen=True)
class Done:
    """What became of a shard."""

    split: str
    number: int
    written: int
    size: int
    """In bytes."""
    bad: Sequence[tuple[str, str]]
    """Ids and reasons of what was left out."""


def conversion_of(data: DataConfig, folder: Path, **options: Any) -> Conversion:
    """A `Conversion` of what `data` names; options as there."""
    return Conversion(as_text(data), str(folder), **options)


def convert(conversion: Conversion, processes: int) -> dict[str, Any]:
    """Writes what is not there yet; returns the manifest, which is also in the folder.

    Raises:
      ConfigError: the folder holds something else.
      DataError: the source cannot be read.
    """
    jobs, bad = plan(conversion)
    missing = [job for job in jobs if not is_done(job)]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="shard") as bar:
        for _ in run_jobs(convert_shard, missing, processes):
            bar.update()
    return finish(conversion, [read_note(job) for job in jobs], bad)


def plan(conversion: Conversion) -> tuple[list[Job], BadExamples]:
    """The shards of all splits, and what is known to be bad before any image is read."""
    if conversion.format not in FORMATS:
        raise ConfigError(f"--format {conversion.format}: choose from {', '.join(FORMATS)}")
    folder = Path(conversion.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):  # of a process that was killed
        leftover.unlink()
    skipped = folder / SKIPPED_FILE
    skipped.unlink(missing_ok=True)
    bad = BadExamples(skipped)
    sources = open_sources(from_text(conversion.data), bad)
    _check_folder(conversion, fingerprint(sources))
    jobs = []
    for split, source in sorted(sources.items()):
        shards = -(-len(source) // conversion.per_shard)
        jobs += [Job(conversion, split, number, shards) for number in range(shards)]
    return jobs, bad


def convert_shard(job: Job) -> Done:
    """Writes one shard, whatever there is of it."""
    source = sources_of(job.conversion.data)[job.split]
    start = job.number * job.conversion.per_shard
    indices = range(start, min(start + job.conversion.per_shard, len(source)))
    bad: list[tuple[str, str]] = []
    encode = _encode_tfds if job.conversion.format == "tfds" else encode_record
    written = write_raw_records(job.path, map(encode, _examples(job, source, indices, bad)))
    done = Done(job.split, job.number, written, job.path.stat().st_size, bad)
    write_atomic(job.note, json.dumps(asdict(done)))
    return done


def is_done(job: Job) -> bool:
    return job.path.is_file() and job.note.is_file()


def read_note(job: Job) -> Done:
    note = read_json(job.note)
    return Done(**note | {"bad": [(id, reason) for id, reason in note["bad"]]})


def finish(conversion: Conversion, done: Sequence[Done], bad: BadExamples) -> dict[str, Any]:
    """Writes what the folder as a whole holds."""
    done = sorted(done, key=lambda shard: (shard.split, shard.number))
    for shard in done:
        bad.extend(shard.bad)
    splits: dict[str, dict[str, Any]] = {}
    for shard in done:
        known = splits.setdefault(shard.split, {"examples": 0, "bytes": 0, "shards": []})
        known["examples"] += shard.written
        known["bytes"] += shard.size
        known["shards"].append(shard.written)
    manifest = {"format": conversion.format, "splits": splits, "skipped": len(bad)}
    folder = Path(conversion.folder)
    if conversion.format == "tfds":
        lengths = {split: known["shards"] for split, known in splits.items()}
        sizes = {split: known["bytes"] for split, known in splits.items()}
        write_tfds_metadata(folder, conversion.name, lengths, sizes)
    write_atomic(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    return manifest


def describe(manifest: dict[str, Any]) -> str:
    """The manifest as a table."""
    lines = [f"{'split':20} {'examples':>12} {'shards':>8} {'MiB':>10}"]
    for split, known in manifest["splits"].items():
        size = known["bytes"] / 2**20
        lines.append(f"{split:20} {known['examples']:12,} {len(known['shards']):8,} {size:10,.1f}")
    lines.append(f"left out: {manifest['skipped']:,}, listed in {SKIPPED_FILE}")
    return "\n".join(lines)


def _check_folder(conversion: Conversion, data: str) -> None:
    """Raises `ConfigError` where the folder has shards of another source or other settings."""
    path = Path(conversion.folder, SETTINGS_FILE)
    settings = asdict(replace(conversion, data="", folder="")) | {"fingerprint": data}
    if path.is_file():
        known = read_json(path)
        changed = [key for key in settings if known.get(key) != settings[key]]
        if changed:
            listed = "; ".join(f"{k}: {known.get(k)!r} there, {settings[k]!r} now" for k in changed)
            raise ConfigError(
                f"{conversion.folder} holds another conversion ({listed}): choose another folder, "
                "or empty this one"
            )
    elif others := [name for name in os.listdir(conversion.folder) if name != SKIPPED_FILE]:
        raise ConfigError(f"{conversion.folder} is not empty ({others[0]}): choose another folder")
    write_atomic(path, json.dumps(settings, indent=2) + "\n")


def _examples(
    job: Job, source: Source, indices: Iterable[int], bad: list[tuple[str, str]]
) -> Iterator[Example]:
    """The examples as they are written; what cannot be is noted in `bad`."""
    for index in indices:
        try:
            example = source[index]
            image = _image(example.image, job.conversion)
        except BadImage as error:
            bad.append((source.metadata(index).id, str(error)))
            continue
        attributes = {**example.attributes, "split": job.split}
        yield replace(example, image=image, attributes=attributes)


def _image(data: bytes, conversion: Conversion) -> bytes:
    if conversion.resize is not None:
        return Opened(data).shrunk(conversion.resize)
    if conversion.check:
        Opened(data).decoded()
    elif not data:
        raise BadImage("empty file")
    return data


def _encode_tfds(example: Example) -> bytes:
    features = tfds_features()
    return features.serialize_example(
        features.encode_example(
            {
                "id": example.id,
                "group": example.group,
                "image": example.image,
                "captions": list(example.captions),
            }
        )
    )
