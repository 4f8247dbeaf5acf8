"""Colour jitter where the step runs: the input pipeline draws the changes, the step applies them.

In Pillow the hue alone takes longer than decoding the photograph.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from clip_lite_jax.config import AugmentConfig

BRIGHTNESS, CONTRAST, SATURATION = range(3)
UNCHANGED = np.array([[BRIGHTNESS, 1], [CONTRAST, 1], [SATURATION, 1], [0, 0]], np.float32)
"""As of `draw_changes`, for an image that stays as it is."""


def draw_changes(config: AugmentConfig, rng: np.random.Generator) -> np.ndarray | None:
    """What `color_jitter` does to one image: float32 ``[S, 2]``, or None if nothing ever changes.

    The first three rows are (which of brightness, contrast and saturation, by what factor) in a
    random order.  Where there is a hue to turn, a fourth is (how many of them come before it, its
    turn as a share of the circle).
    """
    strengths = (config.brightness, config.contrast, config.saturation)
    # Drawn even where it decides nothing: what is drawn after it is then the same in all runs.
    jitters = rng.random() < config.jitter
    if not config.jitter or not any((*strengths, config.hue)):
        return None
    changes = UNCHANGED.copy()
    if jitters:
        done = 0
        for kind in rng.permutation(len(strengths) + (config.hue > 0)).tolist():
            if kind == len(strengths):
                changes[3] = done, rng.uniform(-config.hue, config.hue)
            else:
                changes[done] = kind, rng.uniform(1 - strengths[kind], 1 + strengths[kind])
                done += 1
    return changes if config.hue else changes[:3]


def color_jitter(images: Any, changes: Any) -> Array:
    """Images ``[..., H, W, 3]`` uint8, changed as ``[..., S, 2]`` of `draw_changes` say.

    Brightness, contrast and saturation are those of Pillow's ``ImageEnhance``, which torchvision
    takes, too; the hue turns without Pillow's rounding to 256 of them.
    """
    changes = jnp.asarray(changes)[..., None, None, :, :]  # beside H and W
    kinds, factors = changes[..., :3, 0], changes[..., :3, 1]
    planes = (images[..., 0], images[..., 1], images[..., 2])

    def blend(planes: Planes, factors: Array) -> Planes:
        # A loop keeps XLA from computing all earlier steps again for the mean that a change of
        # contrast needs.
        def step(number: Any, planes: Planes) -> Planes:
            kind, factor = (
                lax.dynamic_index_in_dim(x, number, -1, keepdims=False) for x in (kinds, factors)
            )
            return _blend(planes, kind, factor)

        return lax.fori_loop(0, 3, step, planes)

    if changes.shape[-2] == 3:
        return jnp.stack(blend(planes, factors), axis=-1)
    # The hue turns once, wherever it stands among the others; a factor of 1 changes nothing.
    first = jnp.arange(3) < changes[..., 3, :1]
    planes = blend(planes, jnp.where(first, factors, 1))
    planes = turn_hue(planes, changes[..., 3, 1])
    return jnp.stack(blend(planes, jnp.where(first, 1, factors)), axis=-1)


Planes = tuple[Array, Array, Array]
"""Red, green and blue, ``[..., H, W]`` uint8 each: CPUs compute with them two to three times
as fast as with the channels of each pixel side by side."""


def _blend(planes: Planes, kind: Array, factor: Array) -> Planes:
    """Away from black, from the mean grey or from its own grey, by a factor; rounded as Pillow."""
    red, green, blue = (plane.astype(jnp.int32) for plane in planes)
    # Luma of ITU-R BT.601 in whole numbers.
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    count = grey.shape[-2] * grey.shape[-1]
    mean = (2 * jnp.sum(grey, axis=(-2, -1), keepdims=True) + count) // (2 * count)
    origin = jnp.where(kind == BRIGHTNESS, 0, jnp.where(kind == CONTRAST, mean, grey))
    origin = origin.astype(jnp.float32)

    def changed(plane: Array) -> Array:
        blend = origin + factor * (plane.astype(jnp.float32) - origin)
        return jnp.clip(blend, 0, 255).astype(jnp.uint8)

    red, green, blue = planes
    return changed(red), changed(green), changed(blue)


def turn_hue(planes: Planes, turn: Any) -> Planes:
    """All hues moved by `turn` of the colour circle: 1/3 makes red green, and green blue.

    Brightness (the largest channel) and saturation stay: HSV.
    """
    red, green, blue = (plane.astype(jnp.float32) for plane in planes)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    inverse = 1 / jnp.maximum(chroma, 1)
    sector = jnp.where(
        value == red,
        (green - blue) * inverse,
        jnp.where(value == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    sector = sector + 6 * turn

    def channel(shift: float) -> Array:
        place = sector + shift
        place = place - 6 * jnp.floor(place / 6)
        level = value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
        return (level + 0.5).astype(jnp.uint8)

    return channel(5), channel(3), channel(1)  # two sectors apart
