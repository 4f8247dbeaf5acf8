"""``clip-lite eval``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_lite_jax.commands.arguments import Subparsers, local
from clip_lite_jax.errors import ConfigError


class _Tasks(argparse.Action):
    """Prints the tasks: they need what a quick ``--help`` does not wait for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from clip_lite_jax.apps.evaluation import options_text

        print(options_text())
        parser.exit()


def add(commands: Subparsers) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure a trained model, or print what was measured side by side",
        epilog="--TASK.OPTION=VALUE sets an option of a task, --config.data.FIELD=VALUE a field of "
        "its source. Results are kept in MODEL/evaluations.",
    )
    evaluate.add_argument("model", nargs="?", help="folder of a run or an export, or its URL")
    evaluate.add_argument("tasks", nargs="*", metavar="TASK[:SOURCE]", help="what to measure")
    evaluate.add_argument("--tasks", nargs=0, action=_Tasks, help="list tasks and their options")
    evaluate.add_argument("--out", type=Path, help="folder of the results")
    evaluate.add_argument("--batch-size", type=int, default=64, help="of encoding (64)")
    evaluate.add_argument(
        "--table", nargs="+", type=Path, metavar="MODEL", help="print results of these, no new ones"
    )
    evaluate.set_defaults(call=_evaluate, takes_fields=True)


def _evaluate(known: argparse.Namespace, rest: Sequence[str]) -> None:
    from clip_lite_jax.apps.evaluation_table import read_results, table

    if known.table:
        if rest or known.model:
            raise ConfigError("--table reads results and measures nothing: give models after it")
        print(table(read_results(known.table)))
        return
    if not known.tasks:
        raise ConfigError("name a model and tasks; clip-lite eval --tasks lists these")
    from clip_lite_jax.apps.evaluation import FOLDER, evaluate_model
    from clip_lite_jax.inference import load

    tasks = _requests(known.tasks, rest)
    folder = local(known.model)
    out = known.out or (folder if str(folder) == known.model else Path()) / FOLDER
    for path in evaluate_model(load(folder, known.batch_size), known.model, tasks, out, _tell):
        print(f"written: {path}")


def _requests(tasks: Sequence[str], rest: Sequence[str]) -> list[Any]:
    """The tasks with their options, all of which belong to one of them."""
    from clip_lite_jax.apps.evaluation import parse_task
    from clip_lite_jax.config import parse_overrides

    named = [task.partition(":")[0] for task in tasks]
    options: dict[str, dict[str, Any]] = {name: {} for name in named}
    fields: list[str] = []
    waiting = list(rest)
    while waiting:
        flag = waiting.pop(0)
        task, dot, after = flag.removeprefix("--").partition(".")
        if task == "config" or not dot or not flag.startswith("--"):
            fields.append(flag)
            continue
        option, equals, value = after.partition("=")
        if task not in options:
            raise ConfigError(f"{flag}: no task {task!r} is asked for")
        if not equals:
            if not waiting:
                raise ConfigError(f"{flag} needs a value: {flag}=VALUE")
            value = waiting.pop(0)
        options[task][option] = _read(value)
    given = {}
    for name, text in parse_overrides(fields).items():
        if not name.startswith("data."):
            raise ConfigError(f"--config.{name}: only fields of data count here")
        given[name.removeprefix("data.")] = _read(text)
    return [
        parse_task(text, given if ":" in text else {}, options[n])
        for text, n in zip(tasks, named, strict=True)
    ]


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _tell(path: Path, result: Any) -> None:
    from clip_lite_jax.apps.evaluation_table import table

    print(table({result.model["path"]: [result]}))
    if skipped := len(result.bad_examples):
        print(f"{skipped} examples could not be used: {path}")
