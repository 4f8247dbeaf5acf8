"""Grounding: does the heat map of a phrase point at the box that the phrase refers to?"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass as checked_dataclass

from clip_lite_jax.config.types import STRICT, NonNegativeFloat, PositiveFraction, PositiveInt
from clip_lite_jax.data.image_ops import Box, Opened, view_box
from clip_lite_jax.data.inputs import Pixels
from clip_lite_jax.data.records import Example
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.evaluators.bootstrap import with_intervals
from clip_lite_jax.evaluators.encoding import heat_maps
from clip_lite_jax.evaluators.places import (
    area,
    box_around,
    hottest,
    on_picture,
    overlap,
    points_at,
    share_near,
    strongest_points,
)
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns

RIGHT = 0.5
"""Intersection over union from which on a box counts as found."""


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class GroundingOptions:
    """What is measured, and on which references."""

    split: str = "test"
    part: str | None = None
    """``testA`` (people) or ``testB`` of RefCOCO's test split; None is all of it."""
    tolerance: NonNegativeFloat = 0.0
    """Pixels of the picture by which the pointing game may miss; 15 in arXiv 1608.00507."""
    threshold: PositiveFraction = 0.15
    """Part of a map's maximum from which on it is hot, for the box around it."""
    area_power: NonNegativeFloat = 0.5
    """Candidates are ranked by their sum of heat over their area to this power; 1 is the mean."""
    detections: str | None = None
    """JSON of candidates: image id → boxes, left, upper, width and height; None takes the boxes
    of all that is annotated in the image."""
    max_references: PositiveInt | None = None
    """Takes so many, evenly spaced; None takes all."""


@dataclass(frozen=True)
class Phrase:
    """A phrase of a reference, and what it refers to."""

    index: int
    """Of the reference in its split."""
    text: str
    box: Box
    candidates: tuple[Box, ...]
    image: str
    part: str
    size: tuple[int, int] | None
    """Width and height that boxes refer to; None for those of the picture."""

    def scaled(self, size: tuple[int, int]) -> "Phrase":
        """With the boxes in pixels of a picture of `size`.

        Raises:
          BadImage: it has another shape than the one that was annotated.
        """
        if self.size is None or self.size == size:
            return self
        across, down = size[0] / self.size[0], size[1] / self.size[1]
        if not 0.97 < across / down < 1.03:
            raise BadImage(f"the picture is {size}, the annotated one {self.size}: another shape")

        def scale(box: Box) -> Box:
            return box[0] * across, box[1] * down, box[2] * across, box[3] * down

        return replace(
            self, box=scale(self.box), candidates=tuple(map(scale, self.candidates)), size=size
        )


@dataclass(frozen=True)
class Found:
    """A phrase, its heat map, and how that fares."""

    phrase: Phrase
    picture: Opened
    heat: np.ndarray
    """float32 ``[H, W]`` of the picture."""
    points: np.ndarray
    around: Sequence[Box]
    chosen: Sequence[Box]
    values: dict[str, float]


class Grounding(TaskEvaluator):
    """Pointing game, box accuracy and the choice among candidates; ties count against the model.

    Of each there is what chance gives: a random pixel, and for comparison the centre, of the
    picture; a random candidate.
    """

    def __init__(self, data: TaskData, options: GroundingOptions) -> None:
        """Raises `DataError` where the split has no boxes, `ConfigError` without pixels."""
        if not isinstance(data.inputs.image, Pixels):
            raise ConfigError(
                "grounding needs pictures, not features that model.image.cache=True keeps: "
                "evaluate the finished model with clip-lite eval"
            )
        self.data, self.options, self.pixels = data, options, data.inputs.image
        self.source = data.split(options.split)
        detections = read_detections(Path(options.detections)) if options.detections else None
        self.phrases = list(self._phrases(detections))
        if not self.phrases:
            part = f", part {options.part!r}," if options.part else ""
            raise DataError(
                f"no reference of split {options.split!r}{part} has a box: grounding "
                "reads data.format='refcoco', or examples with an attribute 'box' "
                "(docs/evaluate.md)"
            )
        if detections is not None:
            self._check_known(detections)
        kind = "detections" if options.detections else "all annotated boxes"
        boxes = repr([(phrase.box, phrase.candidates) for phrase in self.phrases]).encode()
        digest = hashlib.blake2b(boxes, digest_size=6).hexdigest()
        self.protocol = (
            f"{len(self.phrases)} phrases of {len({p.image for p in self.phrases})} images, boxes "
            f"{digest}, each with the Grad-CAM map of the critic's score; pointing_game: the "
            f"strongest cell's centre within {options.tolerance:g} px of the box; box_accuracy: "
            f"IoU of at least {RIGHT} with the box around the largest part above "
            f"{options.threshold:g} of the maximum; candidate_accuracy: IoU of at least {RIGHT} "
            f"with the candidate of most heat / area^{options.area_power:g}, candidates: {kind}; "
            "ties count against the model; intervals over images"
        )

    def _check_known(self, detections: Mapping[str, Sequence[Box]]) -> None:
        """Raises `DataError` where no image has detections: all would be wrong, unexplained."""
        asked = {self._image_id(phrase) for phrase in self.phrases}
        if not asked & detections.keys():
            theirs, ours = (", ".join(sorted(ids)[:3]) or "none" for ids in (detections, asked))
            raise DataError(
                f"detections={self.options.detections}: no id is that of an image of split "
                f"{self.options.split!r}; ids in the file: {theirs[:200]}; of images (attribute "
                f"'image_id'): {ours[:200]}"
            )

    def _image_id(self, phrase: Phrase) -> str:
        return self.source.metadata(phrase.index).attributes.get("image_id", "")

    def outcome(self, fns: EncodeFns) -> Outcome:
        found = [(one.phrase, one.values) for one in self.found(fns, self.phrases)]
        if not found:
            raise DataError("grounding: none of the pictures can be used")
        metrics: dict[str, float] = {
            "phrases": len(found),
            "images": len({phrase.image for phrase, _ in found}),
        }
        parts = sorted({phrase.part for phrase, _ in found})
        rows = []
        for part in parts if len(parts) > 1 else ():
            some = [pair for pair in found if pair[0].part == part]
            rows.append({"part": part, "phrases": len(some), **_metrics(some)})
        return Outcome(metrics | _metrics(found), {"per_part": rows} if rows else {})

    def examples(self, fns: EncodeFns, count: int) -> list[Found]:
        """Up to `count` phrases, evenly spaced, with their maps: for `apps.grounding_page`."""
        spaced = np.linspace(0, len(self.phrases) - 1, min(count, len(self.phrases)))
        return list(self.found(fns, [self.phrases[int(place)] for place in spaced.round()]))

    def found(self, fns: EncodeFns, phrases: Sequence[Phrase]) -> Iterator[Found]:
        """The maps of phrases, a batch of pictures in memory at a time; bad ones are listed."""
        size = self.data.batch_size
        for start in range(0, len(phrases), size):
            opened: dict[int, tuple[Opened, np.ndarray]] = {}
            usable = []
            for phrase in phrases[start : start + size]:
                try:
                    if phrase.index not in opened:
                        picture = self.pixels.open(self.source, phrase.index)
                        opened[phrase.index] = picture, self.pixels.view(picture)
                    usable.append(phrase.scaled(opened[phrase.index][0].size))
                except BadImage as error:
                    self.data.bad.add(self.source.metadata(phrase.index).id, str(error))
            if not usable:
                continue
            views = np.stack([opened[phrase.index][1] for phrase in usable])
            texts = [phrase.text for phrase in usable]
            maps = heat_maps(fns, self.data.inputs.text, views, texts, size)
            for phrase, heat in zip(usable, maps, strict=True):
                yield self._measured(phrase, opened[phrase.index][0], heat)

    def _measured(self, phrase: Phrase, picture: Opened, small: np.ndarray) -> Found:
        options, config = self.options, self.pixels.config
        view = view_box(picture.size, config.image_size, config.resize)
        heat = on_picture(small, picture.size, view)
        points = strongest_points(small, view)
        around = box_around(heat, options.threshold)
        chosen = hottest(heat, phrase.candidates, options.area_power)
        width, height = picture.size
        centre = np.array([[width / 2, height / 2]])
        values = {
            "pointing_game": float(points_at(points, phrase.box, options.tolerance)),
            "pointing_game_centre": float(points_at(centre, phrase.box, options.tolerance)),
            "pointing_game_chance": share_near(phrase.box, picture.size, options.tolerance),
            "box_accuracy": float(_worst(around, phrase.box) >= RIGHT),
            "box_iou": _worst(around, phrase.box),
            "seen": area(_common(phrase.box, view)) / area(phrase.box),
        }
        if phrase.candidates or options.detections:  # no detection is a miss
            right = [overlap(box, phrase.box) >= RIGHT for box in phrase.candidates] or [False]
            values["candidate_accuracy"] = float(_worst(chosen, phrase.box) >= RIGHT)
            values["candidate_chance"] = float(np.mean(right))
        return Found(phrase, picture, heat, points, around, chosen, values)

    def _phrases(self, detections: dict[str, tuple[Box, ...]] | None) -> Iterator[Phrase]:
        chosen = [
            index
            for index in range(len(self.source))
            if self.options.part in (None, self.source.metadata(index).attributes.get("part"))
        ]
        if self.options.max_references is not None and len(chosen) > self.options.max_references:
            spaced = np.linspace(0, len(chosen) - 1, self.options.max_references).round()
            chosen = [chosen[int(place)] for place in spaced]
        for index in chosen:
            example = self.source.metadata(index)
            if "box" not in example.attributes:
                continue
            try:
                phrase = _phrase(index, example, detections)
            except (ValueError, RecursionError) as error:
                self.data.bad.add(example.id, str(error))
                continue
            yield from (replace(phrase, text=text) for text in example.captions)


def build_grounding(data: TaskData, options: GroundingOptions) -> Grounding:
    return Grounding(data, options)


def read_detections(path: Path) -> dict[str, tuple[Box, ...]]:
    """Boxes by the id of their image.

    Raises:
      DataError: no JSON object of lists of boxes.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"detections={path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise DataError(f"{path} is no object of image id → list of boxes [x, y, width, height]")
    found = {}
    for id, boxes in content.items():
        try:
            corners = [_numbers(box, at_least=4) for box in boxes]
            if any(min(width, height) <= 0 for *_, width, height in corners):
                raise ValueError("a box without width or height")
        except ValueError as error:
            raise DataError(f"{path}, image {id[:40]}: {error}") from error
        found[id] = tuple((x, y, x + width, y + height) for x, y, width, height in corners)
    return found


def _phrase(index: int, example: Example, detections: dict[str, tuple[Box, ...]] | None) -> Phrase:
    """Of an example's attributes, without a text; raises `ValueError` where they are none."""
    known = example.attributes
    candidates = json.loads(known.get("candidates", "[]"))
    if not isinstance(candidates, list):
        raise ValueError("attribute 'candidates' is no list of boxes")
    boxes = tuple(_box(box) for box in candidates)
    if detections is not None:
        boxes = detections.get(known.get("image_id", ""), ())
    size = tuple(map(int, _numbers(json.loads(known["size"]), 2))) if "size" in known else None
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError("attribute 'size' is no width and height")
    box = _box(json.loads(known["box"]))
    return Phrase(index, "", box, boxes, example.group, known.get("part", ""), size)


def _box(value: Any) -> Box:
    left, upper, right, lower = _numbers(value, 4)
    if not (right > left and lower > upper):
        raise ValueError("a box is left, upper, right and lower edge, the last two larger")
    return left, upper, right, lower


def _numbers(value: Any, at_least: int) -> list[float]:
    """Raises `ValueError` unless it is a list of so many finite numbers."""
    good = isinstance(value, list) and len(value) >= at_least
    if not good or not all(
        isinstance(number, (int, float)) and abs(number) < 1e6 and math.isfinite(number)
        for number in value[:at_least]
    ):
        raise ValueError(f"no list of {at_least} numbers")
    return [float(number) for number in value[:at_least]]


def _worst(boxes: Sequence[Box], right: Box) -> float:
    """The smallest overlap of boxes that tie; 0 of none."""
    return min((overlap(box, right) for box in boxes), default=0.0)


def _common(one: Box, other: Box) -> Box:
    return (
        max(one[0], other[0]),
        max(one[1], other[1]),
        min(one[2], other[2]),
        min(one[3], other[3]),
    )


def _metrics(found: Sequence[tuple[Phrase, dict[str, float]]]) -> dict[str, float]:
    """Means over phrases, with intervals over images; of candidates where there are any."""
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for _, values in found for name in values):
        some = [(phrase, values[name]) for phrase, values in found if name in values]
        clusters = np.array([phrase.image for phrase, _ in some])
        metrics |= with_intervals({name: np.array([value for _, value in some])}, clusters)
    return metrics
