"""What the tests of buckets have in common."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources


def moved(config: DataConfig, folder: Path, bucket: str, filesystem: Any) -> DataConfig:
    """The same data in the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{bucket}/{path.relative_to(folder)}", path.read_bytes())
    images = config.image_folder and config.image_folder.replace(str(folder), bucket)
    return replace(config, source=config.source.replace(str(folder), bucket), image_folder=images)


def everything(config: DataConfig) -> dict[str, list[Any]]:
    """All that is known of all examples, by split."""
    found = {}
    for split, source in build_sources(config, BadExamples()).items():
        examples = (source[i] for i in range(len(source)))
        found[split] = [(e.id, e.group, e.captions, e.image) for e in examples]
    return found
