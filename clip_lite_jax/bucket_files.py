"""The small files of a run in a bucket, for those who look at it without jax."""

import os
from pathlib import Path

from clip_lite_jax.files import (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    SKIPPED_FILE,
    STATUS_FILE,
    TOKENIZER_FILE,
)
from clip_lite_jax.remote import RemotePath

FILES = (
    *(CONFIG_FILE, TOKENIZER_FILE, METRICS_FILE, SKIPPED_FILE),
    *(STATUS_FILE, RESULTS_FILE, REPORT_FILE),
)
"""Small files that are fetched and sent."""


def fetch_files(bucket: RemotePath, folder: Path, times: bool = False) -> list[str]:
    """Copies the small files of a run to a local folder, and returns their names.

    With `times` the copies are as old as what they are of, where the bucket tells.

    Raises:
      DataError: the bucket cannot be reached.
    """
    bucket.forget_listings()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # buckets may be private
    found = []
    for name in FILES:
        try:
            (folder / name).write_bytes((bucket / name).read_bytes())
        except FileNotFoundError:
            (folder / name).unlink(missing_ok=True)  # of an older copy
            continue
        found.append(name)
        if times and (time := (bucket / name).changed()):
            os.utime(folder / name, (time, time))
    return found
