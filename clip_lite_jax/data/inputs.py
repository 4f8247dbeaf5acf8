"""What the towers read of an example: pixels and tokens, unless features stand in for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clip_lite_jax.color_jitter import draw_changes
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import image_ops
from clip_lite_jax.data.sources import Source


class ImageInput(Protocol):
    """Examples → what the image tower reads."""

    @property
    def blank(self) -> np.ndarray:
        """Stands for an image that cannot be used."""
        ...

    def open(self, source: Source, index: int) -> Any:
        """What views of an example are made of; raises `BadImage`, and so may the views."""
        ...

    def view(self, opened: Any) -> np.ndarray:
        """The view of evaluation."""
        ...

    def random_view(self, opened: Any, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        """A view for training, and whether it is mirrored."""
        ...

    def changes(self, rng: np.random.Generator) -> np.ndarray | None:
        """What `color_jitter` shall do to a view for training; None where it never does."""
        ...


TextInput = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""``N`` captions → int32 ids ``[N, L]`` and their mask, or features ``[N, F]`` and ``[N, 1]``."""


@dataclass(frozen=True)
class TowerInputs:
    image: ImageInput
    text: TextInput


@dataclass(frozen=True)
class Pixels:
    """Decoded pictures, uint8 ``[size, size, 3]``."""

    config: DataConfig

    @property
    def blank(self) -> np.ndarray:
        return np.zeros((self.config.image_size, self.config.image_size, 3), np.uint8)

    def open(self, source: Source, index: int) -> image_ops.Opened:
        return image_ops.Opened(source[index].image)

    def view(self, opened: image_ops.Opened) -> np.ndarray:
        # Whole pictures, however large: the numbers of an evaluation depend on no shortcut.
        return image_ops.resize_and_crop(
            opened.decoded(), self.config.image_size, self.config.resize
        )

    def random_view(
        self, opened: image_ops.Opened, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        return image_ops.augment(opened, self.config.image_size, self.config.augment, rng)

    def changes(self, rng: np.random.Generator) -> np.ndarray | None:
        return draw_changes(self.config.augment, rng)
