"""The caption files of COCO and Flickr30k, as published, and Karpathy's splits of both."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.pairs import Found, images_in
from clip_lite_jax.data.rows import TEXT, TEXTS, array
from clip_lite_jax.data.splits import split_in
from clip_lite_jax.errors import DataError
from clip_lite_jax.places import Place, place

Items = Sequence[Mapping[str, Any]]


def read_annotations(config: DataConfig) -> Found:
    """A JSON file of COCO's captions or of Karpathy's splits, told apart by what is in it.

    Raises:
      DataError: it is neither, or no folder with its images is found.
    """
    path = place(config.source)
    content = read_json(path)
    images = items_of(path, content, "images")
    if "annotations" in content:
        annotations = items_of(path, content, "annotations")
        first = annotations[0] if annotations else {}
        if "category_id" in first and "caption" not in first:
            raise DataError(
                f"{path} has categories, not captions: data.format='inaturalist' reads a set of "
                "classes"
            )
        return _coco(path, images, annotations, config)
    if images and "sentences" in images[0]:
        return _karpathy(path, images, config)
    raise DataError(
        f"{path}: neither COCO's captions ('images' and 'annotations') nor one of Karpathy's files "
        "('images' with 'sentences')"
    )


def _coco(path: Place, images: Items, annotations: Items, config: DataConfig) -> Found:
    """``annotations/captions_train2017.json``, its images in ``train2017`` beside its folder.

    The split is the one in the file's name, if there is one.  Format: cocodataset.org, "Caption
    annotations".
    """
    names = {id_of(path, image, "id"): text_of(path, image, "file_name") for image in images}
    captions: dict[Any, list[str]] = {id: [] for id in names}
    strays = []
    for annotation in annotations:
        texts = captions.get(id_of(path, annotation, "image_id"))
        if texts is None:
            strays.append(f"annotation {annotation.get('id')}")
        else:
            texts.append(text_of(path, annotation, "caption"))
    stem = path.stem.removeprefix("captions_")  # train2017
    folder = image_folder(config, path, [path.parent.parent / stem], names.values())
    splits = [split_in(stem)] * len(names)
    return _found(path, folder, list(names.values()), list(captions.values()), splits, strays)


def _karpathy(path: Place, images: Items, config: DataConfig) -> Found:
    """``dataset_coco.json`` or ``dataset_flickr30k.json``.

    ``restval``, COCO's validation images that he leaves over, are for training, as everybody has
    it.  COCO's images lie in ``train2014`` and ``val2014``, Flickr30k's in ``flickr30k-images``.
    Format: cs.stanford.edu/people/karpathy/deepimagesent.
    """
    names, captions, splits = [], [], []
    for image in images:
        filepath = text_of(path, image, "filepath") if image.get("filepath") else ""
        name = text_of(path, image, "filename")
        names.append(f"{filepath}/{name}" if filepath else name)
        captions.append([text_of(path, s, "raw") for s in items_of(path, image, "sentences")])
        split = text_of(path, image, "split")
        splits.append("train" if split == "restval" else split)
    near = [path.parent, *(path.parent / name for name in ("flickr30k-images", "images"))]
    return _found(path, image_folder(config, path, near, names), names, captions, splits)


def read_flickr30k(config: DataConfig) -> Found:
    """Flickr30k's token file, ``results_20130124.token``: ``name.jpg#0``, a tab, the caption."""
    path = place(config.source)
    names: list[str] = []
    captions: list[str] = []
    lines: list[int] = []
    bad: dict[int, str] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                name, mark, caption = line.rstrip("\n").partition("\t")
                name, number_sign, _ = name.rpartition("#")
                if not (mark and number_sign):
                    bad[len(names)] = "no line of the form NAME#NUMBER, tab, caption"
                names.append(name)
                captions.append(caption.strip())
                lines.append(number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"data.source={path}: {error}") from error
    usual = ("flickr30k-images", "flickr30k_images", "images")
    near = [*(path.parent / name for name in usual), path.parent]
    ids = array(names, TEXT)
    return Found(
        str(path),
        images_in(image_folder(config, path, near, names), ids),
        ids,
        [array(captions, TEXT)],
        place=lambda row: f"{path.name}:{lines[row]}",
        bad=bad,
    )


def read_json(path: Place) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"data.source={path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def image_folder(
    config: DataConfig, path: Place, candidates: Sequence[Place], names: Iterable[str]
) -> Place:
    """`data.image_folder`, or the first candidate that holds one of the first images.

    Raises:
      DataError: none of them does.
    """
    if config.image_folder:
        return place(config.image_folder)
    some = [name for name, _ in zip(names, range(20), strict=False)]
    for folder in candidates:
        if any(_is_file(folder, name) for name in some):
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise DataError(
        f"{path}: none of its first images ({', '.join(some[:2]) or 'it lists none'}) is in "
        f"{looked}: name the folder of the images with data.image_folder"
    )


def _is_file(folder: Place, name: str) -> bool:
    try:
        path = folder / name
    except DataError:  # it leads out of a folder that is not on this machine
        return False
    try:
        return path.is_file()
    except DataError:  # a server that does not answer
        raise
    except (OSError, ValueError):  # a name that no file can have
        return False


def _found(
    path: Place,
    folder: Place,
    names: Sequence[str],
    captions: Sequence[Sequence[str]],
    splits: Sequence[str],
    strays: Sequence[str] = (),
) -> Found:
    """Rows, and after them the captions that belong to no image."""
    ids = array([*names, *strays], TEXT)
    # Some have line breaks.
    texts = [[text for raw in some if (text := " ".join(raw.split()))] for some in captions]
    nothing: list[list[str]] = [[] for _ in strays]
    return Found(
        str(path),
        images_in(folder, ids),
        ids,
        [array([*texts, *nothing], TEXTS)],
        splits=array([*splits, *("" for _ in strays)], TEXT),
        place=lambda row: path.name,
        bad={len(names) + i: "of an image that is not listed" for i in range(len(strays))},
    )


def items_of(path: Place, content: Any, key: str) -> Items:
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{path}: {key!r} is no list of objects")
    return items


def text_of(path: Place, item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise DataError(f"{path}: {key!r} of {str(item)[:80]} is no text")
    return value


def id_of(path: Place, item: Mapping[str, Any], key: str) -> Any:
    """A number or text, or None where there is none."""
    value = item.get(key)
    if isinstance(value, (list, dict)):
        raise DataError(f"{path}: {key!r} of {str(item)[:80]} is no number or text")
    return value
