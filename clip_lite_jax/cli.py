"""The ``clip-lite`` command."""

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from clip_lite_jax import distributed
from clip_lite_jax._version import __version__
from clip_lite_jax.commands import COMMANDS
from clip_lite_jax.errors import ConfigError, Interrupted, UserError


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
        if rest and not getattr(known, "takes_fields", False):
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
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
