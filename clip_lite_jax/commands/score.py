"""``clip-lite score``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lite_jax.commands.arguments import Subparsers, data_config, folder_here, local, positive
from clip_lite_jax.errors import ConfigError

if TYPE_CHECKING:
    from clip_lite_jax.apps.data_decisions import Decisions
    from clip_lite_jax.config import DataConfig

FORMATS = ("table", "records")


def add(commands: Subparsers) -> None:
    score = commands.add_parser(
        "score",
        help="score all pairs of a source, find what is wrong with it, and clean it",
        epilog="any field of data: --config.data.caption_columns='[\"title\"]'",
    )
    score.add_argument("source", help="as data.source; mixture for --config.data.mixture")
    score.add_argument("--model", help="folder of a run, or its URL; not needed with --decisions")
    score.add_argument("--out", required=True, type=Path, help="folder to write to")
    score.add_argument("--split", action="append", default=[], help="only this one (repeatable)")
    look = score.add_argument_group("what is looked for")
    look.add_argument("--others", type=positive, default=256, help="captions to rank beside (256)")
    look.add_argument(
        "--wrong-rank",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="suspect a caption where a larger share of random ones fits as well (0.2)",
    )
    look.add_argument(
        "--swap-gain", type=float, metavar="NATS", help="default: log of the suspects"
    )
    look.add_argument("--near", type=float, default=0.98, help="cosine of near-duplicates (0.98)")
    look.add_argument("--no-near", action="store_true", help="only equal files are duplicates")
    look.add_argument("--show", type=positive, default=100, help="cards of a kind (100)")
    odds = score.add_argument_group("probabilities")
    odds.add_argument(
        "--calibrate",
        metavar="SOURCE",
        help="fit scale and shift on these pairs, read with the same fields of data; default: what "
        "the model was validated on",
    )
    odds.add_argument("--calibrate-split", metavar="SPLIT", help="of it (validation)")
    odds.add_argument("--no-calibration", action="store_true", help="T, and no probabilities")
    clean = score.add_argument_group("the cleaned source, in FOLDER/clean")
    which = clean.add_mutually_exclusive_group()
    which.add_argument("--drop-below", type=float, metavar="T", help="leave out lower scores")
    which.add_argument("--drop-share", type=float, metavar="SHARE", help="leave out the worst")
    which.add_argument(
        "--decisions", type=Path, metavar="FILE", help="leave out what the review page drops"
    )
    clean.add_argument(
        "--format", choices=FORMATS, help="default: table where images are files, else records"
    )
    score.add_argument("--batch-size", type=positive, default=64, help="of the encoders (64)")
    score.set_defaults(call=_score, takes_fields=True)


def _score(known: argparse.Namespace, rest: Sequence[str]) -> None:
    folder_here("--out", known.out)
    data = data_config(known.source, rest)
    if known.decisions is not None:
        from clip_lite_jax.apps.data_decisions import read_decisions

        _clean(known, data, read_decisions(known.decisions))
        return
    if known.model is None:
        raise ConfigError("--model is needed to score: the folder of a run, or its URL")
    from clip_lite_jax.apps.score import Settings, describe, score
    from clip_lite_jax.apps.score_drops import check_share, dropped_below, dropped_share
    from clip_lite_jax.apps.score_page import write_page
    from clip_lite_jax.inference import load

    if known.drop_share is not None:
        check_share(known.drop_share)
    settings = Settings(
        splits=tuple(known.split),
        others=known.others,
        wrong_rank=known.wrong_rank,
        swap_gain=known.swap_gain,
        near=None if known.no_near else known.near,
        calibrate=data_config(known.calibrate, rest) if known.calibrate else None,
        calibrate_split=known.calibrate_split,
        calibration=not known.no_calibration,
    )
    found = score(load(local(known.model), known.batch_size), data, known.out, settings)
    print(describe(found))
    print(f"written: {known.out / 'scores.parquet'}, {write_page(found, known.out, known.show)}")
    if known.drop_below is not None:
        _clean(known, data, dropped_below(found, known.drop_below))
    elif known.drop_share is not None:
        _clean(known, data, dropped_share(found, known.drop_share))


def _clean(known: argparse.Namespace, data: "DataConfig", decisions: "Decisions") -> None:
    """Writes the source without what is dropped, and the decisions beside it."""
    from clip_lite_jax.apps.data_convert import conversion_of, convert, describe
    from clip_lite_jax.apps.data_decisions import (
        check_table,
        is_a_table_of_files,
        train_with,
        unread_in,
        write_decisions,
        write_table,
    )
    from clip_lite_jax.apps.score_folder import folder_of_scores
    from clip_lite_jax.data.bad_examples import BadExamples
    from clip_lite_jax.data.sources import build_sources

    sources = build_sources(data, BadExamples(), training=False)
    decisions.check(sources)
    kind = known.format or ("table" if is_a_table_of_files(sources) else "records")
    if kind == "table":
        check_table(sources)
    with folder_of_scores(known.out):
        file = (known.out / "decisions.json").resolve()
        write_decisions(file, decisions)
        if kind == "table":
            path = known.out / "clean.jsonl"
            print(write_table(path, sources, decisions))
        else:
            path = known.out / "clean"
            conversion = conversion_of(data, path, decisions=str(file))
            print(describe(convert(conversion, os.cpu_count() or 1)))
            if unread := unread_in(path):
                print(
                    f"{unread:,} of those left out could not be read; where a disk or network "
                    f"failed, delete {path} and run the same command again"
                )
            print(train_with(source=path))
    print(f"written: {path}")
