"""``clip-lite data check``, ``splits`` and ``convert``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from clip_lite_jax.commands.arguments import Subparsers, data_config, positive


def add(commands: Subparsers) -> None:
    data = commands.add_parser("data", help="look at data, and turn it into other formats")
    any_field = "any field of data: --config.data.caption_columns='[\"title\"]'"
    commands = data.add_subparsers(dest="data_command", required=True)
    check = commands.add_parser(
        "check", help="what is in a source, and what is wrong with it", epilog=any_field
    )
    check.add_argument("source", help="as data.source; mixture for --config.data.mixture")
    check.add_argument("--out", type=Path, default=Path("check"), help="folder to write to (check)")
    check.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, help="default: one for each core"
    )
    check.set_defaults(call=_check, takes_fields=True)
    splits = commands.add_parser(
        "splits",
        help="whether training on one source and testing on another leaks",
        epilog=any_field,
    )
    splits.add_argument("train", help="source whose training split counts")
    splits.add_argument("test", help="source whose other splits count")
    splits.add_argument("--allow-leaks", action="store_true", help="say so, but do not fail")
    splits.add_argument(
        "--write-clean", type=Path, metavar="FILE.jsonl", help="write what does not leak"
    )
    splits.set_defaults(call=_splits, takes_fields=True)
    convert = commands.add_parser(
        "convert", help="write a source as ArrayRecord files", epilog=any_field
    )
    convert.add_argument("source", help="as data.source; mixture for --config.data.mixture")
    convert.add_argument("folder", help="to write to, or a URL: empty, or a conversion cut short")
    convert.add_argument("--format", default="records", help="records (default) or tfds")
    convert.add_argument(
        "--resize", type=positive, help="make the shorter side of larger pictures this"
    )
    convert.add_argument("--per-shard", type=positive, default=4096, help="of a file (4096)")
    convert.add_argument("--name", default="pairs", help="of the data set, for tfds (pairs)")
    convert.add_argument("--no-check", action="store_true", help="do not decode the pictures")
    convert.add_argument(
        "--decisions", type=Path, metavar="FILE", help="leave out what it drops (clip-lite score)"
    )
    convert.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, help="default: one for each core"
    )
    convert.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="run it as an Apache Beam pipeline (extra beam): --beam='--runner=DirectRunner'",
    )
    convert.set_defaults(call=_convert, takes_fields=True)


def _check(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.data_check import check
    from clip_lite_jax.apps.data_check_page import table_of, write_page

    found, sources = check(data_config(known.source, rest), known.out, known.processes)
    cores = os.cpu_count() or 1
    print(table_of(found, cores))
    print(f"written: {write_page(found, sources, known.out, cores)}")


def _splits(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.data_splits import compare, describe, write_clean
    from clip_lite_jax.errors import DataError

    train, test = (data_config(source, rest) for source in (known.train, known.test))
    ours, theirs, leaks = compare(train, test)
    if known.write_clean is not None:
        print(write_clean(known.write_clean, ours, theirs))
    elif leaks and not known.allow_leaks:
        raise DataError(f"{describe(leaks, ours)}: --write-clean=FILE.jsonl leaves them out")
    print(describe(leaks, ours))


def _convert(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.data_convert import conversion_of, convert, describe

    conversion = conversion_of(
        data_config(known.source, rest),
        known.folder,
        format=known.format,
        resize=known.resize,
        per_shard=known.per_shard,
        check=not known.no_check,
        name=known.name,
        decisions=str(known.decisions.resolve()) if known.decisions else "",
    )
    if known.beam is None:
        manifest = convert(conversion, known.processes)
    else:
        from clip_lite_jax.apps.data_beam import convert_with_beam

        manifest = convert_with_beam(conversion, known.beam)
    print(describe(manifest))
    print(f"written: {known.folder}")
