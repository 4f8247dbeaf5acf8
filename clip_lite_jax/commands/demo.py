"""``clip-lite demo``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lite_jax.commands.arguments import Subparsers, local
from clip_lite_jax.errors import ConfigError

if TYPE_CHECKING:
    from clip_lite_jax.apps.demo_engine import Engine

NEEDS = "clip-lite demo needs NiceGUI: pip install 'clip-lite-jax[demo]'"


def add(commands: Subparsers) -> None:
    demo = commands.add_parser(
        "demo", help="a local page to search, score and classify with a model"
    )
    demo.add_argument("--model", help="folder of a run, or its URL; of an index its own")
    where = demo.add_mutually_exclusive_group()
    where.add_argument("--index", type=Path, help="to search: folder that clip-lite index wrote")
    where.add_argument("--images", type=Path, help="to search: folder of pictures")
    demo.add_argument("--host", default="127.0.0.1", help="to listen at (127.0.0.1: this machine)")
    demo.add_argument("--port", type=int, default=8080, help="to listen at (8080); 0: a free one")
    demo.add_argument("--no-open", action="store_true", help="open no browser")
    demo.set_defaults(call=_demo)


def _demo(known: argparse.Namespace, rest: Sequence[str]) -> None:
    del rest
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{NEEDS} ({error})") from error
    engine = _engine(known)
    from clip_lite_jax.apps.demo import serve

    serve(engine, known.host, known.port, not known.no_open)


def _engine(known: argparse.Namespace) -> "Engine":
    from clip_lite_jax.apps.demo_engine import Engine
    from clip_lite_jax.apps.index import Index
    from clip_lite_jax.apps.search import checked, folder_index
    from clip_lite_jax.commands.embed import bar, tell_skipped
    from clip_lite_jax.inference import load
    from clip_lite_jax.places import is_remote

    index = None if known.index is None else Index.open(known.index)
    path = known.model or (index.model.path if index else "")
    if not path:
        raise ConfigError("--model is missing: the folder of a run, or its URL")
    if not known.model and is_remote(path) and index:
        # An index of strangers is no reason to ask their machines for anything.
        raise ConfigError(f"{known.index} was made with {index.model.told()}: give it as --model")
    model = load(local(path))
    if index is not None:
        checked(model, index, path)
    elif known.images is not None:
        with bar() as progress:
            index, built = folder_index(model, known.images, path, progress)
        tell_skipped([(known.images / id, reason) for id, reason in built.skipped])
    return Engine(model, path, index)
