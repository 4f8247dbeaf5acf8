"""Checkpoints in a bucket: there when their manifest is, which goes there last and leaves first.

Object stores have no rename, and a kill may come between any two objects.  Names in a bucket and in
its manifests are a stranger's: none leads out of its folder.  Without jax, as `apps.status` is.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clip_lite_jax.config import CheckpointConfig
from clip_lite_jax.errors import DataError
from clip_lite_jax.manifest import (
    MANIFEST,
    content_of,
    listed,
    problem_of,
    seal_with,
    size_and_hash,
)
from clip_lite_jax.places import each
from clip_lite_jax.remote import RemotePath
from clip_lite_jax.retention import kept

log = logging.getLogger(__name__)

SET_ASIDE = "manifest.damaged.json"
"""What the manifest of a damaged checkpoint is called, which then does not count."""

LONGEST_NAME, LONGEST_PATH = 200, 1024
"""Bytes: disks take names of 255, of which `RemotePath.download` needs some; buckets take paths."""

Files = dict[str, list[Any]]
"""Size and SHA-256 of each file, by its path below the folder."""


def steps_in(folder: RemotePath) -> list[RemotePath]:
    """The folders of steps, in their order, whole or not."""
    folder.forget_listings()
    paths = [path for path in folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]{0,8}", path.name)]
    return sorted(paths, key=lambda path: int(path.name))


def finished(folder: RemotePath, tell: bool) -> list[RemotePath]:
    """The sealed ones, in their order; with `tell` the log has the others."""
    found = []
    for path in steps_in(folder):
        if is_sealed(path):
            found.append(path)
        elif tell and files_in(path):
            what = "is damaged" if is_damaged(path) else "was not finished"
            log.warning("checkpoint %s %s, and is not used", path, what)
    return found


def files_in(folder: RemotePath) -> list[RemotePath]:
    """What lies below; nothing where there is no folder, or one that is left of deleted files."""
    try:
        return folder.files()
    except FileNotFoundError:
        return []


def is_sealed(there: RemotePath) -> bool:
    return (there / MANIFEST).is_file()


def is_damaged(there: RemotePath) -> bool:
    """Whether it was set aside, and has not been saved again since."""
    return (there / SET_ASIDE).is_file() and not is_sealed(there)


def is_gone(there: RemotePath) -> bool:
    """Whether a checkpoint that was one when it was listed is none by now."""
    there.forget_listings()
    return not is_sealed(there)


def read_manifest(there: RemotePath) -> tuple[bytes, Files, dict[str, float]]:
    """The manifest of a checkpoint: as it is, its files, and the numbers of the evaluation.

    Raises:
      FileNotFoundError: there is none.
      DataError: it cannot be reached.
      ManifestError: it is not one, or names what lies elsewhere.
    """
    data = (there / MANIFEST).read_bytes()
    try:
        content = json.loads(data)
        files = {str(name): list(known) for name, known in content["files"].items()}
        numbers = {str(name): float(value) for name, value in content["numbers"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} cannot be read: {error}") from error
    for name in files:
        if not _is_file_of_one(name):
            raise ManifestError(f"{MANIFEST} names what is no file of it: {name!r}")
        try:
            there / name
        except DataError as error:
            raise ManifestError(f"{MANIFEST}: {error}") from error
    return data, files, numbers


def _is_file_of_one(name: str) -> bool:
    """Whether a file of a checkpoint may have such a path: it stays inside, and fits on a disk."""
    parts = re.split(r"[/\\]", name)
    try:
        longest, whole = max(len(part.encode()) for part in parts), len(name.encode())
    except UnicodeEncodeError:
        return False
    fits = longest <= LONGEST_NAME and whole <= LONGEST_PATH
    return fits and parts[0] != MANIFEST and not {"", ".", ".."}.intersection(parts)


class ManifestError(Exception):
    """A manifest that says nothing of use."""


def bring(there: RemotePath, here: Path) -> str:
    """Makes the folder `here`, which may have a part of it, a copy of the checkpoint `there`.

    Returns what is wrong with that, and nothing where it is as it was sealed.

    Raises:
      DataError: it cannot be reached.
    """
    try:
        manifest, files, _ = read_manifest(there)
    except FileNotFoundError:
        return f"it was never finished: there is no {MANIFEST}"
    except ManifestError as error:
        return str(error)
    own = here / MANIFEST
    if own.is_file() and own.read_bytes() == manifest and not problem_of(here):
        return ""
    own.unlink(missing_ok=True)
    for path in list(here.rglob("*")):
        belongs = path.relative_to(here).as_posix() in files
        if belongs and path.is_dir():  # of something else: it is no fault of what is there
            shutil.rmtree(path)
        elif path.is_file() and not belongs:
            path.unlink()
    places = {there / name: name for name in files}

    def problem(place: RemotePath) -> str:
        name = places[place]
        try:
            return _bring_file(place, here / name, name, files[name])
        except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
            return f"{name} cannot be a file: {error}"  # another one has its name, or part of it

    for found in each(problem, list(places)):
        if found:
            return found
    here.mkdir(parents=True, exist_ok=True)
    seal_with(here, manifest)
    return ""


def _bring_file(there: RemotePath, here: Path, name: str, known: list[Any]) -> str:
    if here.is_file() and size_and_hash(here) == known:
        return ""
    here.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # once more, in case it has changed on its way
        try:
            there.download(here)
        except FileNotFoundError:
            return f"{name} is missing"
        if size_and_hash(here) == known:
            return ""
    here.unlink()
    return f"the content of {name} has changed"


def send(
    here: Path,
    there: RemotePath,
    numbers: Mapping[str, float],
    process: int = 0,
    processes: int = 1,
    wait_for_all: Callable[[str], None] = lambda moment: None,
) -> None:
    """Sends a finished checkpoint, of which each process has a part in a folder of its own.

    Of files that several have, such as descriptions of arrays, those of the first of them count.

    Raises:
      DataError: it cannot be written, or no longer be read.
    """
    own = listed(here)
    parts = there.with_name(f"{there.name}.parts")
    if process == 0:
        (there / MANIFEST).remove()  # of an attempt before, or of a run that went back
        (there / SET_ASIDE).remove()  # what was damaged is made anew
    if processes > 1:
        _write_json(parts / f"{process}.json", own)
    wait_for_all("listed")
    for earlier in _read_parts(parts, range(process)):
        own = {name: known for name, known in own.items() if name not in earlier}
    sent = {there / name: here / name for name in own}
    for _ in each(lambda place: place.upload(sent[place]), list(sent)):
        pass
    wait_for_all("sent")
    if process == 0:
        files: Files = {}
        for other in reversed(_read_parts(parts, range(1, processes))):
            files |= other
        manifest = content_of(files | own, numbers)
        (there / MANIFEST).write_bytes(manifest)
        if processes > 1:
            delete(parts)
        else:
            seal_with(here, manifest)
    wait_for_all("sealed")


def _write_json(path: RemotePath, content: Files) -> None:
    path.write_bytes(json.dumps(content).encode())


def _read_parts(parts: RemotePath, processes: range) -> list[Files]:
    paths = [parts / f"{process}.json" for process in processes]
    return [json.loads(data) for data in each(RemotePath.read_bytes, paths)]


def delete(there: RemotePath) -> None:
    """Deletes a folder; a checkpoint stops to be one first."""
    (there / MANIFEST).remove()
    for _ in each(RemotePath.remove, files_in(there)):
        pass


def set_aside(there: RemotePath) -> None:
    """Makes a damaged checkpoint one that does not count."""
    (there / SET_ASIDE).write_bytes((there / MANIFEST).read_bytes())
    (there / MANIFEST).remove()


def retain(
    folder: RemotePath, config: CheckpointConfig, known: dict[int, dict[str, float]]
) -> None:
    """Deletes all checkpoints but those that stay, and what was never finished.

    `known` remembers the numbers of their evaluations.

    Raises:
      DataError: something cannot be read or deleted.
    """
    paths = {int(path.name): path for path in steps_in(folder)}
    sealed = {step: path for step, path in paths.items() if is_sealed(path)}
    for step in sealed.keys() - known.keys():
        known[step] = _numbers_of(sealed[step])
    stay = kept({step: known[step] for step in sealed}, config)
    for step, path in paths.items():
        if step not in stay and not is_damaged(path):
            delete(path)
    for path in folder.glob("*.parts"):  # of a save that was cut short
        if path.stem.isdecimal() and int(path.stem) <= max(sealed, default=-1):
            delete(path)


def _numbers_of(there: RemotePath) -> dict[str, float]:
    try:
        return read_manifest(there)[2]
    except ManifestError:
        return {}
