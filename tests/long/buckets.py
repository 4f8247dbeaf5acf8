"""What the tests of buckets have in common."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_lite_jax.config import DataConfig


def moved(config: DataConfig, folder: Path, bucket: str, filesystem: Any) -> DataConfig:
    """The same data in the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{bucket}/{path.relative_to(folder)}", path.read_bytes())
    images = config.image_folder and config.image_folder.replace(str(folder), bucket)
    return replace(config, source=config.source.replace(str(folder), bucket), image_folder=images)
