"""Configurations from files, command lines and JSON, and back to text."""

import difflib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from clip_lite_jax.config.run import Config, validate
from clip_lite_jax.errors import ConfigError

T = TypeVar("T")


def config_path(path: str | Path) -> Path:
    """The file that `path` means: itself, or the one of that name shipped with the package."""
    here = Path(__file__).parents[1]
    name = Path(path).name
    candidates = [Path(path), here / "configs" / name, here.parent / "configs" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(
        {p.name for c in candidates[1:] for p in c.parent.glob("*.py")} - {"__init__.py"}
    )
    raise ConfigError(f"--config {path}: no such file; the package brings {', '.join(known)}")


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Runs ``get_config()`` of a Python file and applies dotted overrides.

    ``FILE.py:VARIANT`` runs ``get_config("VARIANT")``, for files that hold several configurations.

    Raises:
      ConfigError: no such file, no ``get_config``, a variant of a file that has none, an unknown
        field or a value of the wrong type.
    """
    name, colon, after = str(path).rpartition(".py:")
    file = config_path(f"{name}.py" if colon else path)
    variant = after if colon else None
    label = f"{file}:{variant}" if colon else str(file)
    spec = importlib.util.spec_from_file_location(f"clip_lite_jax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: a config is a Python file, .py, that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{file}: a config file defines get_config() -> Config")
        config = _call(module.get_config, variant, label)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{label}: {explain(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{label}: get_config() gave {type(config).__name__}, not Config")
    for name, value in (overrides or {}).items():
        config = override(config, name, value)
    validate(config)
    return config


def _call(get_config: Callable[..., Any], variant: str | None, label: str) -> Any:
    parameters = inspect.signature(get_config).parameters.values()
    if variant is None:
        if any(parameter.default is inspect.Parameter.empty for parameter in parameters):
            raise ConfigError(f"{label}: get_config() of this file needs a variant, {label}:NAME")
        return get_config()
    if not parameters:
        raise ConfigError(
            f"{label}: get_config() of this file takes no variant; leave :{variant} out"
        )
    return get_config(variant)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """``["--config.optim.learning_rate=3e-4"]`` → ``{"optim.learning_rate": "3e-4"}``."""
    overrides, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        if not name.startswith("--config."):
            raise ConfigError(f"unknown argument {flag!r}; fields are set by --config.FIELD=VALUE")
        if not equals:
            if not rest:
                raise ConfigError(f"{flag} needs a value: {flag}=VALUE")
            value = rest.pop(0)
        overrides[name.removeprefix("--config.")] = value
    return overrides


def override(config: Any, name: str, value: str, prefix: str = "") -> Any:
    """A copy of `config` with the dotted field `name` set from text, converted to its type."""
    head, _, tail = name.partition(".")
    known = {field.name for field in fields(config)}
    if head not in known:
        raise ConfigError(_unknown_field(config, prefix + name, prefix, known))
    current = getattr(config, head)
    if tail and is_dataclass(current):
        return replace(config, **{head: override(current, tail, value, f"{prefix}{head}.")})
    if tail and isinstance(current, dict):
        return _replace_field(config, head, [current | {tail: v} for v in _readings(value)], prefix)
    if tail:
        raise ConfigError(f"--config.{prefix}{name}: {prefix}{head} has no fields of its own")
    return _replace_field(config, head, _readings(value), prefix)


def _readings(text: str) -> list[Any]:
    """What a command-line value can mean: JSON where it is JSON, else the text itself."""
    try:
        return [json.loads(text), text]
    except json.JSONDecodeError:
        return [text]


def _replace_field(config: Any, name: str, readings: list[Any], prefix: str) -> Any:
    errors = []
    for reading in readings:
        try:
            return replace(config, **{name: reading})
        except pydantic.ValidationError as error:
            errors.append(error)
    raise ConfigError(f"--config.{prefix}{name}={readings[-1]}: {explain(errors[0])}")


def explain(error: pydantic.ValidationError) -> str:
    """Pydantic's findings in one line: field, what is wrong, the value it got."""
    parts = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"])
        parts.append(f"{error.title}.{field}: {item['msg']} (got {item['input']!r})")
    return "; ".join(parts)


def _unknown_field(config: Any, name: str, prefix: str, known: set[str]) -> str:
    last = name.rpartition(".")[2]
    near = [prefix + n for n in difflib.get_close_matches(name.removeprefix(prefix), known)]
    # A right name in the wrong section is the commonest slip: look for it below as well.
    deeper = [
        p
        for p in field_paths(config, prefix)
        if difflib.get_close_matches(last, [p.rpartition(".")[2]])
    ]
    nearest = list(dict.fromkeys(near + deeper))[:4]
    hint = (
        f"did you mean {' or '.join(nearest)}?"
        if nearest
        else f"fields: {', '.join(sorted(known))}"
    )
    return f"--config.{name}: no such field; {hint}"


def field_paths(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves of a configuration."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from field_paths(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`, of a `Config` or of a section of one.

    Raises:
      ConfigError: unknown or ill-typed fields.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error)) from error


def describe(config: Any, depth: int = 0) -> str:
    """The resolved tree as indented text."""
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            lines += [f"{'  ' * depth}{field.name}:", describe(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{field.name}: {value}")
    return "\n".join(lines)
