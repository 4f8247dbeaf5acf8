"""``clip-lite embed`` and ``clip-lite index``."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clip_lite_jax.commands.arguments import Subparsers, data_config, folder_here, local, positive

ANY_FIELD = "any field of data: --config.data.caption_columns='[\"title\"]'"
NAMED = 20
"""Skipped pictures that are printed; all are in a file."""


def add(commands: Subparsers) -> None:
    embed = commands.add_parser(
        "embed", help="write the embeddings of any source to files", epilog=ANY_FIELD
    )
    embed.add_argument("source", help="as data.source, or a folder of pictures")
    embed.add_argument("--out", required=True, type=Path, help="folder: empty, or one cut short")
    embed.add_argument(
        "--format", default="arrayrecord", help="arrayrecord (default), parquet or npy"
    )
    embed.add_argument("--unit", action="store_true", help="scale rows to length 1")
    embed.add_argument("--per-shard", type=positive, default=4096, help="examples of a file (4096)")
    _add_shared(embed)
    embed.set_defaults(call=_embed, takes_fields=True)

    index = commands.add_parser(
        "index", help="make pictures searchable, or what is new among them", epilog=ANY_FIELD
    )
    index.add_argument(
        "--images", required=True, metavar="SOURCE", help="folder of pictures, or as data.source"
    )
    index.add_argument("--out", required=True, type=Path, help="folder of the index")
    _add_shared(index)
    index.set_defaults(call=_index, takes_fields=True)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a run, or its URL")
    parser.add_argument("--what", default="image", help="image (default), text or both")
    parser.add_argument(
        "--split", action="append", default=[], help="of the source; may be repeated (all)"
    )
    parser.add_argument("--dtype", default="float32", help="of the rows: float32 or float16")
    parser.add_argument("--batch-size", type=positive, default=64, help="on the device (64)")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="decode large JPEG files at a smaller scale: sooner, and almost the same rows",
    )
    parser.add_argument(
        "--threads", type=positive, default=os.cpu_count() or 1, help="that decode pictures (cores)"
    )


def _check(known: argparse.Namespace) -> None:
    """Raises `ConfigError` where what is given cannot be."""
    folder_here("--out", known.out)


def _embed(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.embed import Embedding, describe, embed
    from clip_lite_jax.inference import load

    _check(known)
    embedding = Embedding(
        data_config(known.source, rest),
        known.out,
        format=known.format,
        what=known.what,
        splits=known.split,
        unit=known.unit,
        dtype=known.dtype,
        per_shard=known.per_shard,
        threads=known.threads,
        fast=known.fast,
    )
    with bar() as progress:
        manifest = embed(
            load(local(known.model), known.batch_size), embedding, known.model, progress
        )
    print(describe(manifest))
    print(f"written: {known.out}")


def _index(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.index import Index
    from clip_lite_jax.apps.index_build import Options, build_index
    from clip_lite_jax.inference import load

    _check(known)
    options = Options(known.what, known.split, known.dtype, known.threads, known.fast)
    data, model = data_config(known.images, rest), load(local(known.model), known.batch_size)
    with bar() as progress:
        built = build_index(model, data, known.out, options, known.model, progress)
    tell_skipped(built.skipped, known.out / "skipped.jsonl")
    rows = ", ".join(f"{count:,} {kind}" for kind, count in built.rows.items())
    print(f"{rows}; {built.encoded:,} encoded, {built.removed:,} removed")
    index = Index.open(known.out)
    for kind, count in built.rows.items():
        if count and not index.prepare(kind) and (why := index.slow(kind)):
            print(why, file=sys.stderr)
    print(f"written: {known.out}")
    print(f'search it: clip-lite search --index {known.out} "a red fruit"')


def tell_skipped(skipped: Sequence[tuple[object, str]], listed: Path | None = None) -> None:
    """Prints what could not be used, to the standard error."""
    for name, reason in skipped[:NAMED]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > NAMED:
        where = f", all of them in {listed}" if listed else ""
        print(f"skipped {len(skipped) - NAMED:,} more{where}", file=sys.stderr)


@contextmanager
def bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of progress, which shows when there is any."""
    from tqdm import tqdm

    shown: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, unit="row"))
        shown[0].update(done - shown[0].n)

    try:
        yield progress
    finally:
        for one in shown:
            one.close()
