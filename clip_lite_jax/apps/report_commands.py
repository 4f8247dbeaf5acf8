"""The commands that a report prints, ready to paste into a shell."""

import json
import re
import shlex
from functools import reduce
from pathlib import Path
from typing import Any

from clip_lite_jax.config import Config, field_paths, load_config
from clip_lite_jax.config import to_dict as config_to_dict
from clip_lite_jax.errors import ConfigError

QUICKSTART = "configs/quickstart.py"


def commands(config: Config, workdir: Path | str) -> dict[str, str]:
    """This run again, this run with twice the steps, and the quoted workdir."""
    file, overrides = _file_and_overrides(config)
    longer = overrides | {"steps": 2 * config.steps}
    return {
        "workdir": shlex.quote(str(workdir)),
        "python_workdir": json.dumps(str(workdir), ensure_ascii=False),
        "train": _train(file, overrides, str(workdir)),
        "longer": _train(file, longer, f"{workdir}-{longer['steps']}-steps"),
    }


def _file_and_overrides(config: Config) -> tuple[str, dict[str, Any]]:
    """A configuration file and the fields in which this configuration differs from it.

    The file is the one named like the run (``paper:resnet18`` is a variant of one), if there is
    one; any other would do as well.
    """
    file, base = QUICKSTART, load_config(QUICKSTART)
    if named := re.fullmatch(r"([\w-]+)(:\w+)?", config.name):
        try:
            base = load_config(known := f"configs/{named[1]}.py{named[2] or ''}")
            file = known
        except ConfigError:
            pass  # no such file: the run's configuration lives elsewhere
    values, before = config_to_dict(config), config_to_dict(base)
    pairs = {path: (_get(values, path), _get(before, path)) for path in field_paths(config)}
    return file, {path: now for path, (now, then) in pairs.items() if now != then}


def _get(tree: dict[str, Any], path: str) -> Any:
    return reduce(lambda node, name: node[name], path.split("."), tree)


def _train(file: str, overrides: dict[str, Any], workdir: str) -> str:
    fields = [f"--config.{path}={_quoted(value)}" for path, value in overrides.items()]
    words = [f"clip-lite train --config {file}", *fields, f"--workdir {_quoted(workdir)}"]
    return " \\\n  ".join(words)


def _quoted(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
