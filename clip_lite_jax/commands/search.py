"""``clip-lite search``."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lite_jax.commands.arguments import Subparsers, local, positive
from clip_lite_jax.errors import ConfigError, UserError

if TYPE_CHECKING:
    from clip_lite_jax.apps.index import Hit, Index
    from clip_lite_jax.apps.queries import Part
    from clip_lite_jax.inference import DualEncoderModel

NUMBERS = (
    "Printed is the critic's score T in nats where a text meets pictures or a picture meets texts, "
    "else the cosine.  Several texts and pictures are added up as embeddings of length 1."
)


def add(commands: Subparsers) -> None:
    search = commands.add_parser(
        "search", help="find pictures, or texts, by texts and pictures", epilog=NUMBERS
    )
    search.add_argument("--model", help="folder of a run, or its URL; of an index its own")
    where = search.add_mutually_exclusive_group(required=True)
    where.add_argument("--index", type=Path, help="folder that clip-lite index has written")
    where.add_argument("--images", type=Path, help="folder of pictures")
    where.add_argument("--texts", type=Path, help="file with a text in each line")
    search.add_argument("query", nargs="?", action=_Part, help="a text")
    search.add_argument("--text", action=_Part, help="another text; may be repeated")
    search.add_argument("--image", action=_Part, metavar="FILE", help="a picture to look for, too")
    search.add_argument(
        "--weights",
        metavar="W,W",
        help="what query, texts and pictures count for, in their order: --weights=1,-0.5 (1 each)",
    )
    search.add_argument(
        "--without", action="append", default=[], metavar="TEXT", help="concept to ignore"
    )
    search.add_argument("--find", default="images", help="images (default) or texts of an index")
    search.add_argument("--count", type=positive, default=5, help="hits to print (default 5)")
    search.add_argument("--method", default="auto", help="auto (default), exact or faiss")
    search.add_argument("--json", action="store_true", help="print the hits as JSON lines")
    search.set_defaults(call=_search, parts=[])


class _Part(argparse.Action):
    """Texts and pictures, in the order of the command line."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        if values is not None:
            namespace.parts = [*namespace.parts, (self.dest, values)]


def _search(known: argparse.Namespace, rest: Sequence[str]) -> None:
    del rest
    parts = _parts(known.parts, known.weights)
    if known.index is None and known.model is None:
        raise ConfigError("--model is missing: the folder of a run, or its URL")
    from clip_lite_jax.apps.index import check_method
    from clip_lite_jax.apps.search import Request, find

    check_method(known.method)
    kind = "texts" if known.texts is not None else known.find
    request = Request(parts, known.without, known.count, kind)
    index, load = _opened(known)
    hits = find(index, request, load)
    if why := index.slow(kind):
        print(why, file=sys.stderr)
    # A folder is printed as it was given, not as the index keeps it.
    for hit in hits:
        print(_as_json(hit, known.images) if known.json else _as_text(hit, known.images))


def _opened(known: argparse.Namespace) -> tuple["Index", Callable[[], "DualEncoderModel"]]:
    """The index to search, and what loads its model."""
    from clip_lite_jax.apps.index import Index
    from clip_lite_jax.apps.search import folder_index, text_index
    from clip_lite_jax.commands.embed import bar, tell_skipped
    from clip_lite_jax.inference import load

    if known.index is not None:
        index = Index.open(known.index, known.method)
        path_of_model(index, known.model)
        return index, lambda: load_model_of(index, known.model)
    model = load(local(known.model))
    if known.texts is not None:
        return text_index(model, known.texts, known.model, known.method), lambda: model
    with bar() as progress:
        index, built = folder_index(model, known.images, known.model, progress, known.method)
    tell_skipped([(known.images / id, reason) for id, reason in built.skipped])
    return index, lambda: model


def path_of_model(index: "Index", given: str | None) -> str:
    """Where the model of an index lies: as `given`, or else as the index says."""
    from clip_lite_jax.places import is_remote

    path = given or index.model.path
    if not given and (is_remote(path) or not path):
        # An index of strangers is no reason to ask their machines for anything.
        raise ConfigError(f"{index.folder} was made with {index.model.told()}: give it as --model")
    return path


def load_model_of(index: "Index", given: str | None) -> "DualEncoderModel":
    """The model that made an index; raises `ConfigError` where it is another, or gone."""
    from clip_lite_jax.apps.search import checked
    from clip_lite_jax.inference import load

    path = path_of_model(index, given)
    try:
        model = load(local(path))
    except (UserError, OSError) as error:
        if given:
            raise
        raise ConfigError(
            f"{index.folder} was made with {index.model.told()}, which cannot be read ({error}): "
            "give --model"
        ) from error
    return checked(model, index, path)


def _parts(given: Sequence[tuple[str, str]], weights: str | None) -> list["Part"]:
    from clip_lite_jax.apps.queries import Part

    numbers = [1.0] * len(given)
    if weights is not None:
        try:
            numbers = [float(number) for number in weights.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != len(given) or not all(map(math.isfinite, numbers)):
            raise ConfigError(
                f"--weights={weights}: give a number for each of the {len(given)} texts and "
                "pictures, with commas between them"
            )
    return [
        Part(image=Path(value), weight=w) if kind == "image" else Part(value, weight=w)
        for (kind, value), w in zip(given, numbers, strict=True)
    ]


def _as_text(hit: "Hit", folder: Path | None) -> str:
    return f"{hit.value:.2f}  {_name(hit, folder)}"


def _as_json(hit: "Hit", folder: Path | None) -> str:
    found: dict[str, Any] = {"value": round(hit.value, 6), "id": hit.id}
    if hit.path is not None:
        found["path"] = str(folder / hit.id if folder else hit.path)
    if hit.caption is not None:
        found["caption"] = hit.caption
    return json.dumps(found)


def _name(hit: "Hit", folder: Path | None) -> str:
    if hit.caption is not None:
        return hit.caption
    if folder is not None:
        return str(folder / hit.id)
    return str(hit.path) if hit.path is not None else hit.id
