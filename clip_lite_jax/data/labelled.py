"""Sets of labelled pictures that evaluation needs, as published: a class is a caption and a group.

What `data.class_caption` makes of a class's name is the caption; the attribute ``label`` is the
name itself.  Of pictures with several labels ``labels`` has them all, parted by commas.
"""

import gzip
import hashlib
import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.annotations import id_of, image_folder, items_of, read_json, text_of
from clip_lite_jax.data.folders import name_in, pictures
from clip_lite_jax.data.pairs import Found, Images, images_in, inside
from clip_lite_jax.data.rows import ATTRIBUTES, TEXT, array
from clip_lite_jax.data.splits import split_in
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.places import Place, each, place
from clip_lite_jax.remote import RemotePath

MAX_IDX_BYTES = 2**28
"""Of an unpacked file of MNIST's format; the published ones have 47 million."""

FASHION = (
    "t-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Fashion-MNIST's classes: github.com/zalandoresearch/fashion-mnist, "Labels"."""


@dataclass(frozen=True)
class ArrayImages(Images):
    """Pictures in an array, uint8 ``[N, H, W]`` or ``[N, H, W, 3]``, read as PNG files."""

    pixels: np.ndarray
    places: np.ndarray
    """int64: the picture of each row."""

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        picture = Image.fromarray(self.pixels[self.places[index]])
        picture.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def stamp(self, index: int) -> str:
        return hashlib.blake2b(self.pixels[self.places[index]], digest_size=16).hexdigest()

    def take(self, indices: np.ndarray) -> "ArrayImages":
        return ArrayImages(self.pixels, self.places[indices])


def read_cifar(config: DataConfig) -> Found:
    """CIFAR-10 or CIFAR-100, the binary version: ``cifar-10-batches-bin``, ``cifar-100-binary``.

    Format: cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    folder = place(config.source)
    hundred = (folder / "fine_label_names.txt").is_file()
    names = _lines(folder / ("fine_label_names.txt" if hundred else "batches.meta.txt"))
    if hundred:
        files = {"train": ["train.bin"], "test": ["test.bin"]}
    else:
        batches = [f"data_batch_{number}.bin" for number in range(1, 6)]
        files = {"train": batches, "test": ["test_batch.bin"]}
    labels: list[np.ndarray] = []
    pixels: list[np.ndarray] = []
    splits: list[str] = []
    for split, parts in files.items():
        for name in parts:
            data = np.frombuffer(_content(folder / name), np.uint8)
            width = 3072 + 1 + hundred
            if not len(data) or len(data) % width:
                raise DataError(f"{folder / name}: {len(data):,} bytes are no rows of {width}")
            rows = data.reshape(-1, width)
            labels.append(rows[:, int(hundred)])  # of CIFAR-100 the second, the fine one
            pixels.append(rows[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            splits += [split] * len(rows)
    return _of_arrays(config, np.concatenate(pixels), np.concatenate(labels), names, splits)


def read_idx(config: DataConfig) -> Found:
    """MNIST and Fashion-MNIST: ``train-images-idx3-ubyte`` and so on, packed by gzip or not.

    Classes are named in ``labels.txt``, one on each line; else they are Fashion-MNIST's if the
    folder is called so, and digits if not.
    """
    folder = place(config.source)
    names: Sequence[str] = [str(digit) for digit in range(10)]
    if (folder / "labels.txt").is_file():
        names = _lines(folder / "labels.txt")
    elif "fashion" in f"{folder.resolve().parent.name}/{folder.name}".lower():
        names = FASHION
    pixels: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    splits: list[str] = []
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(folder / f"{prefix}-images-idx3-ubyte", 3)
        found = _idx(folder / f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(found):
            raise DataError(f"{folder}: {len(images)} {prefix} images, {len(found)} labels")
        pixels.append(images)
        labels.append(found)
        splits += [split] * len(images)
    sizes = list(dict.fromkeys(images.shape[1:] for images in pixels))
    if len(sizes) > 1 or 0 in sizes[0]:
        several = " and ".join(f"{height}x{width}" for height, width in sizes)
        raise DataError(
            f"{folder}: images of {several} pixels; all of a set have the same, and none is empty"
        )
    return _of_arrays(config, np.concatenate(pixels), np.concatenate(labels), names, splits)


def read_imagenet(config: DataConfig) -> Found:
    """ImageNet's ILSVRC 2012: folders ``train/n01440764`` and ``val/n01440764``.

    ``LOC_synset_mapping.txt`` (a line: ``n01440764 tench, Tinca tinca``), in the folder or the one
    above, names the classes; the first name counts.  Two pairs of classes share theirs ("crane",
    "maillot"): the attribute ``wnid``, n01440764, tells them apart.
    """
    root = place(config.source)
    mapping = next(
        (p for p in (root / SYNSETS, root.parent / SYNSETS) if p.is_file()), root / SYNSETS
    )
    names = dict(re.split(r"\s+", line, maxsplit=1) for line in _lines(mapping) if " " in line)
    paths, labels, splits, wnids = [], [], [], []
    for path in pictures(root):
        parts = name_in(root, path).parts
        if len(parts) < 2 or parts[-2] not in names:
            raise DataError(f"{path} is in no folder of a class that {mapping.name} names")
        paths.append("/".join(parts))
        labels.append(names[parts[-2]].split(",")[0].strip())
        splits.append(split_in(parts[0]) if len(parts) > 2 else "")
        wnids.append({"wnid": parts[-2]})
    return _of_files(config, root, paths, [[label] for label in labels], splits, wnids)


SYNSETS = "LOC_synset_mapping.txt"


def read_voc(config: DataConfig) -> Found:
    """PASCAL VOC 2007, the folder ``VOC2007`` with ``JPEGImages``, ``Annotations``, ``ImageSets``.

    A picture has the labels of its objects; the attribute ``difficult`` has those that are there
    only in objects marked so.  ``trainval`` without ``train`` and ``val`` is for training.
    Format: the development kit's documentation, sections 4 and 8.
    """
    root = place(config.source)
    lists = root / "ImageSets" / "Main"
    ids: dict[str, str] = {}
    for name in ("train", "val", "test", "trainval"):
        if (lists / f"{name}.txt").is_file():
            for id in _lines(lists / f"{name}.txt"):
                ids.setdefault(id.split()[0], "train" if name == "trainval" else name)
    if not ids:
        raise DataError(f"{lists} has no train.txt, val.txt, test.txt or trainval.txt")
    labels, difficult = [], []
    files = [_inside(root, f"Annotations/{id}.xml") for id in ids]
    for easy, hard in each(_objects, files):
        labels.append(sorted(easy | hard))
        difficult.append(",".join(sorted(hard - easy)))
    paths = [f"JPEGImages/{id}.jpg" for id in ids]
    more = [{"difficult": text} if text else {} for text in difficult]
    return _of_files(config, root, paths, labels, list(ids.values()), more)


def read_inaturalist(config: DataConfig) -> Found:
    """iNaturalist 2018: ``train2018.json`` or ``val2018.json``, images in ``train_val2018``.

    Species are named in the file's ``categories``, or in ``categories.json`` beside it.  Format:
    github.com/visipedia/inat_comp, 2018.
    """
    path = place(config.source)
    content = read_json(path)
    images = items_of(path, content, "images")
    labels = {
        id_of(path, a, "image_id"): id_of(path, a, "category_id")
        for a in items_of(path, content, "annotations")
    }
    known = items_of(path, content, "categories") if content.get("categories") else ()
    if not known or "name" not in known[0]:
        beside = path.with_name("categories.json")
        known = items_of(beside, {"categories": read_json(beside)}, "categories")
    names = {id_of(path, c, "id"): text_of(path, c, "name") for c in known}
    paths = [text_of(path, image, "file_name") for image in images]
    found = []
    for image in images:
        label = names.get(labels.get(id_of(path, image, "id")))
        found.append([] if label is None else [label])
    folder = image_folder(config, path, [path.parent, path.parent.parent], paths)
    return _of_files(config, folder, paths, found, [split_in(path.stem)] * len(paths))


def _of_arrays(
    config: DataConfig,
    pixels: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    splits: Sequence[str],
) -> Found:
    if len(labels) and labels.max() >= len(names):
        raise DataError(f"{config.source}: label {labels.max()}, but {len(names)} names of classes")
    found = [[names[label]] for label in labels.tolist()]
    ids = [f"{split}/{number}" for number, split in enumerate(splits)]
    images = ArrayImages(pixels, np.arange(len(pixels)))
    return _labelled(config, ids, images, found, splits, [{} for _ in ids])


def _of_files(
    config: DataConfig,
    root: Place,
    paths: Sequence[str],
    labels: Sequence[Sequence[str]],
    splits: Sequence[str],
    attributes: Sequence[Mapping[str, str]] | None = None,
) -> Found:
    images = images_in(root, array(paths, TEXT))
    return _labelled(config, paths, images, labels, splits, attributes or [{} for _ in paths])


def _labelled(
    config: DataConfig,
    ids: Sequence[str],
    images: Any,
    labels: Sequence[Sequence[str]],
    splits: Sequence[str],
    attributes: Sequence[Mapping[str, str]],
) -> Found:
    """Rows with the labels of each picture, none for one that cannot be used."""
    captions = [
        config.class_caption.replace("{}", " and a ".join(some)) if some else "" for some in labels
    ]
    known = [
        {"label": some[0], **more} if len(some) == 1 else {"labels": ",".join(some), **more}
        for some, more in zip(labels, attributes, strict=True)
    ]
    return Found(
        config.source,
        images,
        array(ids, TEXT),
        [array(captions, TEXT)],
        array([",".join(some) for some in labels], TEXT),
        array(splits, TEXT) if any(splits) else None,
        attributes=array([list(row.items()) for row in known], ATTRIBUTES),
    )


def _inside(root: Place, name: str) -> Place:
    """`pairs.inside` for a file that must be there."""
    try:
        return inside(root, name) if isinstance(root, Path) else root / name
    except BadImage as error:
        raise DataError(f"{root / name}: {error}") from error


def _objects(path: Place) -> tuple[set[str], set[str]]:
    """The classes of a picture's objects: those that are plain to see, and those that are not."""
    content = _content(path)
    # No annotation needs any; null bytes are UTF-16, in which they would look otherwise.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\x00" in content:
        raise DataError(f"{path}: an annotation that defines entities, or is no UTF-8 text")
    try:
        annotation = ElementTree.fromstring(content)
    # ValueError and LookupError: an encoding of several bytes, and one that is unknown.
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path} is no XML: {error}") from error
    easy: set[str] = set()
    hard: set[str] = set()
    for item in annotation.iter("object"):
        name = (item.findtext("name") or "").strip()
        (hard if item.findtext("difficult") == "1" else easy).add(name)
    return easy - {""}, hard - {""}


def _idx(path: Place, dimensions: int) -> np.ndarray:
    """A file of bytes in MNIST's format: yann.lecun.org/exdb/mnist."""
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file():
        content = _content(path)
    else:
        try:
            with gzip.open(packed) as file:
                content = file.read(MAX_IDX_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{packed}: {error}") from error
    start = 4 * (1 + dimensions)
    whole = content[:4] == bytes((0, 0, 8, dimensions)) and len(content) >= start
    shape = np.frombuffer(content[4:start], ">u4").tolist() if whole else []  # none overflows
    # Beside a size of zero the others may be any, but NumPy multiplies them all the same.
    whole = whole and math.prod(filter(None, shape)) <= MAX_IDX_BYTES
    if not whole or len(content) != start + math.prod(shape):
        raise DataError(f"{path}: no array of bytes in {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _lines(path: Place) -> list[str]:
    try:
        return [line.strip() for line in _content(path).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _content(path: Place) -> bytes:
    """Of a remote file without a copy: sets have an annotation for each picture."""
    try:
        if isinstance(path, RemotePath):
            return path.read(0, MAX_IDX_BYTES)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
