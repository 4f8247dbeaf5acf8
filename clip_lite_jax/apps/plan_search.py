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


def changes(config: Config, shrink: float, remat: tuple[str, ...]) -> Iterator[Change]:
    """Changes that save memory, the cheapest first.

    Args:
      shrink: by how much temporaries must shrink, a factor above 1.
      remat: towers, ``image`` or ``text``, that can compute activations again.
    """
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
    for half in (parts // config.accumulate, 2 * parts // config.accumulate):
        if config.batch_size % half == 0:
            yield {"batch_size": str(config.batch_size // half)}


def largest_batch(fits: Callable[[int], bool], start: int, unit: int) -> tuple[int, int | None]:
    """The largest batch that fits, and the smallest seen that does not (None: all seen fit).

    Doubles or halves from `start`, then bisects to an eighth of the result; all are multiples of
    `unit`.  0 where not even `unit` fits.
    """
    low, high = 0, None
    batch = max(unit, start // unit * unit)
    while high is None and batch <= start * LARGEST:
        if fits(batch):
            low, batch = batch, 2 * batch
        else:
            high = batch
    while low == 0 and high is not None and high > unit:
        batch = max(unit, high // 2 // unit * unit)
        if fits(batch):
            low = batch
        else:
            high = batch
    while low and high is not None and high - low > max(unit, low // 8):
        batch = (low + high) // 2 // unit * unit
        if fits(batch):
            low = batch
        else:
            high = batch
    return low, high


LARGEST = 1024
"""Times the configured batch: where the search stops."""


def batch_unit(config: Config, devices: int) -> int:
    """Batches are multiples of this: rows for every device and part, whole blocks and lanes."""
    negatives = config.negatives
    lanes = negatives.lanes or 1
    return math.lcm(devices * config.accumulate, negatives.block or lanes**2 * config.accumulate)
