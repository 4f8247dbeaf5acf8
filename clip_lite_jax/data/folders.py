"""Folders of pictures: each with a text file beside it, or in a subfolder for each class."""

import os
from collections.abc import Iterator
from pathlib import Path

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.pairs import FileImages, Found
from clip_lite_jax.data.rows import TEXT, TEXTS, array
from clip_lite_jax.errors import DataError

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
MAX_TEXT = 1_000_000
"""Bytes of a text file; what is larger is no caption."""


def read_folder(config: DataConfig) -> Found:
    """``x.jpg`` with ``x.txt`` beside it, in subfolders too; each line is a caption."""
    root = Path(config.source)
    names: list[str] = []
    captions: list[list[str]] = []
    bad: dict[int, str] = {}
    for path in pictures(root):
        text = path.with_suffix(".txt")
        try:
            captions.append(read_captions(text))
        except (OSError, ValueError) as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else error
            bad[len(names)] = f"{text.name}: {why}"
            captions.append([])
        names.append(path.relative_to(root).as_posix())
    ids = array(names, TEXT)
    return Found(str(root), FileImages(root, ids), ids, [array(captions, TEXTS)], bad=bad)


def read_image_folder(config: DataConfig) -> Found:
    """``CLASS/x.jpg``, or ``train/CLASS/x.jpg`` and ``val/CLASS/x.jpg``; the class is the caption.

    Pictures of a class are one group, and `data.class_caption` makes its name a caption.
    """
    root = Path(config.source)
    names: list[str] = []
    classes: list[str] = []
    splits: list[str] = []
    for path in pictures(root):
        name = path.relative_to(root)
        folders = name.parts[:-1]
        split = folders[0] if folders and folders[0] in ("train", "val", "test") else ""
        if not folders[bool(split) :]:
            raise DataError(f"{path} is in no folder of a class below {root}")
        names.append(name.as_posix())
        classes.append(folders[bool(split)])
        splits.append(split)
    ids = array(names, TEXT)
    texts = [config.class_caption.replace("{}", _words(name)) for name in classes]
    return Found(
        str(root),
        FileImages(root, ids),
        ids,
        [array(texts, TEXT)],
        array(classes, TEXT),
        array(splits, TEXT) if any(splits) else None,
    )


def pictures(root: Path) -> Iterator[Path]:
    """The files below a folder that are named as pictures are, in the order of their names."""
    found = False
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in PICTURES:
                found = True
                yield Path(folder, name)
    if not found:
        raise DataError(f"data.source={root}: no pictures in it ({', '.join(sorted(PICTURES))})")


def read_captions(path: Path) -> list[str]:
    """The lines of a text file; raises ``ValueError`` where it is no UTF-8, ``OSError``."""
    if path.stat().st_size > MAX_TEXT:
        raise ValueError(f"{path.stat().st_size:,} bytes are too long for a caption")
    text = path.read_bytes().decode("utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _words(name: str) -> str:
    """A folder's name as words: "golden_retriever" is a golden retriever."""
    return name.replace("_", " ").replace("-", " ").strip()
