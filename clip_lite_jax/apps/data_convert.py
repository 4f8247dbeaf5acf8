"""``clip-lite data convert``: any source as ArrayRecord files, in pieces that a kill does not lose.

A shard is written whole or not at all, and beside it what it left out; a conversion that was
stopped goes on with the shards that are missing.  `convert_shard` does the work, here in processes
of this machine and in `data_beam` wherever Apache Beam runs.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from clip_lite_jax.apps.data_decisions import read_decisions
from clip_lite_jax.apps.data_jobs import as_text, from_text, open_sources, run_jobs, sources_of
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.record_files import tfds_features, write_tfds_metadata
from clip_lite_jax.data.records import Example, encode_record, write_raw_records
from clip_lite_jax.data.sources import Source, fingerprint
from clip_lite_jax.errors import BadImage, ConfigError
from clip_lite_jax.files import cache_folder, read_json
from clip_lite_jax.places import Place, each, place, write_text, writing
from clip_lite_jax.remote import RemotePath

log = logging.getLogger(__name__)

SETTINGS_FILE, MANIFEST_FILE, SKIPPED_FILE = "convert.json", "manifest.json", "skipped.jsonl"
FORMATS = ("records", "tfds")


@dataclass(frozen=True)
class Conversion:
    """What is to become of a source."""

    data: str
    """The `DataConfig` of the source, as JSON: conversions are compared and travel."""
    folder: str
    """A path or URL."""
    format: str = "records"
    """``records``: ours.  ``tfds``: what `tfds.builder_from_directory` reads."""
    resize: int | None = None
    """Pictures whose shorter side is longer than this are written smaller."""
    per_shard: int = 4096
    check: bool = True
    """Decode every picture and leave out those that cannot be; else only what is not there."""
    name: str = "pairs"
    """Of the data set, for ``tfds``."""
    decisions: str = ""
    """A file of `clip-lite score`: the captions it drops are left out, and images without any."""


@dataclass(frozen=True)
class Job:
    """One shard."""

    conversion: Conversion
    split: str
    number: int
    shards: int

    @property
    def path(self) -> Place:
        number = f"{self.number:05}-of-{self.shards:05}"
        if self.conversion.format == "tfds":
            name = f"{self.conversion.name}-{self.split}.array_record-{number}"
        else:
            name = f"{self.split}-{number}.arrayrecord"
        return place(self.conversion.folder) / name

    @property
    def note(self) -> Place:
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


def conversion_of(data: DataConfig, folder: Path | str, **options: Any) -> Conversion:
    """A `Conversion` of what `data` names; options as there."""
    return Conversion(as_text(data), str(folder), **options)


def convert(conversion: Conversion, processes: int) -> dict[str, Any]:
    """Writes what is not there yet; returns the manifest, which is also in the folder.

    Raises:
      ConfigError: the folder holds something else.
      DataError: the source cannot be read.
    """
    jobs, bad = plan(conversion)
    missing = unfinished(jobs)
    if not missing:
        log.warning(
            "%s was finished before, and stays as it is, even where pictures have changed since: "
            "empty it to convert anew",
            conversion.folder,
        )
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="shard") as bar:
        for _ in run_jobs(convert_shard, missing, processes):
            bar.update()
    return finish(conversion, read_notes(jobs), bad)


def plan(conversion: Conversion) -> tuple[list[Job], BadExamples]:
    """The shards of all splits, and what is known to be bad before any image is read."""
    if conversion.format not in FORMATS:
        raise ConfigError(f"--format {conversion.format}: choose from {', '.join(FORMATS)}")
    folder = place(conversion.folder)
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    skipped = _skipped(folder)
    skipped.unlink(missing_ok=True)
    bad = BadExamples(skipped)
    sources = open_sources(from_text(conversion.data), bad)
    if conversion.decisions:
        read_decisions(conversion.decisions).check(sources)
    _check_folder(conversion, fingerprint(sources))
    if isinstance(folder, Path):
        for leftover in folder.glob("*.tmp"):  # of a process that was killed
            leftover.unlink()
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
    with writing(job.path) as path:
        written = write_raw_records(path, map(encode, _examples(job, source, indices, bad)))
        size = path.stat().st_size
    done = Done(job.split, job.number, written, size, bad)
    write_text(job.note, json.dumps(asdict(done)))
    return done


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Those whose shard or note is not there."""
    folders = {job.conversion.folder for job in jobs}
    there = {path.name for folder in folders for path in place(folder).iterdir()}
    return [job for job in jobs if not {job.path.name, job.note.name} <= there]


def read_notes(jobs: Sequence[Job]) -> list[Done]:
    """What became of each."""
    notes = each(read_json, [job.note for job in jobs])
    return [Done(**note | {"bad": [(id, why) for id, why in note["bad"]]}) for note in notes]


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
    folder = place(conversion.folder)
    if conversion.format == "tfds":
        lengths = {split: known["shards"] for split, known in splits.items()}
        sizes = {split: known["bytes"] for split, known in splits.items()}
        with _beside_shards(folder) as path:
            write_tfds_metadata(path, conversion.name, lengths, sizes)
    if isinstance(folder, RemotePath):
        (folder / SKIPPED_FILE).write_bytes(_skipped(folder).read_bytes() if len(bad) else b"")
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    return manifest


def describe(manifest: dict[str, Any]) -> str:
    """The manifest as a table."""
    lines = [f"{'split':20} {'examples':>12} {'shards':>8} {'MiB':>10}"]
    for split, known in manifest["splits"].items():
        size = known["bytes"] / 2**20
        lines.append(f"{split:20} {known['examples']:12,} {len(known['shards']):8,} {size:10,.1f}")
    listed = f", listed in {SKIPPED_FILE}" if manifest["skipped"] else ""
    lines.append(f"left out: {manifest['skipped']:,}{listed}")
    return "\n".join(lines)


def _check_folder(conversion: Conversion, data: str) -> None:
    """Raises `ConfigError` where the folder has shards of another source or other settings."""
    folder = place(conversion.folder)
    path = folder / SETTINGS_FILE
    settings = asdict(replace(conversion, data="", folder="")) | {"fingerprint": data}
    if decisions := settings.pop("decisions"):
        settings["decisions"] = hashlib.sha256(Path(decisions).read_bytes()).hexdigest()
    if path.is_file():
        known = read_json(path)
        keys = settings.keys() | (known.keys() & {"decisions"})
        changed = [key for key in sorted(keys) if known.get(key) != settings.get(key)]
        if changed:
            listed = "; ".join(
                f"{k}: {known.get(k)!r} there, {settings.get(k)!r} now" for k in changed
            )
            listed = "the source has changed" if changed == ["fingerprint"] else listed
            raise ConfigError(
                f"{conversion.folder} holds another conversion ({listed}): choose another folder, "
                "or empty this one"
            )
    elif others := [path.name for path in folder.iterdir() if path.name != SKIPPED_FILE]:
        raise ConfigError(f"{conversion.folder} is not empty ({others[0]}): choose another folder")
    write_text(path, json.dumps(settings, indent=2) + "\n")


def _skipped(folder: Place) -> Path:
    """Where is listed what cannot be used, of a remote folder until it is sent there."""
    if isinstance(folder, Path):
        return folder / SKIPPED_FILE
    path = cache_folder() / "convert" / f"{hashlib.sha256(str(folder).encode()).hexdigest()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _beside_shards(folder: Place) -> Iterator[Path]:
    """A folder to write files to, which then lie in `folder`; it shows which shards are there."""
    if isinstance(folder, Path):
        yield folder
        return
    with TemporaryDirectory() as name:
        shards = {path.name for path in folder.iterdir() if ".array_record-" in path.name}
        for shard in shards:
            Path(name, shard).touch()
        yield Path(name)
        for path in Path(name).iterdir():
            if path.name not in shards:
                (folder / path.name).upload(path)


def _examples(
    job: Job, source: Source, indices: Iterable[int], bad: list[tuple[str, str]]
) -> Iterator[Example]:
    """The examples as they are written; what cannot be is noted in `bad`."""
    decisions = read_decisions(job.conversion.decisions) if job.conversion.decisions else None
    for index in indices:
        try:
            example = source[index]
            captions = example.captions
            if decisions is not None and not (captions := decisions.kept(job.split, example)):
                continue
            image = _image(example.image, job.conversion)
        except BadImage as error:
            bad.append((source.metadata(index).id, str(error)))
            continue
        attributes = {**example.attributes, "split": job.split}
        yield replace(example, captions=captions, image=image, attributes=attributes)


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
