"""A run goes on with what it has begun with, and all its processes were given the same."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_lite_jax.checkpoints import Meta
from clip_lite_jax.config import Config, to_dict
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.files import CONFIG_FILE
from clip_lite_jax.places import Place
from clip_lite_jax.remote import RemotePath

MAY_CHANGE = (
    "log",
    "checkpoint",
    "eval",
    "mesh",
    "resume_from",  # of a run that has begun its own checkpoint comes first
    "init_from",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "data.max_bad_share",
    "data.strict",
)
"""Fields that a resumed run may change: they do not touch what is learned."""

MAY_DIFFER = ("data.threads", "data.workers", "data.prefetch")
"""Fields that each process may have its own of: they do not touch in what order processes meet."""


def check_same_config(config: Config, workdir: Path) -> None:
    """Raises `ConfigError` where the run in `workdir` was begun with another configuration."""
    stored_file = workdir / CONFIG_FILE
    if not stored_file.exists():
        return
    stored = json.loads(stored_file.read_text())
    if changes := _changes(stored, to_dict(config), MAY_CHANGE, ("there", "now")):
        raise ConfigError(
            f"{workdir} holds a run with another configuration ({changes}): use another --workdir, "
            "or the same values to resume"
        )


def check_same_data(workdir: Path, now: Meta, stored: Meta) -> None:
    """Raises `ConfigError` where a checkpoint in `workdir` was made on other data."""
    if stored.data_fingerprint != now.data_fingerprint:
        raise ConfigError(
            f"{workdir} holds a run on other data (fingerprint {stored.data_fingerprint}, now "
            f"{now.data_fingerprint}): restore the data or use another --workdir"
        )


def check_same_start(config: Config, workdir: Place) -> None:
    """Raises `ConfigError` in a process that was started with something else than process 0.

    To be called by all processes before anything else that they do together: what that is depends
    on the configuration.
    """
    # One folder may have a path on each host, and `distributed.join` has looked at it.
    named = workdir.url.rstrip("/") if isinstance(workdir, RemotePath) else "a folder"
    _check_same(to_dict(config) | {"--workdir": named})


def check_same_everywhere(config: Config, data_fingerprint: str) -> None:
    """Raises `ConfigError` in a process that has found something else than process 0.

    To be called by all processes at once.  The configuration is the one with what files say of the
    models.  Steps of unlike programs would wait for each other, or meet and learn nonsense.
    """
    _check_same(to_dict(config) | {"data fingerprint": data_fingerprint})


def _check_same(own: dict[str, Any]) -> None:
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.resize(text, size)  # of process 0 that is all of it, of others nobody looks
    first = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    if changes := _changes(first, own, MAY_DIFFER, ("in process 0", "in this one")):
        raise ConfigError(
            f"process {jax.process_index()} was started with something else than process 0 "
            f"({changes}): give all processes the same configuration and data"
        )


def _changes(one: Any, other: Any, but: tuple[str, ...], names: tuple[str, str]) -> str:
    """The fields in which two configurations differ, with both values; nothing if in none."""
    changed = [field for field in _differences(one, other) if not field.startswith(but)]
    values = [(field, _get(one, field), _get(other, field)) for field in changed]
    return "; ".join(f"{field}: {a!r} {names[0]}, {b!r} {names[1]}" for field, a, b in values)


def _differences(a: object, b: object, prefix: str = "") -> list[str]:
    """Dotted names of the leaves in which two trees of plain data differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix]
    names = sorted(a.keys() | b.keys())
    nested = [_differences(a.get(n), b.get(n), f"{prefix}.{n}" if prefix else n) for n in names]
    return [field for fields in nested for field in fields]


def _get(tree: object, field: str) -> object:
    for name in field.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
