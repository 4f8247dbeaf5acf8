"""``clip-lite embed``: any source as files of embeddings, in shards that a kill does not lose.

A shard is written whole or not at all, then a note of what it holds; a run that was stopped goes on
with the shards that have no note.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_lite_jax.apps.embed_files import FORMATS, Shard
from clip_lite_jax.apps.encoding import (
    DTYPES,
    WHAT,
    Counter,
    Passing,
    Progress,
    check_choice,
    encode_pictures,
    encode_texts,
    only_one,
    open_splits,
    stamp,
)
from clip_lite_jax.apps.identity import NOT_AFFINE, Identity, identity_of, whole_path
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import Source, fingerprint
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.files import read_json, write_atomic
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.vectors import unit

SETTINGS_FILE, MANIFEST_FILE, SKIPPED_FILE = "embed.json", "manifest.json", "skipped.jsonl"


@dataclass(frozen=True)
class Embedding:
    """What is to become of a source."""

    data: DataConfig
    folder: Path
    format: str = "arrayrecord"
    what: str = "image"
    """``image``, ``text`` (a row for each caption) or ``both``, in files of their own."""
    splits: Sequence[str] = ()
    """None: all."""
    unit: bool = False
    """Scale rows to length 1; else as the critic takes them."""
    dtype: str = "float32"
    per_shard: int = 4096
    """Examples of a shard: what a kill costs at most."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """That decode pictures."""
    fast: bool = False
    """See `encoding.encode_pictures`."""


@dataclass(frozen=True)
class Job:
    """One shard."""

    kind: str
    split: str
    number: int
    shards: int
    indices: range

    def path(self, embedding: Embedding) -> Path:
        name = f"{self.kind}-{self.split}-{self.number:05}-of-{self.shards:05}"
        return embedding.folder / (name + FORMATS[embedding.format].ending)

    def note(self, embedding: Embedding) -> Path:
        """The file that says what the shard holds, written after it."""
        path = self.path(embedding)
        return path.with_name(f".{path.name}.json")


def embed(
    model: DualEncoderModel,
    embedding: Embedding,
    path: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes what is not there yet; returns the manifest, which is also in the folder.

    `path` is where the model was loaded from.

    Raises:
      ConfigError: the folder holds embeddings of another model, other data or other settings, or an
        option is none.
      DataError: the source cannot be read.
    """
    _check(model, embedding)
    _check_ours(embedding.folder)
    with only_one(embedding.folder):
        bad = BadExamples()
        sources = open_splits(embedding.data, embedding.what, embedding.splits, bad)
        identity = identity_of(model, whole_path(path))
        settings = _settings(embedding, identity, sources)
        _check_folder(embedding.folder, settings)
        (embedding.folder / SKIPPED_FILE).unlink(missing_ok=True)
        listed = BadExamples(embedding.folder / SKIPPED_FILE)
        listed.extend(bad.reasons.items())
        for leftover in embedding.folder.glob("*.tmp"):  # of a process that was killed
            leftover.unlink()
        jobs = _jobs(embedding, sources)
        counter = Counter(progress, sum(len(job.indices) for job in jobs))
        for job in jobs:
            if _is_done(job, embedding):
                counter.add(len(job.indices))
            else:
                _write(model, embedding, job, sources[job.split], counter)
        return _finish(embedding, settings, jobs, listed)


def describe(manifest: Mapping[str, Any]) -> str:
    """The manifest as a table."""
    lines = [f"{'split':20} {'rows of':8} {'count':>12} {'files':>8}"]
    for split, kinds in manifest["splits"].items():
        for kind, known in kinds.items():
            lines.append(f"{split:20} {kind:8} {known['rows']:12,} {len(known['files']):8,}")
    listed = f", listed in {SKIPPED_FILE}" if manifest["skipped"] else ""
    lines.append(f"skipped: {manifest['skipped']:,}{listed}")
    return "\n".join(lines)


def _check(model: DualEncoderModel, embedding: Embedding) -> None:
    check_choice("--format", embedding.format, FORMATS)
    check_choice("--what", embedding.what, WHAT)
    check_choice("--dtype", embedding.dtype, DTYPES)
    if embedding.per_shard < 1:
        raise ConfigError(f"--per-shard {embedding.per_shard}: a shard has at least one example")
    critic = model.config.model.critic.name
    if embedding.unit and critic in NOT_AFFINE:
        raise ConfigError(
            f"--unit: the score of a {critic} critic depends on the length of its projections, and "
            "not on their cosine; leave it out"
        )


def _settings(
    embedding: Embedding, identity: Identity, sources: Mapping[str, Source]
) -> dict[str, Any]:
    """What all shards of a folder have in common."""
    stamps = hashlib.blake2b(digest_size=16)
    for source in sources.values():
        for index in range(len(source)):
            stamps.update(stamp(source, index).encode() + b"\n")
    chosen: dict[str, Any] = {
        "format": embedding.format,
        "what": embedding.what,
        "dtype": embedding.dtype,
    }
    chosen |= {"unit": embedding.unit, "per_shard": embedding.per_shard}
    chosen["fast"] = embedding.fast
    data: dict[str, Any] = {"source": embedding.data.source, "fingerprint": fingerprint(sources)}
    data |= {"files": stamps.hexdigest(), "splits": sorted(sources)}
    return chosen | {"model": identity.to_json(), "data": data}


def _check_ours(folder: Path) -> None:
    """Raises `ConfigError` where a folder holds something else, before anything is made in it."""
    if not folder.is_dir() or (folder / SETTINGS_FILE).is_file():
        return
    if others := [path.name for path in folder.iterdir() if path.name != ".lock"]:
        raise ConfigError(f"{folder} is not empty ({others[0]}): choose another folder")


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raises `ConfigError` where the folder has shards that these do not belong to."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        write_atomic(path, json.dumps(settings, indent=1) + "\n")
        return
    known = read_json(path)
    there, now = _compared(known), _compared(settings)
    changed = [name for name in now if there.get(name) != now[name]]
    if changed:
        listed = "; ".join(f"{n}: {there.get(n)!r} there, {now[n]!r} now" for n in changed)
        raise ConfigError(
            f"{folder} holds other embeddings ({listed}): choose another folder, or empty this one"
        )


def _compared(settings: Any) -> dict[str, Any]:
    """What has to be equal: not where the model and the data lie."""
    if not isinstance(settings, dict):
        return {}
    flat = {name: value for name, value in settings.items() if name not in ("model", "data")}
    for part, names in (("model", ("weights",)), ("data", ("splits", "fingerprint", "files"))):
        values = settings.get(part)
        for name in names:
            flat[f"{part}.{name}"] = values.get(name) if isinstance(values, dict) else None
    return flat


def _jobs(embedding: Embedding, sources: Mapping[str, Source]) -> list[Job]:
    jobs = []
    for kind in WHAT[embedding.what]:
        for split, source in sources.items():
            starts = range(0, len(source), embedding.per_shard)
            for number, start in enumerate(starts):
                indices = range(start, min(start + embedding.per_shard, len(source)))
                jobs.append(Job(kind, split, number, len(starts), indices))
    return jobs


def _is_done(job: Job, embedding: Embedding) -> bool:
    """Whether a shard is there, and had no picture that may be readable by now."""
    note = job.note(embedding)
    return note.exists() and not read_json(note).get("unreadable")


def _write(
    model: DualEncoderModel, embedding: Embedding, job: Job, source: Source, counter: Counter
) -> None:
    """Writes one shard and its note."""
    ids: list[str] = []
    bad: list[tuple[str, str]] = []
    captions: list[str] | None = None
    examples = [source.metadata(index) for index in job.indices]
    if job.kind == "texts":
        captions = [caption for example in examples for caption in example.captions]
        ids = [example.id for example in examples for _ in example.captions]
        rows = encode_texts(model, captions)
        counter.add(len(job.indices))
    else:
        found = encode_pictures(model, source, job.indices, embedding.threads, embedding.fast)
        kept = []
        for example, row in zip(examples, counter.each(found), strict=True):
            if isinstance(row, str):
                bad.append((example.id, row))
            else:
                ids.append(example.id)
                kept.append(row)
        rows = np.stack(kept) if kept else np.zeros((0, 0), np.float32)
    if embedding.unit:
        rows = unit(rows, np.float32)
    path = job.path(embedding)
    if ids:
        shard = Shard(ids, rows.astype(embedding.dtype), captions)
        FORMATS[embedding.format].write(path, shard)
    else:
        path.unlink(missing_ok=True)
    # A shard with such pictures is made again at the next run.
    unreadable = sum(isinstance(reason, Passing) for _, reason in bad)
    note = {"rows": len(ids), "bad": bad, "unreadable": unreadable}
    write_atomic(job.note(embedding), json.dumps(note))


def _finish(
    embedding: Embedding, settings: dict[str, Any], jobs: Sequence[Job], bad: BadExamples
) -> dict[str, Any]:
    """Writes what the folder as a whole holds."""
    splits: dict[str, dict[str, Any]] = {}
    for job in jobs:
        note, path = read_json(job.note(embedding)), job.path(embedding)
        bad.extend((id, reason) for id, reason in note["bad"])
        known = splits.setdefault(job.split, {})
        known = known.setdefault(job.kind, {"rows": 0, "files": []})
        known["rows"] += note["rows"]
        if note["rows"]:
            if not path.is_file():
                raise DataError(f"{path} is gone: delete {job.note(embedding).name}, and run again")
            known["files"].append(path.name)
    count = sum(known["rows"] for kinds in splits.values() for known in kinds.values())
    manifest = settings | {"count": count, "skipped": len(bad), "splits": splits}
    write_atomic(embedding.folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    return manifest
