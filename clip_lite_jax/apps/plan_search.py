"""What to change when a training step does not fit, and the largest batch that does."""

import math
from collections.abc import Callable, Iterator, Mapping

from clip_lite_jax.config import Config, override

Change = Mapping[str, str]
"""Values by dotted field, as on the command line."""


def changed(config: Config, change: Change) -> Config:
    for name, value in change.items():
        config = override(config, name, value)
    return config


def changes(
    config: Config, shrink: float | None, remat: tuple[str, ...], devices: int = 1
) -> Iterator[Change]:
    """Changes that save memory, the cheapest first.

    Args:
      shrink: by how much temporaries must shrink, a factor above 1; None where parameters and
        optimizer state do not fit, so that nothing else helps than to split them.
      remat: towers, ``image`` or ``text``, that can compute activations again.
      devices: over which parameters can be split.
    """
    split = {"mesh.fsdp": "all"} if devices > 1 and config.mesh.fsdp == 1 else {}
    if shrink is None:
        if split:
            yield split
            yield split | {"accumulate": str(2 * config.accumulate)}
        return
    parts = config.accumulate * 2 ** math.ceil(math.log2(max(shrink, 1.01)))
    fewer = {"accumulate": str(parts)}
    yield fewer
    yield {"accumulate": str(2 * parts)}
    narrow = {"model.dtype": "bfloat16"} if config.model.dtype != "bfloat16" else {}
    if narrow:
        yield narrow
    again = {f"model.{tower}.options.remat": "full" for tower in remat}
    if again:
        yield again
    if narrow and again:
        yield narrow | again
    if split:
        yield split
        yield split | narrow | again | fewer
    for half in (parts // config.accumulate, 2 * parts // config.accumulate):
        if config.batch_size % half == 0:
            yield {"batch_size": str(config.batch_size // half)}


def largest_batch(
    fits: Callable[[int], bool], allowed: Callable[[int], bool], start: int, unit: int
) -> tuple[int, int | None]:
    """The largest batch that fits, and the smallest seen that does not; None if all seen fit.

    Doubles or halves from `start`, then bisects until the two differ by an eighth or nothing that
    is `allowed` lies between; all are multiples of `unit`.  0 where nothing fits.
    """
    low, high = 0, None
    batch = start
    while high is None and batch <= start * FURTHEST:
        if fits(batch):
            low, batch = batch, 2 * batch
        else:
            high = batch
    if high is None:
        return low, None
    while low == 0 and batch > unit:
        batch = max(unit, batch // 2 // unit * unit)
        if allowed(batch):
            low, high = (batch, high) if fits(batch) else (0, batch)
    between = [n for n in range(low + unit, high, unit) if allowed(n)] if low else []
    while between and high - low > low // 8:
        batch = between[len(between) // 2]
        if fits(batch):
            low = batch
        else:
            high = batch
        between = [n for n in between if low < n < high]
    return low, high


FURTHEST = 1024
"""Times the configured batch: where the search stops."""
