"""Folders of pictures: with a text file beside each, in a subfolder for each class, or alone."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.pairs import Found, images_in
from clip_lite_jax.data.rows import ATTRIBUTES, TEXT, TEXTS, array
from clip_lite_jax.errors import DataError
from clip_lite_jax.places import Place, each, place
from clip_lite_jax.remote import RemotePath

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
MAX_TEXT = 1_000_000
"""Bytes of a text file; what is larger is no caption."""


def read_folder(config: DataConfig) -> Found:
    """``x.jpg`` with ``x.txt`` beside it, in subfolders too; each line is a caption."""
    root = place(config.source)
    names: list[str] = []
    captions: list[list[str]] = []
    bad: dict[int, str] = {}
    paths = list(pictures(root))
    for path, (found, why) in zip(paths, each(_captions_beside, paths), strict=True):
        if why:
            bad[len(names)] = why
        captions.append(found)
        names.append(name_in(root, path).as_posix())
    ids = array(names, TEXT)
    return Found(str(root), images_in(root, ids), ids, [array(captions, TEXTS)], bad=bad)


def _captions_beside(picture: Place) -> tuple[list[str], str]:
    """The captions of a picture, or why there are none."""
    text = picture.with_suffix(".txt")
    try:
        return read_captions(text), ""
    except DataError:
        raise
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error
        return [], f"{text.name}: {why}"


def read_image_folder(config: DataConfig) -> Found:
    """``CLASS/x.jpg``, or ``train/CLASS/x.jpg`` and ``val/CLASS/x.jpg``; the class is the caption.

    Pictures of a class are one group, and `data.class_caption` makes its name a caption; the
    attribute ``label`` is the folder's name.
    """
    root = place(config.source)
    names: list[str] = []
    classes: list[str] = []
    splits: list[str] = []
    for path in pictures(root):
        name = name_in(root, path)
        folders = name.parts[:-1]
        split = folders[0] if folders and folders[0] in ("train", "val", "test") else ""
        if not folders[bool(split) :]:
            raise DataError(
                f"{path} has no caption: neither a {path.stem}.txt beside it, nor a folder of a "
                f"class below {root} around it"
            )
        names.append(name.as_posix())
        classes.append(folders[bool(split)])
        splits.append(split)
    ids = array(names, TEXT)
    texts = [config.class_caption.replace("{}", _words(name)) for name in classes]
    return Found(
        str(root),
        images_in(root, ids),
        ids,
        [array(texts, TEXT)],
        array(classes, TEXT),
        array(splits, TEXT) if any(splits) else None,
        attributes=array([[("label", name)] for name in classes], ATTRIBUTES),
    )


def read_pictures(config: DataConfig) -> Found:
    """Pictures alone, in subfolders too: to be encoded and searched, not to train on."""
    root = place(config.source)
    ids = array([name_in(root, path).as_posix() for path in pictures(root)], TEXT)
    none = array([[]] * len(ids), TEXTS)
    return Found(str(root), images_in(root, ids), ids, [none], captionless=True)


def pictures(root: Place) -> Iterator[Place]:
    """The files below a folder that are named as pictures are, in the order of their names."""
    found = False
    for path in _remote_files(root) if isinstance(root, RemotePath) else _files(root):
        if path.suffix.lower() in PICTURES:
            found = True
            yield path
    if not found:
        raise DataError(f"data.source={root}: no pictures in it ({', '.join(sorted(PICTURES))})")


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files))


def _remote_files(root: RemotePath) -> list[RemotePath]:
    def as_walked(path: RemotePath) -> list[tuple[bool, str]]:
        """The files of a folder come before its folders."""
        *folders, name = path.relative_to(root).parts
        return [*((True, folder) for folder in folders), (False, name)]

    return sorted(root.files(), key=as_walked)


def name_in(root: Place, path: Place) -> PurePath:
    """What a file is called within a folder that it lies in."""
    return path.relative_to(root)  # type: ignore[arg-type]  # both are local, or both remote


def read_captions(path: Place) -> list[str]:
    """The lines of a text file; raises ``ValueError`` where it is no UTF-8, ``OSError``."""
    if isinstance(path, RemotePath):
        data = path.read(0, MAX_TEXT + 1)
    else:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"over {MAX_TEXT:,} bytes are too long for a caption")
    text = data.decode("utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _words(name: str) -> str:
    """A folder's name as words: "golden_retriever" is a golden retriever."""
    return name.replace("_", " ").replace("-", " ").strip()
