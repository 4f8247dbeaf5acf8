"""Which examples could not be used, and why."""

import json
import threading
from collections.abc import Iterable
from pathlib import Path

from clip_lite_jax.errors import DataError
from clip_lite_jax.files import read_json_lines


class BadExamples:
    """The examples that could not be used, each once, with the reason; kept in a JSONL file."""

    def __init__(
        self,
        path: Path | None = None,
        max_share: float = 1.0,
        total: int = 0,
        strict: bool = False,
    ) -> None:
        """Raises no error until more than `max_share` of `total` examples are bad, or any at all
        if `strict`."""
        self.path, self.max_share, self.total, self.strict = path, max_share, total, strict
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        if path is not None and path.exists():
            self._reasons = {item["id"]: item["reason"] for item in read_json_lines(path)}

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, id: str) -> bool:
        return id in self._reasons

    @property
    def reasons(self) -> dict[str, str]:
        """Id → reason, in the order they were found."""
        return dict(self._reasons)

    def add(self, id: str, reason: str) -> None:
        """Lists an example; raises `DataError` when too large a share of the source is bad."""
        self.extend([(id, reason)])

    def extend(self, found: Iterable[tuple[str, str]]) -> None:
        """Lists many examples; raises as `add` does."""
        with self._lock:
            new = {id: reason for id, reason in found if id not in self._reasons}
            self._reasons |= new
            if new and self.path is not None:
                lines = [json.dumps({"id": id, "reason": why}) + "\n" for id, why in new.items()]
                with self.path.open("a") as file:
                    file.writelines(lines)
        if new:
            self._check()

    def expect(self, total: int) -> None:
        """Says how many examples there are, bad ones included; raises as `add` does."""
        self.total = total
        self._check()

    def _check(self) -> None:
        limit = 0.0 if self.strict else self.max_share * self.total
        if not len(self) or not (self.strict or self.total) or len(self) <= limit:
            return
        id, reason = next(reversed(self._reasons.items()))
        rule = "data.strict=True" if self.strict else f"data.max_bad_share={self.max_share}"
        share = f"{len(self)} of {self.total}" if self.total else f"{len(self)}"
        raise DataError(
            f"{share} examples cannot be used ({rule}); the latest: {id}: {reason}"
            + (f"; all are listed in {self.path}" if self.path else "")
        )
