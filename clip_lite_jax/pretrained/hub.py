"""Weights from the Hugging Face Hub: ``hf://owner/name`` or ``hf://owner/name@revision``."""

import re
from pathlib import Path

from clip_lite_jax.errors import CheckpointError, ConfigError

SCHEME = "hf://"
PATTERN = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
NEEDED = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
"""Weights, their index and configuration, tokenizers: no code, and no weights of other projects."""


def download(source: str) -> Path:
    """The folder of a repository's files, fetched where they are not there yet.

    Raises:
      ConfigError: the address is malformed, or the extra `hub` is not installed.
      CheckpointError: it cannot be fetched.
    """
    if not (match := PATTERN.fullmatch(source)):
        raise ConfigError(f"{source!r} is no address of weights: write hf://owner/name[@revision]")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the extra hub: pip install clip-lite-jax[hub], or download the "
            "repository and give the path of its folder"
        ) from error
    name, revision = match.groups()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(NEEDED)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be fetched: {error}") from error
