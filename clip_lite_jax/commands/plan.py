"""``clip-lite plan``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from clip_lite_jax.commands.arguments import Subparsers
from clip_lite_jax.commands.train import ANY_FIELD


def add(commands: Subparsers) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a training step needs and costs, without data or accelerator",
        epilog=ANY_FIELD,
    )
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
    plan.set_defaults(call=_plan, takes_fields=True)


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
