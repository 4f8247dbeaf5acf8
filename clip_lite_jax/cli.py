"""The ``clip-lite`` command: thin subcommands, each one call."""

import argparse
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lite_jax import distributed
from clip_lite_jax._version import __version__
from clip_lite_jax.errors import ConfigError, Interrupted, UserError

if TYPE_CHECKING:
    from clip_lite_jax.config import DataConfig
    from clip_lite_jax.places import Place


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status.

    2 for what cannot be done, 1 where another process of the run is missing, lost or has failed,
    75 for a run that was asked to end and has saved, 130 after Ctrl-C where nothing was saved; 3
    from ``status`` for a run that neither runs nor is finished.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    # Libraries that log while they are imported have set it up before.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    # jax tells at every start which accelerators there are not, others where they found keys.
    for chatty in ("absl", "jax", "aiobotocore", "botocore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        if rest and known.command not in ("train", "config", "plan", "data"):
            raise ConfigError(f"unknown argument {rest[0]!r}; see clip-lite {known.command} --help")
        status = known.call(known, rest)
    except Interrupted as error:
        return distributed.end(error.status, str(error))
    except UserError as error:
        return distributed.end(error.status, f"error: {error}", f"failed: {error}")
    except KeyboardInterrupt:
        message = "stopped; the same command goes on where this one was"
        return distributed.end(distributed.STOPPED, message, "was stopped by Ctrl-C")
    except Exception as error:
        if not distributed.joined():
            raise
        message = traceback.format_exc().rstrip()
        return distributed.end(1, message, f"failed: {type(error).__name__}: {error}")
    return distributed.end(status or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-lite", description="Train and use CLIP-Lite dual encoders.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    any_field = "any field: --config.optim.learning_rate=3e-4"

    train = commands.add_parser("train", help="train, evaluate and report", epilog=any_field)
    train.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
    train.add_argument("--workdir", required=True, help="folder of the run, or gs://BUCKET/RUN")
    _add_processes(train)
    train.set_defaults(call=_train)

    config = commands.add_parser(
        "config", help="print the resolved configuration", epilog=any_field
    )
    config.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
    config.set_defaults(call=_config)

    _add_plan(
        commands.add_parser(
            "plan",
            help="what a training step needs and costs, without data or accelerator",
            epilog=any_field,
        )
    )

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

    search = commands.add_parser("search", help="find pictures by text")
    search.add_argument("--model", required=True, help="folder of a run, or its URL")
    search.add_argument("--images", required=True, type=Path, help="folder of pictures")
    search.add_argument("--count", type=int, default=5, help="files to print (default 5)")
    search.add_argument("query")
    search.set_defaults(call=_search)

    _add_data(commands.add_parser("data", help="look at data, and turn it into other formats"))

    export = commands.add_parser("export", help="write the model for other programs, and check it")
    export.add_argument("--model", required=True, help="folder of a run, or its URL")
    export.add_argument("--out", required=True, type=Path, help="folder to write")
    export.add_argument(
        "--format",
        default="safetensors",
        help="safetensors (whole model), torchvision, detectron2 (image encoder), hf (text "
        "encoder) or stablehlo (program)",
    )
    export.add_argument("--force", action="store_true", help="replace the folder if it is there")
    export.set_defaults(call=_export)
    return parser


def _add_processes(train: argparse.ArgumentParser) -> None:
    processes = train.add_argument_group(
        "several hosts",
        "The same command on each.  What SLURM (srun), GKE and Cloud TPU say of them is found "
        "without flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID count, too.",
    )
    processes.add_argument(
        "--distributed", action="store_true", help="do not run where no other process is found"
    )
    processes.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0")
    processes.add_argument("--num-processes", type=int, metavar="N", help="of all hosts")
    processes.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    processes.add_argument(
        "--join-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="wait for the others at most so long (300)",
    )


def _add_data(data: argparse.ArgumentParser) -> None:
    any_field = "any field of data: --config.data.caption_columns='[\"title\"]'"
    commands = data.add_subparsers(dest="data_command", required=True)
    check = commands.add_parser(
        "check", help="what is in a source, and what is wrong with it", epilog=any_field
    )
    check.add_argument("source", help="as data.source; mixture for --config.data.mixture")
    check.add_argument("--out", type=Path, default=Path("check"), help="folder to write to (check)")
    check.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="default: one for each core"
    )
    check.set_defaults(call=_check)
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
    splits.set_defaults(call=_data_splits)
    convert = commands.add_parser(
        "convert", help="write a source as ArrayRecord files", epilog=any_field
    )
    convert.add_argument("source", help="as data.source; mixture for --config.data.mixture")
    convert.add_argument("folder", help="to write to, or a URL: empty, or a conversion cut short")
    convert.add_argument("--format", default="records", help="records (default) or tfds")
    convert.add_argument("--resize", type=int, help="make larger pictures' shorter side this long")
    convert.add_argument("--per-shard", type=int, default=4096, help="examples of a file (4096)")
    convert.add_argument("--name", default="pairs", help="of the data set, for tfds (pairs)")
    convert.add_argument("--no-check", action="store_true", help="do not decode the pictures")
    convert.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="default: one for each core"
    )
    convert.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="run it as an Apache Beam pipeline (extra beam): --beam='--runner=DirectRunner'",
    )
    convert.set_defaults(call=_convert)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
    where = plan.add_mutually_exclusive_group()
    where.add_argument("--topology", help="TPUs that are not here: v5e:2x4 (extra plan)")
    where.add_argument(
        "--devices", type=int, metavar="N", help="N CPU devices, for memory and traffic"
    )
    plan.add_argument(
        "--utilization", type=float, default=0.4, help="part of the peak that is reached (0.4)"
    )
    plan.add_argument("--price", type=float, metavar="USD", help="of an hour of one chip")
    plan.add_argument("--fit-batch", action="store_true", help="find the largest batch that fits")
    plan.add_argument("--memory", type=float, metavar="GIB", help="of a device, if not all it has")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, too")
    plan.set_defaults(call=_plan)


# Imports stand inside the commands so that --help does not wait for jax.


def _train(known: argparse.Namespace, rest: Sequence[str]) -> None:
    workdir = _place(known.workdir)
    # Before anything that may use a device, and a configuration is a program.
    distributed.join(
        distributed.Options(
            known.distributed,
            known.coordinator_address,
            known.num_processes,
            known.process_id,
            known.join_timeout,
        ),
        workdir,
    )
    from clip_lite_jax.config import load_config, parse_overrides
    from clip_lite_jax.main import run

    run(load_config(known.config, parse_overrides(rest)), workdir)


def _place(name: str) -> "Place":
    """The folder of a run: a path or a URL."""
    from clip_lite_jax.places import place

    return place(_checked(name))


def _local(name: str) -> Path:
    """The folder of a run to read; of one in a bucket a copy."""
    from clip_lite_jax.mirror import local_copy

    return local_copy(_checked(name))


def _checked(name: str) -> str:
    """A path or a URL; raises `ConfigError` where it was meant to be one."""
    if re.match(r"[A-Za-z][\w+.-]+:/(?!/)", name):  # C:/ is a disk
        scheme, _, rest = name.partition(":/")
        raise ConfigError(
            f"{name} is no URL, which has two slashes: {scheme}://{rest}; if it is a folder, "
            f"write ./{name}"
        )
    return name


def _config(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.config import describe, load_config, parse_overrides

    config = load_config(known.config, parse_overrides(rest))
    print(f"# {known.config}")
    print(describe(config))


def _plan(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.plan import Request, plan
    from clip_lite_jax.apps.plan_text import describe
    from clip_lite_jax.config import load_config, parse_overrides

    config = load_config(known.config, parse_overrides(rest))
    found = plan(
        config,
        Request(
            known.topology,
            known.devices,
            known.utilization,
            known.price,
            known.fit_batch,
            known.memory,
        ),
    )
    if known.json:
        known.json.write_text(json.dumps(found, indent=2) + "\n")
    print(describe(found))


def _status(known: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    from clip_lite_jax.apps.status import exit_status, status
    from clip_lite_jax.apps.status_text import describe

    workdir = _place(known.workdir)
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

    workdir = _place(known.workdir)
    report = write_report(_local(known.workdir), str(workdir))
    if not isinstance(workdir, Path):
        (workdir / report.name).upload(report)
    print(workdir / report.name)


def _search(known: argparse.Namespace, rest: Sequence[str]) -> None:
    del rest
    from clip_lite_jax.apps.search import search
    from clip_lite_jax.inference import load

    hits = search(load(_local(known.model)), known.images, known.query, known.count)
    for path, score in hits.files:
        print(f"{score:.2f}  {path}")
    for path, reason in hits.unreadable:
        print(f"skipped {path}: {reason}", file=sys.stderr)


def _check(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.data_check import check
    from clip_lite_jax.apps.data_check_page import table_of, write_page

    found, sources = check(_data_config(known.source, rest), known.out, known.processes)
    cores = os.cpu_count() or 1
    print(table_of(found, cores))
    print(f"written: {write_page(found, sources, known.out, cores)}")


def _data_splits(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.data_splits import compare, describe, write_clean
    from clip_lite_jax.errors import DataError

    train, test = (_data_config(source, rest) for source in (known.train, known.test))
    ours, theirs, leaks = compare(train, test)
    if known.write_clean is not None:
        print(write_clean(known.write_clean, ours, theirs))
    elif leaks and not known.allow_leaks:
        raise DataError(f"{describe(leaks, ours)}: --write-clean=FILE.jsonl leaves them out")
    print(describe(leaks, ours))


def _convert(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.data_convert import conversion_of, convert, describe

    conversion = conversion_of(
        _data_config(known.source, rest),
        known.folder,
        format=known.format,
        resize=known.resize,
        per_shard=known.per_shard,
        check=not known.no_check,
        name=known.name,
    )
    if known.beam is None:
        manifest = convert(conversion, known.processes)
    else:
        from clip_lite_jax.apps.data_beam import convert_with_beam

        manifest = convert_with_beam(conversion, known.beam)
    print(describe(manifest))
    print(f"written: {known.folder}")


def _data_config(source: str, rest: Sequence[str]) -> "DataConfig":
    """The source with the fields that the command line gives."""
    from clip_lite_jax.config import DataConfig, override, parse_overrides

    data = DataConfig() if source == "mixture" else DataConfig(source=source)
    for name, value in parse_overrides(rest).items():
        if not name.startswith("data."):
            raise ConfigError(f"--config.{name}: only fields of data count here")
        data = override(data, name.removeprefix("data."), value, "data.")
    if source == "mixture" and not data.mixture:
        raise ConfigError("mixture: name its parts with --config.data.mixture='{...}'")
    return data


def _export(known: argparse.Namespace, rest: Sequence[str]) -> None:
    del rest
    from clip_lite_jax.apps.export import describe, export

    print(describe(export(_local(known.model), known.out, known.format, known.force)))
    print(f"written: {known.out}")


if __name__ == "__main__":
    sys.exit(main())
