"""Small files in RefCOCO's published layout, the references as Python 2 pickled them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

PARTS = ("train", "val", "testA", "testB")


def python2_pickle(value: Any) -> bytes:
    """``pickle.dumps(value)`` of Python 2: protocol 0, byte strings, everything memoised."""
    lines: list[str] = []
    memo: dict[str, int] = {}
    count = 0

    def put() -> int:
        nonlocal count
        lines.append(f"p{count}\n")
        count += 1
        return count - 1

    def write(value: Any) -> None:
        if isinstance(value, str) and value in memo:
            lines.append(f"g{memo[value]}\n")
        elif isinstance(value, str):
            lines.append(f"S{value!r}\n" if value.isascii() else f"V{_raw(value)}\n")
            memo[value] = put()
        elif isinstance(value, int):
            lines.append(f"I{value}\n")
        elif isinstance(value, list):
            lines.append("(l")
            put()
            for item in value:
                write(item)
                lines.append("a")
        else:
            lines.append("(d")
            put()
            for key, item in value.items():
                write(key)
                write(item)
                lines.append("s")

    write(value)
    return "".join([*lines, "."]).encode("ascii")


def _raw(text: str) -> str:
    return text.encode("raw-unicode-escape").decode("latin-1").encode("ascii").decode()


def references() -> list[dict[str, Any]]:
    """Two references in the picture of each part, of two phrases and of one."""
    found: list[dict[str, Any]] = []
    for image, part in enumerate(PARTS):
        for half, phrases in enumerate((["the left one", "red thing"], ["right"])):
            sentences = [
                {
                    "tokens": phrase.split(),
                    "raw": phrase.capitalize() + ".",
                    "sent_id": 100 * image + 10 * half + number,
                    "sent": phrase,
                }
                for number, phrase in enumerate(phrases)
            ]
            found.append(
                {
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "file_name": f"COCO_train2014_{image:012}_{half}.jpg",
                    "ann_id": 10 * image + half,
                    "ref_id": 2 * image + half,
                    "image_id": image,
                    "split": part,
                    "sentences": sentences,
                    "category_id": 1,
                }
            )
    return found


def instances() -> dict[str, Any]:
    """Of pictures of 40 by 20, a box in each half, and one more annotation across."""
    boxes = ([2, 3, 14.5, 12], [24, 3, 14, 12], [1, 1, 38, 18])
    return {
        "info": {},
        "licenses": [],
        "images": [
            {
                "id": image,
                "file_name": f"COCO_train2014_{image:012}.jpg",
                "width": 40,
                "height": 20,
                "license": 1,
            }
            for image in range(len(PARTS))
        ],
        "annotations": [
            {
                "id": 10 * image + half,
                "image_id": image,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "category_id": 1,
                "segmentation": [[1, 1, 2, 1, 2, 2]],
            }
            for image in range(len(PARTS))
            for half, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "thing", "supercategory": "thing"}],
    }


def write(root: Path, pickled: bytes | None = None) -> Path:
    """``refcoco/`` and the pictures under `root`; returns the former."""
    folder, images = root / "refcoco", root / "images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    (folder / "refs(unc).p").write_bytes(
        python2_pickle(references()) if pickled is None else pickled
    )
    content = instances()
    (folder / "instances.json").write_text(json.dumps(content))
    for number, image in enumerate(content["images"]):
        picture = Image.new("RGB", (40, 20), (20 * number, 0, 80))
        # What the heat of the tests follows: one half is red, and which one alternates.
        left = 20 * (number % 2)
        picture.paste((255, 0, 0), (left + 4, 4, left + 16, 14))
        picture.save(images / image["file_name"], quality=95)
    return folder
