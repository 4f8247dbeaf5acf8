"""RefCOCO, RefCOCO+ and RefCOCOg as published: phrases that each refer to a box of an image.

A folder holds ``refs(unc).p`` (or ``(google)``, ``(umd)``), a pickle of Python 2, and COCO's
``instances.json``.  The pickle is read by `pretrained.pickles`, which runs nothing.
Format: github.com/lichengunc/refer.
"""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.annotations import id_of, image_folder, items_of, read_json, text_of
from clip_lite_jax.data.pairs import MAX_BYTES, Found, images_in
from clip_lite_jax.data.rows import ATTRIBUTES, TEXT, TEXTS, array
from clip_lite_jax.errors import CheckpointError, DataError
from clip_lite_jax.places import Place, place

MOST_STEPS = 100_000_000
"""Instructions of the pickle; RefCOCO's 142,210 sentences take some ten million."""
MOST_TEXT = 200_000_000
"""Characters of all phrases and boxes: parts of a pickle can be there a million times."""
FORM = (
    "each needs ref_id, ann_id and image_id (numbers), split (text) and sentences (a list of "
    "objects with 'sent' or 'raw')"
)


def read_refcoco(config: DataConfig) -> Found:
    """A row for each reference: its image, all its phrases, and in `attributes` its boxes.

    ``box`` is left, upper, right and lower edge in pixels, ``candidates`` the boxes of everything
    annotated in the image, both JSON; ``size`` is the width and height that they refer to, and
    ``part`` the published name of the split (``testA``).  References of one image are a group.

    Raises:
      DataError: no such files, or they do not hold what they should.
    """
    path = _references(place(config.source))
    instances = path.parent / "instances.json"
    content = read_json(instances)
    images = {
        id_of(instances, image, "id"): image for image in items_of(instances, content, "images")
    }
    annotations = items_of(instances, content, "annotations")
    boxes = {id_of(instances, item, "id"): _box(item.get("bbox")) for item in annotations}
    image_of = {
        id_of(instances, item, "id"): id_of(instances, item, "image_id") for item in annotations
    }
    candidates: dict[Any, list[list[float]]] = {}
    for item in annotations:
        if box := boxes[annotation := id_of(instances, item, "id")]:
            candidates.setdefault(image_of[annotation], []).append(box)
    written = {id: json.dumps(some) for id, some in candidates.items()}
    files = {id: text_of(instances, image, "file_name") for id, image in images.items()}
    rows: list[Row] = []
    bad: dict[int, str] = {}
    seen: set[int] = set()
    held = 0
    for number, reference in enumerate(_read(path)):
        ref, ann, image, part = _checked(path, number, reference)
        if ref in seen:
            bad[number] = "a ref_id that is there twice"
        elif image not in images:
            bad[number] = "of an image that is not listed"
        elif boxes.get(ann) is None:
            bad[number] = f"no annotation {ann} with a box"
        elif image_of[ann] != image:
            bad[number] = f"annotation {ann} is of another image"
        seen.add(ref)
        phrases, attributes = [], {"part": part}
        if number not in bad:
            phrases = _phrases(path, number, reference["sentences"])
            attributes |= {"box": json.dumps(boxes[ann]), "candidates": written.get(image, "[]")}
            attributes |= {"image_id": str(image), **_size(images[image])}
        held += sum(len(text) + 50 for text in (*phrases, *attributes.values()))
        if held > MOST_TEXT:
            raise DataError(f"{path} and {instances} would take gigabytes: they repeat themselves")
        rows.append(Row(files.get(image, ""), ref, phrases, part, attributes))
    return _found(path, config, rows, bad)


@dataclass(frozen=True)
class Row:
    """A reference."""

    file: str
    ref: int
    phrases: list[str]
    part: str
    attributes: dict[str, str]


def _size(image: Mapping[str, Any]) -> dict[str, str]:
    size = [image.get(side) for side in ("width", "height")]
    whole = all(isinstance(side, int) and 0 < side < 2**31 for side in size)
    return {"size": json.dumps(size)} if whole else {}


def _found(path: Place, config: DataConfig, rows: Sequence[Row], bad: dict[int, str]) -> Found:
    near = [
        path.parent.parent / "images/mscoco/images/train2014",  # where refer's README has them
        *(path.parent.parent / name for name in ("images/train2014", "train2014", "images")),
        *(path.parent / name for name in ("images", "train2014")),
        path.parent,
    ]
    files = array([row.file for row in rows], TEXT)
    folder = image_folder(config, path, near, (row.file for row in rows if row.file))
    return Found(
        str(path),
        images_in(folder, files),
        array([f"{row.file}#{row.ref}" for row in rows], TEXT),
        [array([row.phrases for row in rows], TEXTS)],
        groups=files,
        splits=array(["test" if row.part.startswith("test") else row.part for row in rows], TEXT),
        place=lambda row: f"{path.name}, reference {row}",
        bad=bad,
        attributes=array([list(row.attributes.items()) for row in rows], ATTRIBUTES),
    )


def _references(path: Place) -> Place:
    """The file of references that a source means."""
    if not path.is_dir():
        return path
    found: list[Place] = sorted(path.glob("refs(*).p"), key=str)
    if len(found) != 1:
        names = ", ".join(one.name for one in found)
        raise DataError(
            f"data.source={path}: "
            + (f"name one of its files: {names}" if found else "no refs(...).p is in this folder")
        )
    return found[0]


def _read(path: Place) -> list[Any]:
    """The list in a file of references: the published pickle, or the same as JSON."""
    content = read_json(path) if path.suffix == ".json" else _unpickled(path)
    if not isinstance(content, list):
        raise DataError(f"{path} is no list of references")
    return content


def _unpickled(path: Place) -> Any:
    from clip_lite_jax.pretrained.pickles import read_pickle  # pretrained uses this package

    def no_code(module: str, name: str) -> Any:
        raise DataError(
            f"{path} asks for {module}.{name}, which no list of references needs; nothing was run"
        )

    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has over {MAX_BYTES:,} bytes, which no list of references has")
        data = io.BytesIO(Path(path).read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python about texts with strange escapes
            return read_pickle(data, Path(path), no_code, most_steps=MOST_STEPS)
    except OSError as error:
        raise DataError(f"data.source={path}: {error}") from error
    except CheckpointError as error:
        raise DataError(str(error)) from error
    except DataError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no pickle of references: {error}") from error


def _checked(path: Place, number: int, reference: Any) -> tuple[int, int, int, str]:
    """The reference's own number, that of its annotation and of its image, and its split.

    Messages hold no values: lists in a pickle may hold each other, and would never end when they
    are written out.
    """
    where = f"{path}, reference {number}"
    if not isinstance(reference, dict):
        raise DataError(f"{where} is no dict: {FORM}")
    ids: list[Any] = [reference.get(key) for key in ("ref_id", "ann_id", "image_id")]
    if not all(isinstance(id, int) for id in ids):
        raise DataError(f"{where}: an id is no number; {FORM}")
    split = reference.get("split")
    if not isinstance(split, str) or not isinstance(reference.get("sentences"), list):
        raise DataError(f"{where}: no split or no list of sentences; {FORM}")
    return ids[0], ids[1], ids[2], split[:40]


def _phrases(path: Place, number: int, sentences: list[Any]) -> list[str]:
    phrases = []
    for sentence in sentences:
        phrase = sentence.get("sent", sentence.get("raw")) if isinstance(sentence, dict) else None
        if not isinstance(phrase, str):
            raise DataError(f"{path}, reference {number}: a sentence is no text; {FORM}")
        phrases.append(" ".join(phrase.split()))
    return phrases


def _box(bbox: Any) -> list[float] | None:
    """COCO's left, upper, width and height → left, upper, right, lower, or None for no box."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    if not all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in bbox):
        return None
    left, upper, width, height = map(float, bbox)
    if not (width > 0 and height > 0):
        return None
    return [round(edge, 4) for edge in (left, upper, left + width, upper + height)]
