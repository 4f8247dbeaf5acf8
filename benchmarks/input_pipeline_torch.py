"""The peers of `benchmarks.input_pipeline`, as `step_worker` serves them; needs ``.venv-peers``.

``decode`` is libjpeg-turbo alone; ``loader`` is PyTorch's DataLoader over files, ``webdataset`` is
WebDataset's reader of shards, both with the transform of open_clip: Pillow and torchvision.
``python -m benchmarks.input_pipeline_torch FOLDER IMAGES`` writes the pictures.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import simplejpeg
import torch
import webdataset
from PIL import Image

import benchmarks.torch_operators  # noqa: F401  before torchvision
from benchmarks.input_pipeline import BATCH, BATCHES, SIZE, Step, write_pictures
from benchmarks.step_worker import serve

AUGMENTATION = {"scale": (0.2, 1.0), "color_jitter": (0.4, 0.4, 0.4, 0.1)}


class Files(torch.utils.data.Dataset[tuple[torch.Tensor, str]]):
    """Pictures with their captions, as open_clip's dataset of a table."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = sorted(folder.glob("*.jpg")), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path = self.paths[index]
        return self.transform(Image.open(path)), path.with_suffix(".txt").read_text()


def transform_of(augmentation: str) -> Callable[[Image.Image], torch.Tensor]:
    """open_clip's: with ``full`` its colour jitter, too."""
    from open_clip.transform import AugmentationCfg, image_transform

    jitter = {"color_jitter_prob": 0.8} if augmentation == "full" else {}
    chosen = AUGMENTATION if jitter else {"scale": AUGMENTATION["scale"]}
    return image_transform(SIZE, is_train=True, aug_cfg=AugmentationCfg(**chosen, **jitter))


def decode_alone(folder: Path) -> Iterator[Any]:
    """The pixels of one file after another, without end."""
    encoded = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    for data in itertools.cycle(encoded):
        yield simplejpeg.decode_jpeg(data)


def loader(folder: Path, augmentation: str) -> Iterator[torch.Tensor]:
    files = Files(folder, transform_of(augmentation))
    while True:
        for images, _ in torch.utils.data.DataLoader(files, BATCH, shuffle=True, drop_last=True):
            yield images


def from_shards(folder: Path, augmentation: str) -> Iterator[torch.Tensor]:
    """As open_clip reads them: decoded by Pillow, shuffled in a buffer, in batches."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(500)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(transform_of(augmentation), lambda text: text)
        .batched(BATCH)
    )
    for images, _ in data:
        yield images


def build(folder: str, kind: str, core: int) -> Step:
    """A step of `BATCHES` x `BATCH` pictures on one core; its value is the last batch's mean."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    name, _, augmentation = kind.partition(" ")
    if name == "decode":
        pictures = decode_alone(Path(folder))
        return lambda: float([next(pictures) for _ in range(BATCHES * BATCH)][-1].mean())
    batches = (loader if name == "loader" else from_shards)(Path(folder), augmentation)
    return lambda: float([next(batches) for _ in range(BATCHES)][-1].mean())


def photographs() -> list[Image.Image]:
    """The two that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_pictures(Path(sys.argv[1]), int(sys.argv[2]), photographs())
    else:
        serve(build)
