"""Weight files of other projects, read safely."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file or folder by name."""
    path = resolve_path(path)
    return load_file(path / "model.safetensors" if path.is_dir() else path)


def resolve_path(source: str | Path) -> Path:
    return Path(source)
