"""``clip-lite status`` and ``clip-lite report``: how a run is, and what came of it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from clip_lite_jax.commands.arguments import Subparsers, local, place_of
from clip_lite_jax.errors import ConfigError


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

    report = commands.add_parser(
        "report", help="write the report of a run again, or compare several runs"
    )
    report.add_argument("workdir", nargs="+", help="folder of a run, or its URL; several: compare")
    report.add_argument("--out", type=Path, help="where a comparison goes; default: compare.html")
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
    if len(known.workdir) > 1:
        from clip_lite_jax.apps.compare import write_comparison

        runs = [(str(place_of(name)), local(name)) for name in known.workdir]
        print(write_comparison(runs, known.out or Path("compare.html")))
        return
    if known.out is not None:
        raise ConfigError("--out is for comparisons: the report of one run goes into its folder")
    from clip_lite_jax.apps.report import write_report

    (name,) = known.workdir
    workdir = place_of(name)
    report = write_report(local(name), str(workdir))
    if not isinstance(workdir, Path):
        (workdir / report.name).upload(report)
    print(workdir / report.name)
