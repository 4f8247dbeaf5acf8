"""``clip-lite data check``: what is in a source, and what is wrong with it, before a run finds out.

Every picture is read and decoded, by all cores, in pieces that are kept: a check that was stopped
goes on where it was.  `findings` then puts together what a table, a JSON file and a page say.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from clip_lite_jax.apps.data_check_text import caption_findings
from clip_lite_jax.apps.data_jobs import as_text, open_sources, run_jobs, sources_of
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.rows import TEXT, array
from clip_lite_jax.data.sources import Source, fingerprint
from clip_lite_jax.data.splits import SPLITS
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.files import replacing, write_atomic

PIECE = 128
"""Examples of a piece: what a kill costs at most, for each process."""
FINDINGS_FILE, SKIPPED_FILE, PIECES = "check.json", "skipped.jsonl", "pieces"
SHOWN = 20
"""How many of anything are named."""

SCHEMA = pa.schema(
    [
        ("digest", pa.binary(16)),  # of the file; null where there is none
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("seconds", pa.float64()),  # of a core's time, to read and decode
        ("format", TEXT),
        ("reason", TEXT),  # why it cannot be used, or nothing
    ]
)


@dataclass(frozen=True)
class Piece:
    """Some of the examples of a split."""

    data: str
    folder: str
    split: str
    start: int
    stop: int
    stamp: str
    """Other pictures have another, as far as `Images.stamp` can tell."""

    @property
    def path(self) -> Path:
        return Path(self.folder, f"{self.split}-{self.start:010}-{self.stamp}.arrow")


def check(
    data: DataConfig, folder: Path, processes: int
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Looks at every example; the findings are also in ``check.json`` in the folder.

    Returns the findings and the splits that were looked at.

    Raises:
      DataError: the source cannot be read at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    skipped = folder / SKIPPED_FILE
    skipped.unlink(missing_ok=True)
    bad = BadExamples(skipped)
    sources = open_sources(data, bad)
    # Of other data other pieces: what was seen of these is seen again only if it changed.
    pieces_folder = folder / PIECES / fingerprint(sources)
    pieces_folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for split, source in sorted(sources.items()):
        for start in range(0, len(source), PIECE):
            stop = min(start + PIECE, len(source))
            stamp = _stamp(source, range(start, stop))
            pieces.append(Piece(as_text(data), str(pieces_folder), split, start, stop, stamp))
    missing = [piece for piece in pieces if not piece.path.exists()]
    total = sum(piece.stop - piece.start for piece in pieces)
    left = sum(piece.stop - piece.start for piece in missing)
    with tqdm(total=total, initial=total - left, unit="image") as bar:
        for piece, _ in zip(missing, run_jobs(look, missing, processes), strict=True):
            bar.update(piece.stop - piece.start)
    tables = {split: _table(pieces, split) for split in sources}
    for split, table in tables.items():
        reasons = table["reason"].to_pylist()
        bad.extend(
            (sources[split].metadata(i).id, reason) for i, reason in enumerate(reasons) if reason
        )
    found = findings(data, sources, tables, bad)
    write_atomic(folder / FINDINGS_FILE, json.dumps(found, indent=2) + "\n")
    return found, sources


def _stamp(source: Source, indices: Iterable[int]) -> str:
    stamp = getattr(source, "stamp", lambda index: "")
    return hashlib.blake2b("\n".join(map(stamp, indices)).encode(), digest_size=8).hexdigest()


def look(piece: Piece) -> None:
    """Reads and decodes the pictures of a piece, and keeps what it saw."""
    source = sources_of(piece.data)[piece.split]
    seen = [_look_at(source, index) for index in range(piece.start, piece.stop)]
    columns = {name: [row[name] for row in seen] for name in SCHEMA.names}
    table = pa.table([array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)
    with replacing(piece.path) as temporary, pa.ipc.new_file(temporary, SCHEMA) as writer:
        writer.write_table(table)


def _look_at(source: Source, index: int) -> dict[str, Any]:
    row: dict[str, Any] = {"digest": None, "width": 0, "height": 0, "bytes": 0}
    row |= {"format": "", "reason": ""}
    start = time.thread_time()
    try:
        image = source[index].image
        row["bytes"] = len(image)
        row["digest"] = hashlib.blake2b(image, digest_size=16).digest()
        opened = Opened(image)
        opened.decoded()
        row["width"], row["height"] = opened.size
        row["format"] = opened.format
    except BadImage as error:
        row["reason"] = str(error)
    row["seconds"] = time.thread_time() - start
    return row


def findings(
    data: DataConfig,
    sources: Mapping[str, Source],
    tables: Mapping[str, pa.Table],
    bad: BadExamples,
) -> dict[str, Any]:
    """Everything that was seen, as plain data; see docs/data.md for what it means."""
    seconds = np.concatenate([np.asarray(table["seconds"]) for table in tables.values()])
    per_core = len(seconds) / max(float(seconds.sum()), 1e-9)
    found: dict[str, Any] = {
        "source": data.source,
        "splits": {split: _pictures(tables[split]) for split in in_order(sources)},
        "captions": caption_findings(data, sources),
        "bad": {
            "count": len(bad),
            "of": bad.total or sum(map(len, sources.values())),
            "reasons": _most_common(bad.reasons.values()),
            "first": list(bad.reasons.items())[:SHOWN],
        },
        "duplicates": _duplicates(sources, tables),
        "leaks": _leaks(sources, tables),
        "images_per_second_per_core": per_core,
    }
    found["warnings"] = warnings(data, found)
    return found


def in_order(splits: Iterable[str]) -> list[str]:
    """Training first, then what it is judged by, then others by name."""
    return sorted(splits, key=lambda s: (SPLITS.index(s) if s in SPLITS else len(SPLITS), s))


def warnings(data: DataConfig, found: Mapping[str, Any]) -> list[str]:
    """What a person should do something about, the worst first."""
    said = []
    for leak in found["leaks"]:
        said.append(
            f"pictures of {leak['of']} that are in {leak['in']} too: {leak['images']:,}; numbers "
            f"measured on {leak['of']} will be too good. Copies stay on one side where "
            "data.group_column gives them one value"
        )
    count, total = found["bad"]["count"], found["bad"]["of"]
    if count:
        share = count / max(total, 1)
        limit = f"; over data.max_bad_share={data.max_bad_share}, a run would stop"
        said.append(
            f"examples that cannot be used: {count:,} ({share:.1%})"
            + (limit if share > data.max_bad_share else "")
        )
    copies = found["duplicates"]["copies"]
    if copies:
        said.append(
            f"pictures that are copies of others, byte for byte: {copies:,}; with different "
            "captions they can be each other's negative, unless data.group_column says that they "
            "are alike"
        )
    captions = found["captions"]
    if captions["truncated_share"] > 0.01:
        said.append(
            f"{captions['truncated_share']:.1%} of the captions are longer than data.max_tokens="
            f"{data.max_tokens}: {captions['tokens_99']} would hold 99 % of them"
        )
    for problem in captions["problems"]:
        if problem["share"] > 0.001:
            said.append(f"{problem['share']:.1%} of the captions {problem['what']}")
    return said


def _table(pieces: Sequence[Piece], split: str) -> pa.Table:
    tables = []
    for piece in pieces:
        if piece.split == split:
            try:
                with pa.memory_map(str(piece.path)) as file:
                    tables.append(pa.ipc.open_file(file).read_all())
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(f"{piece.path} is damaged ({error}): delete it") from error
    return pa.concat_tables(tables).combine_chunks() if tables else SCHEMA.empty_table()


def _pictures(table: pa.Table) -> dict[str, Any]:
    good = np.asarray(pc.equal(table["reason"], ""))
    width, height = (np.asarray(table[name])[good] for name in ("width", "height"))
    size = np.asarray(table["bytes"])[good]
    shorter = np.minimum(width, height)
    quantiles = np.quantile(shorter, (0, 0.05, 0.5, 0.95, 1)) if len(shorter) else np.zeros(5)
    formats = pc.value_counts(table["format"].filter(pa.array(good))).to_pylist()
    return {
        "examples": len(table),
        "usable": int(good.sum()),
        "shorter_side": dict(zip(("0", "5", "50", "95", "100"), map(int, quantiles), strict=True)),
        "kilobytes": float(size.mean() / 1000) if len(size) else 0.0,
        "formats": {item["values"]: item["counts"] for item in formats},
    }


def _duplicates(sources: Mapping[str, Source], tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Pictures of one split whose files are equal."""
    copies = 0
    groups: list[dict[str, Any]] = []
    for split, table in tables.items():
        digests = _digests(table)
        _, codes, counts = np.unique(digests, return_inverse=True, return_counts=True)
        known = np.asarray(pc.is_valid(table["digest"]))
        repeated = np.flatnonzero(known & (counts[codes] > 1))
        found = np.unique(codes[repeated])
        copies += len(repeated) - len(found)
        for code in found[np.argsort(-counts[found], kind="stable")][:SHOWN]:
            rows = np.flatnonzero(codes == code)
            ids = [sources[split].metadata(int(row)).id for row in rows[:SHOWN]]
            groups.append({"split": split, "count": len(rows), "ids": ids})
    groups.sort(key=lambda group: -group["count"])
    return {"copies": copies, "groups": groups[:SHOWN]}


def _leaks(sources: Mapping[str, Source], tables: Mapping[str, pa.Table]) -> list[dict[str, Any]]:
    """Pictures of one split that are, byte for byte, in another that trains or selects."""
    leaks = []
    order = in_order(tables)
    for i, split in enumerate(order):
        for other in order[:i]:
            digests = _digests(tables[split])
            known = np.asarray(pc.is_valid(tables[split]["digest"]))
            shared = np.flatnonzero(known & np.isin(digests, _digests(tables[other])))
            if len(shared):
                ids = [sources[split].metadata(int(row)).id for row in shared[:SHOWN]]
                leaks.append({"of": split, "in": other, "images": len(shared), "ids": ids})
    return leaks


def _digests(table: pa.Table) -> np.ndarray:
    """``[N]`` of 16 bytes each; those of pictures that are not there are zeros."""
    column = table["digest"].combine_chunks().fill_null(b"\x00" * 16)
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    data = column.buffers()[1]
    found = np.frombuffer(data or b"", "S16")
    return found[column.offset : column.offset + len(column)]


def _most_common(reasons: Any) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for reason in reasons:
        kind = str(reason).partition(":")[0][:100]
        counts[kind] = counts.get(kind, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])[:SHOWN]
