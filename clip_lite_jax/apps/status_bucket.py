"""How a run is whose folder is a bucket: its small files are looked at in a copy of them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clip_lite_jax.apps.status import status
from clip_lite_jax.apps.status_files import iso
from clip_lite_jax.bucket_checkpoints import (
    bring,
    files_in,
    is_damaged,
    is_gone,
    is_sealed,
    steps_in,
)
from clip_lite_jax.bucket_files import fetch_files
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.files import CHECKPOINTS
from clip_lite_jax.manifest import MANIFEST
from clip_lite_jax.remote import RemotePath


def status_in_bucket(workdir: RemotePath, verify: bool = False) -> dict[str, Any]:
    """As `status.status`; with `verify` all checkpoints are fetched, one after the other.

    Raises:
      CheckpointError: there is no run, or nobody can tell.
      DataError: the bucket cannot be reached.
    """
    with TemporaryDirectory() as folder:
        fetch_files(workdir, Path(folder), times=True)
        steps = list(reversed(steps_in(workdir / CHECKPOINTS)))
        if not steps and not any(Path(folder).iterdir()):
            raise CheckpointError(f"{workdir} holds no run; give the --workdir of one")
        (Path(folder) / CHECKPOINTS).mkdir()
        damaged = [path for path in steps if is_damaged(path)]
        there = (_checkpoint(path, verify) for path in steps if path not in damaged)
        saved = [checkpoint for checkpoint in there if checkpoint is not None]
        names = [path.name for path in damaged]
        return status(Path(folder), saved=(saved, names)) | {"workdir": str(workdir)}


def _checkpoint(there: RemotePath, verify: bool) -> dict[str, Any] | None:
    """What is to be said of a checkpoint; None of one that its run is deleting now."""
    sealed, problem = is_sealed(there), ""
    if sealed and verify:
        with TemporaryDirectory() as folder:
            problem = bring(there, Path(folder))
    files = files_in(there)
    if not files or (sealed and is_gone(there)):
        return None
    return {
        "step": int(there.name),
        "time": iso((there / MANIFEST).changed()) if sealed else None,
        "bytes": sum(path.known.size or 0 for path in files),
        "sealed": sealed,
        "problem": problem,
    }
