"""One batch, as the input pipeline makes it and a step takes it."""

from typing import Any

import flax.struct

from clip_lite_jax.models import Inputs


@flax.struct.dataclass
class Batch:
    """One global batch, or this process's rows of it; ``[parts, B / parts]`` with accumulation."""

    image: Any  # [B, H, W, 3] uint8
    tokens: Any  # [B, L] int32
    mask: Any  # [B, L] bool
    group: Any  # [B, 2] int32: what is shown, and the caption; equal in either is no negative
    valid: Any  # [B] bool; False marks the slot of an unusable example
    index: Any  # [B] int32, position in the source
    second: Inputs | None = None  # another view and another caption of each example
    changes: Any = None  # [B, views, S, 2] float32: `color_jitter` of the images, still to be done

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.image, self.tokens, self.mask, self.valid)
