"""What `train_step` trains, for our worker and for open_clip's."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

EMBEDDING = 512
"""Width of the embeddings, and of the hidden layer of our critic."""
BATCHES = 4
"""Different batches that lie on the device and are trained on in turn."""


@dataclass(frozen=True)
class Case:
    """Two towers and a batch."""

    image: str  # "resnet18", "resnet50" or "vit": CLIP's, with patches of 16 pixels
    size: int  # of the images, in pixels
    batch: int
    text_layers: int
    text_width: int
    text_heads: int
    tokens: int
    vocabulary: int
    dtype: str
    image_width: int = 0  # of a "vit", whose heads are 64 wide
    image_layers: int = 12  # of it
    steps: int = 1  # that are timed in one piece
    together: bool = True  # both projects have room in memory, and can take turns
    traced: bool = False

    @property
    def label(self) -> str:
        image = f"ViT-{self.image_width}/16" if self.image == "vit" else self.image
        return (
            f"{image}, {self.size} pixels; text {self.text_layers} × {self.text_width}, "
            f"{self.tokens} tokens; {self.dtype}; batch {self.batch}"
        )

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self)


def on_cpu(image: str, batch: int, image_width: int = 0) -> Case:
    return Case(image, 96, batch, 4, 192, 3, 32, 8192, "float32", image_width)


def on_gpu(batch: int, together: bool = True) -> Case:
    """CLIP's text transformer beside a ResNet-50, as its first model had it."""
    return Case(
        *("resnet50", 224, batch, 12, 512, 8, 77, 49408, "bfloat16"),
        steps=10,
        together=together,
        traced=True,
    )


CPU = (on_cpu("vit", 64, 192), on_cpu("resnet18", 32))
QUICK = (
    Case("vit", 32, 4, 1, 64, 1, 8, 100, "float32", 64, image_layers=1),
    Case("resnet18", 32, 4, 1, 64, 1, 8, 100, "bfloat16"),
)


class Failed:
    """In place of a step that does not fit or does not compile: no value, and the reason."""

    def __init__(self, error: Exception) -> None:
        self.reason = str(error)[:500]

    def __call__(self) -> float:
        return float("nan")


def captions(case: Case, seed: int) -> np.ndarray:
    """Tokens ``[B, L]``: a start, some, an end, which has the highest number, and padding with 0.

    A third of the places are tokens, as in captions of photographs that stand in 77 places.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, case.vocabulary - 2, (case.batch, case.tokens))
    last = rng.integers(2, max(3, 2 * case.tokens // 3), (case.batch, 1))
    place = np.arange(case.tokens)
    tokens = np.where(place < last, tokens, np.where(place == last, case.vocabulary - 1, 0))
    tokens[:, 0] = case.vocabulary - 2
    return tokens.astype(np.int32)


def pixels(case: Case, seed: int) -> np.ndarray:
    """uint8 ``[B, H, W, 3]``"""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (case.batch, case.size, case.size, 3), dtype=np.uint8)
