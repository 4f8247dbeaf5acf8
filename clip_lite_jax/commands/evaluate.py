"""``clip-lite eval``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_lite_jax.commands.arguments import Subparsers, local, place_of, positive
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
    evaluate.add_argument("--batch-size", type=positive, default=64, help="of encoding (64)")
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
    # Tasks after a flag are left over by argparse.
    tasks = [*known.tasks, *(word for word in rest if not word.startswith("--"))]
    if not known.model or not tasks:
        raise ConfigError("name a model and tasks; clip-lite eval --tasks lists these")
    from clip_lite_jax.apps.evaluation import FOLDER, evaluate_model
    from clip_lite_jax.inference import load

    asked = _requests(tasks, [word for word in rest if word.startswith("--")])
    where = place_of(known.model)
    own = known.out is None and isinstance(where, Path)
    out = known.out or (where if isinstance(where, Path) else Path()) / FOLDER
    model = load(local(known.model), known.batch_size)
    for path in evaluate_model(model, str(where), asked, out, _tell, own):
        print(f"written: {path}")


def _requests(tasks: Sequence[str], flags: Sequence[str]) -> list[Any]:
    """The tasks with their options, all of which belong to one of them."""
    from clip_lite_jax.apps.evaluation import parse_task

    options: dict[str, dict[str, Any]] = {task.partition(":")[0]: {} for task in tasks}
    fields: dict[str, Any] = {}
    for flag in flags:
        name, equals, text = flag.removeprefix("--").partition("=")
        section, dot, option = name.partition(".")
        if not dot or not option:
            raise ConfigError(f"unknown argument {flag!r}; see clip-lite eval --help and --tasks")
        if not equals:
            raise ConfigError(f"{flag} needs a value, in one word: {flag}=VALUE")
        if section == "config":
            fields |= _field(option, text)
        elif section not in options:
            raise ConfigError(f"--{name}: no task {section!r} is asked for")
        else:
            options[section] |= _option(section, option, text)
    if fields and not any(":" in task for task in tasks):
        raise ConfigError(
            f"--config.data.{next(iter(fields))}: no task has a source of its own, TASK:SOURCE; "
            "the data of the run are as they were"
        )
    return [
        parse_task(task, fields if ":" in task else {}, options[task.partition(":")[0]])
        for task in tasks
    ]


def _field(name: str, text: str) -> dict[str, Any]:
    """A field of `data` from a flag."""
    from clip_lite_jax.config import DataConfig, override

    section, _, field = name.partition(".")
    if section != "data":
        raise ConfigError(f"--config.{name}: only fields of data count here")
    head = field.partition(".")[0]
    return {head: getattr(override(DataConfig(), field, text, "data."), head)}


def _option(task: str, name: str, text: str) -> dict[str, Any]:
    """An option of a task from a flag."""
    from clip_lite_jax.config import override
    from clip_lite_jax.evaluators.registry import task_of

    try:
        return {name: getattr(override(task_of(task).options(), name, text), name)}
    except ConfigError as error:
        raise ConfigError(str(error).replace("--config.", f"--{task}.")) from error


def _tell(path: Path, result: Any) -> None:
    from clip_lite_jax.apps.evaluation_table import table

    print(table({result.model["path"]: [result]}))
    if result.bad_count:
        print(f"{result.bad_count} examples could not be used: {path}")
