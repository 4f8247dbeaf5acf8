"""Names of parameters, and regular expressions that find them."""

import re
from typing import Any

import jax

from clip_lite_jax.errors import ConfigError


def path_name(path: tuple[Any, ...]) -> str:
    """``image_encoder/Conv_0/kernel`` of the path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def path_tree(params: Any) -> Any:
    """A tree like `params` whose leaves are their names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves by their names."""
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """The regular expression of a configuration field; raises `ConfigError`."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}={pattern!r} is not a regular expression: {error}") from error
