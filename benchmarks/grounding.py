"""Do heat maps point at the right thing?  Pictures of several emoji, of which one is asked for.

    python -m benchmarks.grounding runs/warm_start --page maps.html

The emoji are of concepts that the model never saw, and it never saw two in one picture.  Each
picture is a white square with two of them side by side, or four in a grid; the box of each is its
half or quarter of the square less a pixel on each side (what points between them is a miss), so
that chance is just under 1 in 2 or 4.  ``alone``, for comparison, is how often the right one has
the highest score when the model sees each emoji by itself, at the size it has in the picture.
"""

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clip_lite_jax.apps.grounding_page import page
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import decode
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source, build_sources
from clip_lite_jax.evaluators.bootstrap import with_intervals
from clip_lite_jax.evaluators.grounding import Grounding, GroundingOptions
from clip_lite_jax.evaluators.tasks import TaskData
from clip_lite_jax.inference import DualEncoderModel, load

SIDE = 256
"""Of a picture, in pixels; an emoji has half of it."""


@dataclass(frozen=True)
class Composites:
    """References in memory, as a `Source`, and the tiles of each picture."""

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def metadata(self, index: int) -> Example:
        return self.examples[index]


def boxes(count: int) -> list[tuple[int, int, int, int]]:
    """The halves or quarters of a picture."""
    half = SIDE // 2
    if count == 2:
        return [(0, 0, half, SIDE), (half, 0, SIDE, SIDE)]
    return [(x, y, x + half, y + half) for y in (0, half) for x in (0, half)]


def inset(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Without the edge, which a cell in the middle of the picture points at."""
    return box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1


def tile(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """One emoji in the middle of a half or quarter."""
    size = (box[2] - box[0], box[3] - box[1])
    canvas = Image.new("RGB", size, "white")
    small = picture.resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC)
    canvas.paste(small, (0, (size[1] - SIDE // 2) // 2))
    return canvas


def composites(source: Source, count: int, pictures: int, seed: int = 0) -> Composites:
    """`pictures` of `count` emoji of different concepts; a reference to each by its name."""
    rng = np.random.default_rng(seed)
    by_concept: dict[str, list[int]] = {}
    for index in range(len(source)):
        by_concept.setdefault(source.metadata(index).group, []).append(index)
    concepts = sorted(by_concept)
    examples = []
    for number in range(pictures):
        chosen = [
            source[int(rng.choice(by_concept[concept]))]
            for concept in rng.choice(concepts, count, replace=False)
        ]
        canvas = Image.new("RGB", (SIDE, SIDE), "white")
        for example, box in zip(chosen, boxes(count), strict=True):
            canvas.paste(tile(decode(example.image), box), box[:2])
        buffer = io.BytesIO()
        canvas.save(buffer, "PNG")
        for place, (example, box) in enumerate(zip(chosen, boxes(count), strict=True)):
            candidates = [inset(one) for one in boxes(count)]
            attributes = {"box": json.dumps(inset(box)), "candidates": json.dumps(candidates)}
            examples.append(
                Example(
                    f"{number}#{place}",
                    str(number),
                    example.captions[:1],
                    buffer.getvalue(),
                    attributes,
                )
            )
    return Composites(examples)


def alone(model: DualEncoderModel, source: Composites) -> dict[str, float]:
    """How often the emoji asked for has the highest score when each is seen by itself."""
    right, pictures = [], []
    for start, example in enumerate(source.examples):
        count = len(json.loads(example.attributes["candidates"]))
        if start % count:
            continue
        picture = decode(example.image)
        parts = []
        for box in boxes(count):
            canvas = Image.new("RGB", (SIDE, SIDE), "white")
            canvas.paste(picture.crop(box), ((SIDE - box[2] + box[0]) // 2, 0))
            parts.append(canvas)
        names = [source.examples[start + place].captions[0] for place in range(count)]
        scores = np.asarray(model.fns.matrix(model.project_image(parts), model.project_text(names)))
        right += list(scores.argmax(axis=0) == np.arange(count))
        pictures += [example.group] * count
    return with_intervals({"alone": np.array(right, float)}, np.array(pictures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="an exported folder, or a run's workdir")
    parser.add_argument("--pictures", type=int, default=150, help="of each kind")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--page", type=Path, help="where examples go, as HTML")
    arguments = parser.parse_args()
    model = load(arguments.model, batch_size=32)
    emoji = build_sources(DataConfig(), BadExamples())["test"]
    results = {}
    for count, name in ((2, "two"), (4, "four")):
        source = composites(emoji, count, arguments.pictures)
        inputs = TowerInputs(model.pixels, model.tokenizer)
        data = TaskData({"test": source}, inputs, model.batch_size, BadExamples())
        task = Grounding(data, GroundingOptions(split="test"))
        outcome = task.outcome(model.fns)
        results[name] = outcome.metrics | alone(model, source)
        print(json.dumps({name: results[name]}, indent=1))
        if arguments.page and count == 2:
            html = page(task, model.fns, outcome, "Two emoji side by side")
            arguments.page.write_text(html)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
