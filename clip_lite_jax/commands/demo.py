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
    from clip_lite_jax.apps.search import folder_index
    from clip_lite_jax.commands.embed import bar, tell_skipped
    from clip_lite_jax.commands.search import load_model_of, path_of_model
    from clip_lite_jax.inference import load

    if known.index is not None:
        index = Index.open(known.index)
        path = path_of_model(index, known.model)
        return Engine(load_model_of(index, known.model), path, index)
    if not known.model:
        raise ConfigError("--model is missing: the folder of a run, or its URL")
    model = load(local(known.model))
    if known.images is None:
        return Engine(model, known.model, None)
    with bar() as progress:
        index, built = folder_index(model, known.images, known.model, progress)
    tell_skipped([(known.images / id, reason) for id, reason in built.skipped])
    return Engine(model, known.model, index)
