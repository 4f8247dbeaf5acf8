"""A trained model as a folder for others: written, read back, compared, and only then put in place.

Each format has a writer, and the reader that a stranger would use.  What the reader's model makes
of fixed inputs must agree with the live model, or nothing is left behind.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_lite_jax.apps import export_programs as programs
from clip_lite_jax.apps import export_towers as towers
from clip_lite_jax.apps.export_card import write_card
from clip_lite_jax.apps.export_probe import Outputs, Probe, build_probe, outputs
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.inference import DualEncoderModel, load
from clip_lite_jax.pretrained.own import WEIGHTS_FILE, Own, write_own

TOLERANCE = 1e-5
"""Largest error of an export, relative to the largest number of the live model's output."""


@dataclass(frozen=True)
class Format:
    write: Callable[[DualEncoderModel, Path], None]
    read: Callable[[DualEncoderModel, Path, Probe], Iterator[tuple[str, Outputs]]]
    """What the written folder makes of the probe, or of its first rows, once for every way to read
    it, which is named."""
    lacks: Callable[[DualEncoderModel], str]
    """Why a model cannot be written so, or ""."""


@dataclass(frozen=True)
class Agreement:
    """How far an output of the written model is from the live one."""

    output: str
    where: str  # file or way to read it
    error: float  # largest difference
    relative: float  # to the largest number of the live output
    cosine: float  # smallest of a row, or of all scores


def export(
    path: Path, out: Path, format_name: str = "safetensors", force: bool = False
) -> list[Agreement]:
    """Writes the model of a workdir, or of an exported folder, to the folder `out`.

    Returns how well what was written agrees with the live model.  With `force` a folder that is
    there is replaced.

    Raises:
      ConfigError: a model that the format cannot hold; `out` is in use.
      CheckpointError: no model at `path`; the written model differs from it.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"--format {format_name}: choose one of {', '.join(FORMATS)}")
    out = out.absolute()
    _check_free(path, out, force)
    model = load(path)
    if reason := FORMATS[format_name].lacks(model):
        possible = [name for name, other in FORMATS.items() if not other.lacks(model)]
        raise ConfigError(
            f"--format {format_name}: {reason}; this model can be written as {', '.join(possible)}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        temporary.chmod(0o755)
        agreements = _write(model, temporary, format_name)
        write_card(temporary, model, path, format_name, out.name)
        _put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return agreements


def _write(model: DualEncoderModel, folder: Path, format_name: str) -> list[Agreement]:
    """Writes and compares; raises `CheckpointError` where they differ."""
    probe = build_probe(model)
    FORMATS[format_name].write(model, folder)
    agreements = []
    for where, written in FORMATS[format_name].read(model, folder, probe):
        rows = len(next(iter(written.values())))
        live = outputs(model, probe.first(rows))
        if not all(np.isfinite(array).all() for array in live.values()):
            raise CheckpointError("the model gives numbers that are not finite: nothing was kept")
        agreements += [agreement(name, where, live[name], written[name]) for name in written]
    for found in agreements:
        if not found.relative <= TOLERANCE:  # a NaN does not agree either
            raise CheckpointError(
                f"--format {format_name}: {found.output} of {found.where} differs from the "
                f"live model by {found.relative:.2g} of its largest number, more than {TOLERANCE}: "
                "nothing was kept; this is a fault of the export, not of the model"
            )
    return agreements


def agreement(name: str, where: str, live: np.ndarray, written: np.ndarray) -> Agreement:
    """Compares ``[B, D]``, or ``[B]`` as one row."""
    if live.shape != written.shape:
        raise CheckpointError(f"{where}: {name} is {written.shape}, and {live.shape} live")
    one, other = (np.atleast_2d(np.asarray(x, np.float64)) for x in (live, written))
    error = float(np.abs(one - other).max())
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosine = float(np.min(np.sum(one * other, axis=1) / norms.clip(1e-30)))
    return Agreement(name, where, error, error / max(float(np.abs(one).max()), 1e-30), cosine)


def describe(agreements: list[Agreement]) -> str:
    """One line for each output, for a terminal."""
    return "\n".join(
        f"{found.where}, {found.output}: largest error {found.error:.2g}, "
        f"smallest cosine {found.cosine:.8f}"
        for found in agreements
    )


def _check_free(path: Path, out: Path, force: bool) -> None:
    for kept, what in ((path, "the model itself"), (Path.cwd(), "the current folder")):
        if out.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise ConfigError(f"--out {out} is or holds {what}: choose another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: choose a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(f"--out {out} is not empty: choose another folder, or give --force")


def _put_in_place(temporary: Path, out: Path) -> None:
    """Renames; what was there before is away only when the new folder is there."""
    if not out.exists():
        temporary.rename(out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        out.rename(old)  # onto an empty folder
        temporary.rename(out)
    except OSError:
        if not out.exists():
            old.rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_own(model: DualEncoderModel, folder: Path) -> None:
    tokenizer = model.tokenizer if model.has_tokenizer else None
    own = Own(
        model.config,
        model.model,
        model.params,
        model.model_state,
        tokenizer,
        model.data_fingerprint,
    )
    write_own(folder, own)


def _read_own(model: DualEncoderModel, folder: Path, probe: Probe) -> Iterator[tuple[str, Outputs]]:
    del model
    read = load(folder)
    # Its own tokenizer reads the captions anew.
    yield WEIGHTS_FILE, outputs(read, build_probe(read) if read.has_tokenizer else probe)


def _nothing(model: DualEncoderModel) -> str:
    del model
    return ""


FORMATS: Mapping[str, Format] = {
    "safetensors": Format(_write_own, _read_own, _nothing),
    "torchvision": Format(
        towers.write_torchvision, towers.read_torchvision, towers.lacks_torchvision
    ),
    "detectron2": Format(towers.write_detectron, towers.read_detectron, towers.lacks_detectron2),
    "hf": Format(towers.write_hf, towers.read_hf, towers.lacks_hf),
    "stablehlo": Format(programs.write_programs, programs.read_programs, programs.lacks_programs),
}
