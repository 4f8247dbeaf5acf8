"""Checkpoints: what is stored, and with `checkpointer` the only place that talks to Orbax.

A checkpoint has three items: ``weights``, which is all that using the model needs; ``optimizer``;
and ``meta``, with the configuration, tokenizer, data fingerprint and version.  The position in the
data is the step itself (`data.pipeline`), so nothing else is needed to go on.
"""

import base64
import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from clip_lite_jax._version import __version__
from clip_lite_jax.checkpointer import META, OPTIMIZER, WEIGHTS, build_checkpointer, wait_for_all
from clip_lite_jax.config import CheckpointConfig, Config, from_dict, to_dict
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.files import CHECKPOINTS as FOLDER
from clip_lite_jax.manifest import MANIFEST, problem_of, seal
from clip_lite_jax.mirror import Mirror
from clip_lite_jax.newest import newest_sound
from clip_lite_jax.parameter_paths import by_path
from clip_lite_jax.retention import (
    delete_all_but,
    finished,
    folders_of_steps,
    kept,
    sealed,
    set_aside,
)
from clip_lite_jax.train_state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    config: Config
    tokenizer: bytes
    data_fingerprint: str
    version: str = __version__
    evaluated: bool = True
    """Whether the evaluation that is due at its step came before it."""

    def to_json(self) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "tokenizer": base64.b64encode(self.tokenizer).decode(),
            "data_fingerprint": self.data_fingerprint,
            "version": self.version,
            "evaluated": self.evaluated,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Meta":
        return cls(
            config=from_dict(Config, values["config"]),
            tokenizer=base64.b64decode(values["tokenizer"]),
            data_fingerprint=values["data_fingerprint"],
            version=values["version"],
            evaluated=values.get("evaluated", True),
        )


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has finished a checkpoint, in whatever state it is now."""
    return any((path / MANIFEST).exists() for path in folders_of_steps(workdir / FOLDER))


ATTEMPTS = 10
"""To write a checkpoint in a row; then training ends."""
RETRY_SECONDS = 60.0
CLOCK_STEPS = 10
"""Steps after which several processes agree on what the clock says."""


class Checkpoints:
    """The checkpoints of one run, written in the background and atomically.

    A manifest seals each when it is whole (`manifest`), and none is used that is not as it was.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig | None = None,
        mirror: Mirror | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        """Unless `read_only`, damaged checkpoints that are newer than the newest sound one move
        out of the way, to ``STEP.damaged``, as does what a kill left unfinished.

        With a `mirror` checkpoints are finished when they are in its bucket.

        Raises:
          CheckpointError: there are checkpoints, and all of them are damaged.
        """
        self._folder = (workdir / FOLDER).absolute()
        self._config = config or CheckpointConfig()
        self._mirror = mirror if mirror is not None and mirror.bucket is not None else None
        self._newest = newest_sound(
            self._folder,
            lambda: finished(self._folder, tidy=not read_only),
            problem_of,
            None if read_only else set_aside,
        )
        self._orbax = build_checkpointer(self._mirror is not None)
        self._writing: threading.Thread | None = None
        self._failed: Exception | None = None
        self._failures = 0
        self._last_try = monotonic()
        self._told_of_best = False

    @classmethod
    def open(cls, workdir: Path) -> "Checkpoints":
        """The checkpoints of an existing run, to read; raises `CheckpointError` without any."""
        if not (workdir / FOLDER).is_dir():
            raise CheckpointError(
                f"{workdir} holds no {FOLDER}: give the --workdir of a run that has saved one"
            )
        return cls(workdir, read_only=True)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that is whole."""
        return self._newest

    def look_for_best(self, numbers: Mapping[str, float]) -> None:
        """Says so, once, where an evaluation does not have the number that `best` names."""
        best = self._config.best
        if best is None or best in numbers or self._told_of_best or jax.process_index() > 0:
            return
        self._told_of_best = True
        log.warning(
            "checkpoint.best=%r: the evaluation has no such number, so no checkpoint is the best; "
            "there are %s",
            best,
            ", ".join(sorted(numbers)) or "none at all",
        )

    def due(self, step: int) -> bool:
        """Whether it is time: every so many steps, every so many minutes, or again after a failure.

        The same in all processes.
        """
        passed = monotonic() - self._last_try
        alone = jax.process_count() == 1  # several end where one of them fails
        if alone and (self._failures or self._failed is not None):
            return passed >= RETRY_SECONDS
        if step % self._config.every == 0:
            return True
        if self._config.minutes is None:
            return False
        late = passed >= 60 * self._config.minutes
        if alone:
            return late
        if step % CLOCK_STEPS:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(late)))

    def save_or_retry(
        self, state: TrainState, meta: Meta, numbers: Mapping[str, float], wait: bool
    ) -> None:
        """As `save`; where that fails, the next steps try again (`due`), or this with `wait`.

        Raises:
          CheckpointError: it failed too often; or at all, in a run of several processes, which
            can go on from the one before in the same way.
        """
        with self._told("now"):
            self.wait()  # for the one before, that is written in the background
        while True:
            with self._told(f"in {RETRY_SECONDS:.0f} s"):
                self.save(state, meta, numbers)
                if wait:
                    self.wait()
                return
            if not wait:
                return
            sleep(RETRY_SECONDS)

    @contextlib.contextmanager
    def _told(self, again: str) -> Iterator[None]:
        """Counts and logs a failure, and that there is another attempt; or raises it."""
        try:
            yield
        except CheckpointError as error:
            self._failures += 1
            if self._failures >= ATTEMPTS or jax.process_count() > 1:
                raise
            number = self._failures + 1
            message = "%s; training goes on in memory, attempt %d of %d follows %s"
            log.error(message, error, number, ATTEMPTS, again)

    def save(
        self, state: TrainState, meta: Meta, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Copies the state off the devices and writes it in the background.

        `numbers` are of its evaluation: ``checkpoint.best`` names one of them.

        Raises:
          CheckpointError: it cannot be written, or the one before it could not.  The state is as it
            was; to save it again is another attempt.
        """
        self._last_try = monotonic()
        self.wait()
        step = int(state.step)
        if self._newest == step:  # by an attempt before the last, or the run that this one resumes
            return
        items = {name: ocp.args.PyTreeSave(part) for name, part in _parts(state).items()}
        args = ocp.args.Composite(**items, **{META: ocp.args.JsonSave(meta.to_json())})
        try:
            if not self._folder.parent.is_dir():  # Orbax would make it, where a disk was mounted
                raise FileNotFoundError(f"there is no {self._folder.parent}")
            # What is there already is of a save that was cut short, or of a run that went back.
            self._orbax.save(self._folder / str(step), args=args, force=True)
        # Orbax and TensorStore pass on whatever the file system says.
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error
        self._writing = threading.Thread(
            target=self._finish, args=(step, dict(numbers or {})), name="checkpoint"
        )
        self._writing.start()

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises `CheckpointError` where it is not."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise self._failure(error) from error

    def _finish(self, step: int, numbers: Mapping[str, float]) -> None:
        """Waits for Orbax in a thread of its own, seals what it has written, and deletes others."""
        try:
            self._orbax.wait_until_finished()
            if self._mirror is not None:
                self._mirror.send_checkpoint(step, numbers, self._config, wait_for_all)
            elif jax.process_index() == 0:
                seal(self._folder / str(step), numbers)
                delete_all_but(kept(sealed(self._folder), self._config), self._folder)
            self._newest, self._failures = step, 0
        except Exception as error:  # for the main thread
            self._failed = error

    def _failure(self, error: Exception) -> CheckpointError:
        # Orbax's checkpointer goes on to raise what it raised once.
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = build_checkpointer(self._mirror is not None)
        try:
            free = f"{shutil.disk_usage(self._folder.parent).free / 2**20:,.0f} MiB free"
        except OSError:
            free = "the folder of the run is not there"
        reason = str(error).partition("\n")[0]
        if len(reason) > 300:
            reason = f"{reason[:120]} ... {reason[-160:]}"
        return CheckpointError(f"no checkpoint in {self._folder} ({free}): {reason}")

    def restore(self, step: int, like: TrainState, weights_only: bool = False) -> TrainState:
        """The state of `step` with the shapes, types and shardings of `like`, which may be no more.

        With `weights_only` the optimizer's state is left as it is in `like`.

        Raises:
          CheckpointError: the checkpoint holds another model or optimizer.
        """
        parts = _parts(like)
        self._check_weights(step, parts[WEIGHTS])
        if weights_only:
            del parts[OPTIMIZER]
        items = {
            name: ocp.args.PyTreeRestore(
                part, restore_args=ocp.checkpoint_utils.construct_restore_args(part)
            )
            for name, part in parts.items()
        }
        try:
            restored = self._orbax.restore(
                self._folder / str(step), args=ocp.args.Composite(**items)
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise self._misfit(step, str(error)) from error
        fields = {field: value for part in parts for field, value in restored[part].items()}
        return replace(like, **fields)

    def _check_weights(self, step: int, weights: Any) -> None:
        """Raises `CheckpointError` naming the first weight whose shape differs.

        Orbax would find out in the middle of reading, and not say which one it is.
        """
        metadata: Any = self._orbax.metadata(self._folder / str(step))
        stored = _shapes(metadata.item_metadata[WEIGHTS])
        wanted = _shapes(weights)
        for path in sorted(stored.keys() | wanted.keys()):
            there, here = stored.get(path, "missing"), wanted.get(path, "missing")
            if there != here:
                raise self._misfit(step, f"{path} is {there} there and {here} in this model")

    def _misfit(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} in {self._folder} does not fit this configuration: {reason}; use "
            "another --workdir, or the configuration it was made with"
        )

    def meta(self, step: int) -> Meta:
        args = ocp.args.Composite(**{META: ocp.args.JsonRestore()})
        return Meta.from_json(self._orbax.restore(self._folder / str(step), args=args)[META])

    def close(self) -> None:
        """Waits, and raises, as `wait` does."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            log.error("%s", error)  # not in place of what it ends with


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
    return {path: leaf.shape for path, leaf in by_path(tree).items()}
