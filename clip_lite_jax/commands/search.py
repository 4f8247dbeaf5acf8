"""``clip-lite search``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_lite_jax.commands.arguments import Subparsers, local


def add(commands: Subparsers) -> None:
    search = commands.add_parser("search", help="find pictures by text")
    search.add_argument("--model", required=True, help="folder of a run, or its URL")
    search.add_argument("--images", required=True, type=Path, help="folder of pictures")
    search.add_argument("--count", type=int, default=5, help="files to print (default 5)")
    search.add_argument("query")
    search.set_defaults(call=_search)


def _search(known: argparse.Namespace, rest: Sequence[str]) -> None:
    del rest
    from clip_lite_jax.apps.search import search
    from clip_lite_jax.inference import load

    hits = search(load(local(known.model)), known.images, known.query, known.count)
    for path, score in hits.files:
        print(f"{score:.2f}  {path}")
    for path, reason in hits.unreadable:
        print(f"skipped {path}: {reason}", file=sys.stderr)
