"""Where a heat map points: in pixels of the picture, against boxes.

Boxes are left, upper, right and lower edge in pixels; the pixel in column c reaches from c to
c + 1.  A heat map ``[h, w]`` has a cell for each part of the view that the model saw of a picture.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from clip_lite_jax.data.image_ops import Box


def on_picture(heat: np.ndarray, size: tuple[int, int], view: Box) -> np.ndarray:
    """A map ``[h, w]`` of `view`, bilinear, on a picture of `size` (width, height).

    float32 ``[height, width]``; 0 in pixels whose centre the view does not show.
    """
    width, height = size
    rows = _interpolation(height, view[1], view[3], heat.shape[0])
    columns = _interpolation(width, view[0], view[2], heat.shape[1])
    return (rows @ heat.astype(np.float64) @ columns.T).astype(np.float32)


def _interpolation(pixels: int, start: float, end: float, cells: int) -> np.ndarray:
    """``[pixels, cells]``: what each cell gives to each pixel of one axis."""
    centres = np.arange(pixels) + 0.5
    place = np.clip((centres - start) / (end - start) * cells - 0.5, 0, cells - 1)
    low = np.minimum(place.astype(int), max(cells - 2, 0))
    high = np.minimum(low + 1, cells - 1)
    weights = np.zeros((pixels, cells))
    index = np.arange(pixels)
    weights[index, low] += 1 - (place - low)
    weights[index, high] += place - low
    weights[(centres < start) | (centres > end)] = 0
    return weights


def strongest_points(heat: np.ndarray, view: Box) -> np.ndarray:
    """Centres ``[P, 2]`` (x, y) in the picture of the strongest cells; none of an empty map."""
    if not heat.size or not heat.max() > 0:
        return np.zeros((0, 2))
    row, column = np.nonzero(heat == heat.max())
    x = view[0] + (column + 0.5) / heat.shape[1] * (view[2] - view[0])
    y = view[1] + (row + 0.5) / heat.shape[0] * (view[3] - view[1])
    return np.stack([x, y], axis=1)


def points_at(points: np.ndarray, box: Box, tolerance: float = 0.0) -> bool:
    """The pointing game: are all points ``[P, 2]`` within `tolerance` pixels of the box?

    Several are a tie, which counts against the model; so does no point.  The edge belongs to the
    box.  Source: Zhang et al. (arXiv 1608.00507), section 4.2, where the tolerance is 15.
    """
    left, upper, right, lower = box
    across = np.maximum(0, np.maximum(left - points[:, 0], points[:, 0] - right))
    down = np.maximum(0, np.maximum(upper - points[:, 1], points[:, 1] - lower))
    return bool(len(points)) and bool(np.all(np.hypot(across, down) <= tolerance))


def share_near(box: Box, size: tuple[int, int], tolerance: float = 0.0) -> float:
    """The share of a picture of `size` (width, height) that is within `tolerance` pixels of a box:
    what `points_at` gives to a random point of it.

    Around the box it is summed up over lines, eight for each pixel.
    """
    left, upper, right, lower = box
    width, height = size
    inside = max(0.0, min(right, width) - max(left, 0.0))
    found = inside * max(0.0, min(lower, height) - max(upper, 0.0))
    if tolerance:
        y = (np.arange(8 * height) + 0.5) / 8
        down = np.maximum(0, np.maximum(upper - y, y - lower))
        reach = np.sqrt(np.maximum(0, tolerance**2 - down**2))
        wide = np.minimum(right + reach, width) - np.maximum(left - reach, 0)
        found = float(np.sum(np.maximum(0, wide)[down <= tolerance])) / 8
    return found / (width * height)


def box_around(heat: np.ndarray, threshold: float) -> list[Box]:
    """The box around the largest connected part of what is hot in a map ``[H, W]``.

    Hot is at least `threshold` times the maximum; pixels connect by their sides.  Several boxes
    where several parts are the largest, none of an empty map.
    Source: Grad-CAM (arXiv 1610.02391), section 4.1, where the threshold is .15.
    """
    if not heat.size or not heat.max() > 0:
        return []
    labels, count = ndimage.label(heat >= threshold * heat.max())
    if count == 0:
        return []
    sizes = np.bincount(labels.ravel())[1:]
    parts = ndimage.find_objects(labels)
    return [
        (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
        for (rows, columns), size in zip(parts, sizes, strict=True)
        if size == sizes.max()
    ]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union; 0 of boxes without an area."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, across) * max(0.0, down)
    union = area(one) + area(other) - common
    return common / union if union > 0 else 0.0


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def hottest(heat: np.ndarray, boxes: Sequence[Box], power: float) -> list[Box]:
    """The boxes with the most heat: its sum over their pixels, over their area to a power.

    1 is the mean heat, 0.5 what ALBEF (arXiv 2107.07651) ranks by, whose code this follows: pixels
    are cut, not rounded.  Several boxes are a tie; none where no box has any heat.
    """
    sums = np.pad(heat.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    scores = np.array([_sum_in(sums, box) / max(area(box), 1e-9) ** power for box in boxes])
    if not len(boxes) or not scores.max() > 0:
        return []
    # Sums of differences are not exact: equal boxes elsewhere in a plateau still tie.
    close = scores >= scores.max() * (1 - 1e-9)
    return [box for box, best in zip(boxes, close, strict=True) if best]


def _sum_in(sums: np.ndarray, box: Box) -> float:
    """Of a table of sums ``[H + 1, W + 1]``: the part in a box."""
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    left, right = (int(np.clip(int(edge), 0, width)) for edge in (box[0], box[2]))
    upper, lower = (int(np.clip(int(edge), 0, height)) for edge in (box[1], box[3]))
    return float(sums[lower, right] - sums[upper, right] - sums[lower, left] + sums[upper, left])
