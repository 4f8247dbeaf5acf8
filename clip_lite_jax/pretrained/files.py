"""Weight files of other projects, read safely: arrays, or a `CheckpointError`, and nothing is run."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from clip_lite_jax.pretrained.torch_files import read_torch_stream, read_torch_zip


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file or folder by name."""
    path = resolve_path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if path.read_bytes()[:2] == b"PK":
        return read_torch_zip(path)
    if path.suffix == ".pth":
        return read_torch_stream(path)
    return load_file(path)


def resolve_path(source: str | Path) -> Path:
    return Path(source)
