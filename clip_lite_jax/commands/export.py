"""``clip-lite export``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from clip_lite_jax.commands.arguments import Subparsers, local


def add(commands: Subparsers) -> None:
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


def _export(known: argparse.Namespace, rest: Sequence[str]) -> None:
    del rest
    from clip_lite_jax.apps.export import describe, export

    print(describe(export(local(known.model), known.out, known.format, known.force)))
    print(f"written: {known.out}")
