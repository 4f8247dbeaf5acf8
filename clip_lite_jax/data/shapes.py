"""Drawn scenes whose captions name some of what is drawn: their mutual information is known.

The factors of a scene (`FACTORS`) are drawn independently.  A caption names each factor with a
given probability: its value or, with another given probability, one of the other values, evenly.
Which synonym stands for a value and how the sentence begins have nothing to do with the image.

The scene can be read off the image (`build_splits` compares all of them) and what is named off the
words, no two values sharing a phrase.  With F the scene, N what is named and C as what, therefore

    I(image; caption) = I(F; N, C) = I(F; C | N) = sum_k P(k named) I(F_k; C_k).
"""

import functools
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clip_lite_jax.config import ShapesConfig
from clip_lite_jax.data.records import Example
from clip_lite_jax.errors import DataError

SPLITS = ("train", "validation", "test")

Scene = tuple[int, ...]
"""The value of every factor, as its place in `Factor.phrases`."""
UNNAMED = -1


@dataclass(frozen=True)
class Factor:
    """What varies about a scene: the phrases that name each value, and its probability."""

    name: str
    phrases: tuple[tuple[str, ...], ...]
    probabilities: tuple[float, ...]
    unnamed: str = ""
    """What stands in a caption that does not name it."""


# No word that follows "a" begins with a vowel, and no phrase holds a comma, which would make the
# caption a list of tags.
FACTORS = (
    Factor("size", (("small", "little"), ("big", "large")), (0.4, 0.6)),
    Factor(
        "colour",
        (
            ("red", "crimson"),
            ("green", "jade"),
            ("blue", "navy"),
            ("pink", "rose"),
            ("brown", "hazel"),
            ("purple", "violet"),
            ("teal", "cyan"),
            ("yellow", "golden"),
        ),
        (0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1),
    ),
    Factor(
        "shape",
        (
            ("circle", "disc"),
            ("square", "box"),
            ("triangle", "wedge"),
            ("bar", "stripe"),
            ("cross", "plus"),
            ("ring", "hoop"),
        ),
        (0.25, 0.2, 0.15, 0.15, 0.15, 0.1),
        unnamed="thing",
    ),
    Factor(
        "position",
        (
            ("at the top left", "at the upper left"),
            ("at the top right", "at the upper right"),
            ("at the bottom left", "at the lower left"),
            ("at the bottom right", "at the lower right"),
            ("in the middle", "in the centre"),
        ),
        (0.2, 0.2, 0.2, 0.2, 0.2),
    ),
    Factor(
        "background",
        (
            ("on white", "on snow"),
            ("on grey", "on concrete"),
            ("on cream", "on paper"),
            ("in the sky", "against the sky"),
        ),
        (0.4, 0.3, 0.2, 0.1),
    ),
)
OPENINGS = ("a", "there is a", "this is a")

# In the order of the factors' values; lengths in 64ths of the image's width.
RADII = (9, 15)
COLOURS = (
    (220, 30, 40),
    (30, 150, 60),
    (40, 70, 210),
    (240, 100, 160),
    (120, 70, 30),
    (130, 50, 160),
    (0, 150, 160),
    (220, 170, 0),
)
SHAPES = ("circle", "square", "triangle", "bar", "cross", "ring")
CENTRES = ((16, 16), (48, 16), (16, 48), (48, 48), (32, 32))
BACKGROUNDS = ((255, 255, 255), (225, 225, 225), (255, 240, 200), (210, 230, 255))


def draw(scene: Scene, size: int) -> np.ndarray:
    """The image of a scene, uint8 ``[size, size, 3]``; integer arithmetic, equal everywhere."""
    radius, colour, shape, centre, background = scene
    place = 64 * (2 * np.arange(size) + 1)  # of the pixels' centres, in 128ths of a pixel
    column, row = (2 * size * along for along in CENTRES[centre])
    x, y = place - column, (place - row)[:, None]
    inside = _inside(SHAPES[shape], x, y, 2 * size * RADII[radius])  # [size, size]
    inks = np.array([BACKGROUNDS[background], COLOURS[colour]], np.uint8)
    return inks[inside.astype(int)]


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: int) -> np.ndarray:
    """Which pixels, at (x, y) from its centre, belong to a shape; y points down."""
    near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    square_distance = x**2 + y**2
    masks = {
        "circle": square_distance <= radius**2,
        "square": 5 * far <= 4 * radius,
        "triangle": (2 * abs(x) <= y + radius) & (y <= radius),
        "bar": (abs(x) <= radius) & (3 * abs(y) <= radius),
        "cross": (far <= radius) & (4 * near <= radius),
        "ring": (square_distance <= radius**2) & (4 * square_distance >= radius**2),
    }
    return masks[shape]


@functools.cache
def _png(scene: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(scene, size)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def all_scenes() -> list[Scene]:
    return list(itertools.product(*(range(len(factor.phrases)) for factor in FACTORS)))


def channel(values: int, error: float) -> np.ndarray:
    """P(named as j | value i) ``[values, values]``: i itself, or evenly any other value."""
    same = np.eye(values)
    return (1 - error) * same + error / (values - 1) * (1 - same)


def log_ratios(factor: Factor, error: float) -> np.ndarray:
    """log P(named as j | value i) / P(named as j), ``[values, values]``; -inf for what is never."""
    conditional = channel(len(factor.phrases), error)
    with np.errstate(divide="ignore"):
        return np.log(conditional) - np.log(np.array(factor.probabilities) @ conditional)


def factor_information(factor: Factor, error: float) -> float:
    """I(value; named as) of a factor that is named, in nats, by summation over all pairs."""
    joint = np.array(factor.probabilities)[:, None] * channel(len(factor.phrases), error)
    possible = joint > 0
    return float(np.sum(joint[possible] * log_ratios(factor, error)[possible]))


@dataclass(frozen=True)
class Drawn:
    """One draw from the joint distribution."""

    scene: Scene
    named: Scene
    """What the caption names each factor as, right or wrong; `UNNAMED` where it does not."""
    caption: str


class Shapes:
    """One split: independent pairs, of which number i is a function of (seed, split, i)."""

    def __init__(self, config: ShapesConfig, split: str, image_size: int) -> None:
        self.config, self.split, self.image_size = config, split, image_size
        self.count = config.examples if split == "train" else config.held_out

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        drawn = self.drawn(index)
        return self._example(index, drawn, _png(drawn.scene, self.image_size))

    def metadata(self, index: int) -> Example:
        return self._example(index, self.drawn(index), b"")

    def _example(self, index: int, drawn: Drawn, image: bytes) -> Example:
        attributes = {"split": self.split}
        for factor, value in zip(FACTORS, drawn.scene, strict=True):
            attributes[factor.name] = factor.phrases[value][0]
        id = f"{self.split}/{index}"
        return Example(id, id, (drawn.caption,), image, attributes)

    @property
    def true_information(self) -> float:
        """I(image; caption) in nats."""
        return sum(
            self.config.named.get(factor.name, 0.0) * factor_information(factor, self.config.error)
            for factor in FACTORS
        )

    def log_ratio(self, images: Sequence[int], captions: Sequence[int]) -> np.ndarray:
        """log dP/dQ, the best critic, of the images of some examples with the captions of others.

        N and M of their numbers → ``[N, M]`` in nats.
        """
        scenes = np.array([self.drawn(index).scene for index in images])  # [N, factors]
        named = np.array([self.drawn(index).named for index in captions])  # [M, factors]
        total = np.zeros((len(scenes), len(named)))
        for k, factor in enumerate(FACTORS):
            table = np.pad(log_ratios(factor, self.config.error), ((0, 0), (0, 1)))  # 0: UNNAMED
            total += table[scenes[:, k, None], named[:, k]]
        return total

    def drawn(self, index: int) -> Drawn:
        """Example `index` as what it consists of."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.split} has {self.count} examples, none at {index}")
        rng = np.random.default_rng([self.config.seed, SPLITS.index(self.split), index])
        scene, named, phrases = [], [], [OPENINGS[int(rng.random() * len(OPENINGS))]]
        for factor, uniform in zip(FACTORS, rng.random((len(FACTORS), 5)), strict=True):
            value = int(np.searchsorted(np.cumsum(factor.probabilities)[:-1], uniform[0], "right"))
            is_named = uniform[1] < self.config.named.get(factor.name, 0.0)
            word = self._named_as(factor, value, uniform[2:4]) if is_named else UNNAMED
            scene.append(value)
            named.append(word)
            phrases.append(_phrase(factor, word, uniform[4]))
        return Drawn(tuple(scene), tuple(named), " ".join(filter(None, phrases)))

    def _named_as(self, factor: Factor, value: int, uniform: np.ndarray) -> int:
        """The value, or by mistake one of the others; two uniform numbers decide."""
        if uniform[0] >= self.config.error:
            return value
        values = len(factor.phrases)
        return (value + 1 + int(uniform[1] * (values - 1))) % values


def _phrase(factor: Factor, word: int, uniform: float) -> str:
    """One of the phrases for what a factor is named as; one uniform number decides."""
    if word == UNNAMED:
        return factor.unnamed
    synonyms = factor.phrases[word]
    return synonyms[int(uniform * len(synonyms))]


def build_splits(config: ShapesConfig, image_size: int) -> dict[str, Shapes]:
    """Training, validation and test pairs with images of `image_size` pixels.

    Raises:
      DataError: a factor that there is not, or images too small to tell all scenes apart.
    """
    known = [factor.name for factor in FACTORS]
    if unknown := sorted(config.named.keys() - set(known)):
        raise DataError(f"data.shapes.named.{unknown[0]}: the factors are {', '.join(known)}")
    scenes = all_scenes()
    different = len({draw(scene, image_size).tobytes() for scene in scenes})
    if different < len(scenes):
        raise DataError(
            f"data.image_size={image_size} is too small for data.source='shapes': its "
            f"{len(scenes):,} scenes make {different:,} different images; use 22 or more"
        )
    return {split: Shapes(config, split, image_size) for split in SPLITS}
