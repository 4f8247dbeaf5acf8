"""Checkpoints: what is stored, and the only place that talks to Orbax.

A checkpoint has three items: ``weights``, which is all that using the model needs; ``optimizer``;
and ``meta``, with the configuration, tokenizer, data fingerprint and version.  The position in the
data is the step itself (`data.pipeline`), so nothing else is needed to go on.
"""

import base64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from clip_lite_jax._version import __version__
from clip_lite_jax.config import CheckpointConfig, Config, from_dict, to_dict
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.train_state import TrainState

FOLDER = "checkpoints"
WEIGHTS, OPTIMIZER, META = "weights", "optimizer", "meta"


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    config: Config
    tokenizer: bytes
    data_fingerprint: str
    version: str = __version__

    def to_json(self) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "tokenizer": base64.b64encode(self.tokenizer).decode(),
            "data_fingerprint": self.data_fingerprint,
            "version": self.version,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Meta":
        return cls(
            config=from_dict(Config, values["config"]),
            tokenizer=base64.b64decode(values["tokenizer"]),
            data_fingerprint=values["data_fingerprint"],
            version=values["version"],
        )


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has saved a checkpoint; Orbax gives finished ones the name of their step."""
    return any(path.name.isdigit() for path in (workdir / FOLDER).glob("*"))


class Checkpoints:
    """The checkpoints of one run, written in the background and atomically."""

    def __init__(self, workdir: Path, config: CheckpointConfig | None = None) -> None:
        folder = (workdir / FOLDER).absolute()
        keep = (config or CheckpointConfig()).keep
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={
                WEIGHTS: ocp.StandardCheckpointHandler(),
                OPTIMIZER: ocp.StandardCheckpointHandler(),
                META: ocp.JsonCheckpointHandler(),
            },
        )

    @classmethod
    def open(cls, workdir: Path) -> "Checkpoints":
        """The checkpoints of an existing run, to read; raises `CheckpointError` without any."""
        if not (workdir / FOLDER).is_dir():
            raise CheckpointError(
                f"{workdir} holds no {FOLDER}: give the --workdir of a run that has saved one"
            )
        return cls(workdir)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: Meta) -> None:
        """Copies the state off the devices and writes it in the background."""
        items = {name: ocp.args.StandardSave(part) for name, part in _parts(state).items()}
        args = ocp.args.Composite(**items, **{META: ocp.args.JsonSave(meta.to_json())})
        self._manager.save(int(state.step), args=args)

    def restore(self, step: int, like: TrainState, weights_only: bool = False) -> TrainState:
        """The state of `step` with the shapes, types and shardings of `like`.

        With `weights_only` the optimizer's state is left as it is in `like`.

        Raises:
          CheckpointError: the checkpoint holds another model or optimizer.
        """
        parts = _parts(like)
        self._check_weights(step, parts[WEIGHTS])
        if weights_only:
            del parts[OPTIMIZER]
        items = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise self._misfit(step, str(error)) from error
        fields = {field: value for part in parts for field, value in restored[part].items()}
        return replace(like, **fields)

    def _check_weights(self, step: int, weights: Any) -> None:
        """Raises `CheckpointError` naming the first weight whose shape differs.

        Orbax would find out in the middle of reading, and not say which one it is.
        """
        stored = _shapes(self._manager.item_metadata(step)[WEIGHTS])
        wanted = _shapes(weights)
        for path in sorted(stored.keys() | wanted.keys()):
            there, here = stored.get(path, "missing"), wanted.get(path, "missing")
            if there != here:
                raise self._misfit(step, f"{path} is {there} there and {here} in this model")

    def _misfit(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} in {self._manager.directory} does not fit this configuration: "
            f"{reason}; use another --workdir, or the configuration it was made with"
        )

    def meta(self, step: int) -> Meta:
        args = ocp.args.Composite(**{META: ocp.args.JsonRestore()})
        return Meta.from_json(self._manager.restore(step, args=args)[META])

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _parts(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint; fields without arrays are left out."""
    parts = {
        WEIGHTS: {
            "step": state.step,
            "params": state.params,
            "model_state": state.model_state,
            "ema": state.ema,
        },
        OPTIMIZER: {
            "opt_state": state.opt_state,
            "target": state.target,
            "log_normalizer": state.log_normalizer,
        },
    }
    return {
        part: {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}
        for part, fields in parts.items()
    }


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
