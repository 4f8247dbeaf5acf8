"""``clip-lite train`` and ``clip-lite config``."""

import argparse
from collections.abc import Sequence

from clip_lite_jax import distributed
from clip_lite_jax.commands.arguments import Subparsers, place_of

ANY_FIELD = "any field: --config.optim.learning_rate=3e-4"


def add(commands: Subparsers) -> None:
    train = commands.add_parser("train", help="train, evaluate and report", epilog=ANY_FIELD)
    train.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
    train.add_argument("--workdir", required=True, help="folder of the run, or gs://BUCKET/RUN")
    _add_processes(train)
    train.set_defaults(call=_train, takes_fields=True)

    config = commands.add_parser(
        "config", help="print the resolved configuration", epilog=ANY_FIELD
    )
    config.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
    config.set_defaults(call=_config, takes_fields=True)


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


def _train(known: argparse.Namespace, rest: Sequence[str]) -> None:
    workdir = place_of(known.workdir)
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


def _config(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.config import describe, load_config, parse_overrides

    config = load_config(known.config, parse_overrides(rest))
    print(f"# {known.config}")
    print(describe(config))
