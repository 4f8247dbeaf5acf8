"""``clip-lite status`` and ``clip-lite report``: how a run is, and what came of it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from clip_lite_jax.commands.arguments import Subparsers, local, place_of


def add(commands: Subparsers) -> None:
    status = commands.add_parser(
        "status",
        help="how a run is, live or dead",
        epilog="Exit status: 0 it runs, or is finished; 3 it does neither; 2 there is no run.",
    )
    status.add_argument("workdir", help="folder of the run, or its URL")
    status.add_argument("--json", action="store_true", help="print all that is known, as JSON")
    status.add_argument("--verify", action="store_true", help="read the checkpoints' files, too")
    status.set_defaults(call=_status)

    report = commands.add_parser("report", help="write the report of a run again")
    report.add_argument("workdir", help="folder of the run, or its URL")
    report.set_defaults(call=_report)


def _status(known: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    from clip_lite_jax.apps.status import exit_status, status
    from clip_lite_jax.apps.status_text import describe

    workdir = place_of(known.workdir)
    if isinstance(workdir, Path):
        found = status(workdir, known.verify)
    else:
        from clip_lite_jax.apps.status_bucket import status_in_bucket

        found = status_in_bucket(workdir, known.verify)
    print(json.dumps(found, indent=1) if known.json else describe(found))
    return exit_status(found)


def _report(known: argparse.Namespace, rest: Sequence[str]) -> None:
    del rest
    from clip_lite_jax.apps.report import write_report

    workdir = place_of(known.workdir)
    report = write_report(local(known.workdir), str(workdir))
    if not isinstance(workdir, Path):
        (workdir / report.name).upload(report)
    print(workdir / report.name)
