"""A run that is kept in a bucket: it works in a local folder, which this fetches and sends.

What the bucket holds is the run; the folder is a copy, and what else lies there when a run starts
is deleted.  Process 0 sends the small files, each process its part of a checkpoint.
"""

import fcntl
import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

import jax

from clip_lite_jax import bucket_checkpoints as bucket_of
from clip_lite_jax.bucket_files import FILES, fetch_files
from clip_lite_jax.config import CheckpointConfig, Config
from clip_lite_jax.errors import CheckpointError, ConfigError, DataError, UserError
from clip_lite_jax.files import CHECKPOINTS, SKIPPED_FILE, TOKENIZER_FILE, cache_folder
from clip_lite_jax.newest import GoneError, newest_sound
from clip_lite_jax.places import Place, place
from clip_lite_jax.remote import RemotePath

log = logging.getLogger(__name__)

FOLDERS = ("tensorboard", "profile")
"""Whose files are sent, and not fetched."""
STAYS = ("features",)
"""What is kept of a folder that is used again: it can be made anew, at a price."""
DELETED = (TOKENIZER_FILE, SKIPPED_FILE)
"""What a run that begins anew deletes; nothing else that is missing here is missing for good."""
SECONDS = 60.0
"""At most so often are small files sent while nothing else happens."""


class Mirror:
    """While it is entered, the folder of a run and its bucket; of a local run nothing but its path.

    Small files that cannot be sent are told of, and sent with the next ones; at the end that is an
    error.  For checkpoints see `send_checkpoint`.
    """

    def __init__(self, workdir: Place) -> None:
        self.bucket = workdir if isinstance(workdir, RemotePath) else None
        self.folder = workdir if isinstance(workdir, Path) else local_folder(workdir, "runs")
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what the bucket has
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # of the two that follow
        self._sending = False
        self._again = False
        self._due = 0.0
        self._failing = False
        self._numbers: dict[int, dict[str, float]] = {}
        self._held = ExitStack()

    def __str__(self) -> str:
        return str(self.bucket or self.folder)

    def __enter__(self) -> "Mirror":
        """Fetches what is there.

        Raises:
          ConfigError: the bucket cannot be read or written, or the folder not be written; or the
            run goes on in another process of this machine.
          CheckpointError: it has checkpoints, and all of them are damaged.
        """
        if self.bucket is None:
            return self
        with ExitStack() as held:  # let go of where this fails
            try:
                held.enter_context(self._alone())
                _check_writable(self.bucket)
                self._fetch_files(self.bucket)
                fetch_newest(self.bucket, self.folder, mend=True)
                if jax.process_index() == 0:
                    log.info("%s is copied to %s while it runs", self.bucket, self.folder)
            except DataError as error:
                raise ConfigError(f"--workdir={self.bucket} cannot be used: {error}") from error
            except OSError as error:
                raise ConfigError(
                    f"--workdir={self.bucket} cannot be copied to {self.folder}: {error}; the "
                    "variable CLIP_LITE_CACHE names another folder"
                ) from error
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.bucket is None:
            return
        if self._thread is not None:
            self._thread.join()
        with self._held:
            try:
                self.send()
            except DataError as problem:
                if error is None:
                    raise
                log.error("%s", problem)  # not in place of what it ends with
        if isinstance(error, UserError):  # whoever reads it knows the bucket, not the copy
            error.args = (str(error).replace(str(self.folder), str(self.bucket)),)

    def check(self, config: Config) -> None:
        """Raises `ConfigError` where several processes would keep features in folders apart."""
        cached = config.model.image.cache or config.model.text.cache
        if cached and not config.data.feature_cache and self.bucket and jax.process_count() > 1:
            raise ConfigError(
                f"--workdir={self.bucket}: features of frozen encoders (model.*.cache) are shared "
                "by processes, and a bucket is no folder for them: name one that all hosts see, "
                "--config.data.feature_cache=DIR"
            )

    def complete(self) -> None:
        """Fetches the parts of the newest checkpoint that other processes have written."""
        if self.bucket is not None and jax.process_count() > 1:
            fetch_newest(self.bucket, self.folder, mend=False)

    def send_soon(self, at_once: bool = False) -> None:
        """Sends small files in the background, if it is time or `at_once`.

        The loop calls this: one that hangs sends nothing.
        """
        if self.bucket is None or not (at_once or monotonic() >= self._due):
            return
        self._due = monotonic() + SECONDS
        with self._turn:
            alive = self._thread is not None and self._thread.is_alive()
            self._again = alive and self._sending  # what it sends may be older than this
            if self._again:
                return
            self._sending = True
        self._thread = threading.Thread(target=self._send_until_done, name="bucket")
        self._thread.start()

    def _send_until_done(self) -> None:
        again = True
        while again:
            self._try_to_send()
            with self._turn:
                again = self._sending = self._again
                self._again = False

    def _try_to_send(self) -> None:
        try:
            self.send()
        except DataError as error:
            if not self._failing:
                log.error("%s; it is tried again, and training goes on", error)
            self._failing = True
        else:
            if self._failing:
                log.warning("%s is written again", self.bucket)
            self._failing = False

    def send(self) -> None:
        """Sends the small files that have changed; raises `DataError` where that fails."""
        if self.bucket is None or jax.process_index() > 0:
            return
        try:
            with self._lock:
                self._send_changed(self.bucket)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be sent to {self.bucket}: {error}") from error

    def _send_changed(self, bucket: RemotePath) -> None:
        if not self.folder.is_dir():
            raise DataError(
                f"{self.folder}, which is sent to {bucket}, is gone: start again, and the run goes "
                "on from what the bucket has"
            )
        there = {path.relative_to(self.folder).as_posix(): path for path in self._small_files()}
        for name in (self._sent.keys() - there.keys()).intersection(DELETED):
            (bucket / name).remove()
            del self._sent[name]
        for name, path in there.items():
            state = _state_of(path)
            if self._sent.get(name) != state:
                # As it is now: it may grow while it is sent.
                (bucket / name).write_bytes(path.read_bytes())
                self._sent[name] = state

    def _small_files(self) -> list[Path]:
        inside = [path for name in FOLDERS for path in sorted((self.folder / name).rglob("*"))]
        return [path for path in [*map(self.folder.joinpath, FILES), *inside] if path.is_file()]

    def send_checkpoint(
        self,
        step: int,
        numbers: Mapping[str, float],
        config: CheckpointConfig,
        wait_for_all: Callable[[str], None],
    ) -> None:
        """Sends what was logged before a checkpoint, it, and its manifest; deletes older ones.

        All processes call it; each sends its part.

        Raises:
          DataError: it cannot be written.
        """
        assert self.bucket is not None
        local, there = self.folder / CHECKPOINTS, self.bucket / CHECKPOINTS
        _delete_all_but(local, step)  # first: each attempt leaves one while the bucket takes none
        self.send()
        bucket_of.send(
            local / str(step),
            there / str(step),
            numbers,
            jax.process_index(),
            jax.process_count(),
            wait_for_all,
        )
        if jax.process_index() == 0:
            self._numbers[step] = dict(numbers)
            try:
                bucket_of.retain(there, config, self._numbers)
            except (DataError, OSError) as error:  # what was saved is saved
                log.error("checkpoints that are no longer needed are not deleted: %s", error)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises `ConfigError` where another process of this machine works in the folder."""
        self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder.parent / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"--workdir={self.bucket}: another process of this machine runs it; wait until "
                    "that has ended, or name another --workdir"
                ) from error
            yield

    def _fetch_files(self, bucket: RemotePath) -> None:
        for path in self.folder.glob("*"):
            if path.name not in (*STAYS, CHECKPOINTS):
                _delete(path)
        for name in fetch_files(bucket, self.folder):
            self._sent[name] = _state_of(self.folder / name)


def fetch_newest(bucket: RemotePath, folder: Path, mend: bool) -> None:
    """Makes the newest sound checkpoint in the bucket the only one in the local folder of the run.

    All processes call it, and agree.  With `mend`, what is damaged does not count from now on.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged; or the run that goes on
        there deletes them before all processes have one.
      DataError: the bucket cannot be reached.
    """
    local, there = folder / CHECKPOINTS, bucket / CHECKPOINTS

    def problem(path: RemotePath) -> str:
        found = bucket_of.bring(path, local / path.name)
        if found and bucket_of.is_gone(path):
            raise GoneError
        return found

    newest = newest_sound(
        there,
        lambda: bucket_of.finished(there, mend),
        problem,
        bucket_of.set_aside if mend else None,
    )
    if newest is not None and jax.process_index() > 0:  # process 0 has it, and found it sound
        try:
            found = problem(there / str(newest))
        except GoneError:
            found = "the run that goes on there has deleted it; start again"
        if found:
            raise CheckpointError(f"checkpoint {there / str(newest)} cannot be used here: {found}")
    _delete_all_but(local, newest)


def local_copy(name: str | Path) -> Path:
    """The folder of a run to read: itself, or a copy of what a bucket holds of it.

    Raises:
      CheckpointError: it cannot be read, or all its checkpoints are damaged.
    """
    if isinstance(name, Path):
        return name
    try:
        bucket = place(name)
        if isinstance(bucket, Path):
            return bucket
        folder = local_folder(bucket, "copies_of_runs")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder.parent / "lock").open("w") as lock:
            if jax.process_count() == 1:  # several wait for each other within it
                fcntl.flock(lock, fcntl.LOCK_EX)  # for runs that begin at the same time
            fetch_files(bucket, folder)
            fetch_newest(bucket, folder, mend=False)
    except DataError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be copied to {cache_folder()}: {error}; the variable CLIP_LITE_CACHE "
            "names another folder"
        ) from error
    if not any((folder / CHECKPOINTS).glob("*")):
        raise CheckpointError(
            f"{name} holds no {CHECKPOINTS}: give the --workdir of a run that has saved one"
        )
    return folder


def local_folder(bucket: RemotePath, kind: str) -> Path:
    """Where this process has the run of a bucket; it ends with the name of the run."""
    url = bucket.url.rstrip("/")
    known = hashlib.sha256(url.encode()).hexdigest()[:32]
    process = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    name = re.sub(r"[^\w-]", "_", RemotePath(url).name)
    return (cache_folder() / kind / f"{known}{process}" / (name or "run")).absolute()


def _check_writable(bucket: RemotePath) -> None:
    """Raises `DataError` or `ConfigError` where this process can write or delete nothing."""
    file = bucket / f".writable-{jax.process_index()}"
    try:
        file.write_bytes(b"\n")
    except FileNotFoundError as error:
        raise ConfigError(f"--workdir={bucket}: there is no such bucket") from error
    file.remove()


def _state_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _delete_all_but(folder: Path, step: int | None) -> None:
    for path in folder.glob("*"):
        if path.name != str(step):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
