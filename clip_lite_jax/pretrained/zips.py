"""Zip archives of weights, read in memory that the file's own size bounds."""

import zipfile
from pathlib import Path

from clip_lite_jax.errors import CheckpointError


class Zip:
    """An open archive; a context manager.

    Args:
      growth: how many times the file's size all that is read may have; at 1 compressed records are
        refused.
    """

    def __init__(self, file: Path, growth: int = 1) -> None:
        self._file, self._growth = file, growth
        self._left = growth * file.stat().st_size
        self._zip = zipfile.ZipFile(file)
        self._records = {info.filename: info for info in self._zip.infolist()}
        self.names = tuple(self._records)

    def __enter__(self) -> "Zip":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, name: str) -> bytes:
        """One record.

        Raises:
          KeyError: there is none of this name.
          CheckpointError: it is compressed where that may not be, or larger than it can be.
        """
        record = self._records[name]
        stored = record.compress_type == zipfile.ZIP_STORED
        deflated = record.compress_type == zipfile.ZIP_DEFLATED and self._growth > 1
        if not stored and not deflated:
            raise CheckpointError(
                f"{self._file}: {name[:100]} is compressed; write the file anew without compression"
            )
        # Records may overlap, and a bomb says that it is small: what counts is the sum.
        self._left -= record.file_size
        if self._left < 0 or (stored and record.file_size != record.compress_size):
            raise CheckpointError(
                f"{self._file}: its records unpack to more than {self._growth} times its size, "
                "which weights do not: the file is damaged or means harm"
            )
        if record.CRC == 0:  # torch.serialization.set_crc32_options(False)
            record.CRC = None  # type: ignore[assignment]
        with self._zip.open(record) as opened:
            # Without a number, it would unpack whatever there is.
            data = opened.read(record.file_size)
        if len(data) != record.file_size:
            raise CheckpointError(f"{self._file} is cut short: {name[:100]} has no end")
        return data
