"""Small good files of every kind, to be damaged, and one way to read whatever became of them."""

import gzip
import io
import json
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import refcoco_files

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import decode
from clip_lite_jax.data.records import Example, write_records
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import BadImage, DataError

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


def read(source: Path, **fields: object) -> None:
    """Reads every example of every split, if there are any."""
    bad = BadExamples()
    try:
        found = build_sources(DataConfig(source=str(source), threads=0, **fields), bad)
    except DataError:
        return
    for split in found.values():
        for i in range(len(split)):
            try:
                example = split[i]
            except BadImage:
                continue
            assert isinstance(example.image, bytes)
            assert all(isinstance(caption, str) and caption for caption in example.captions)


def read_image(data: bytes) -> None:
    """Decodes a picture, if it is one."""
    try:
        picture = decode(data)
    except BadImage:
        return
    assert picture.mode == "RGB"
    picture.tobytes()


@cache
def jpeg() -> bytes:
    return hostile.encoded(hostile.noise(), "JPEG")


def write_images(folder: Path) -> None:
    """What the files of texts name."""
    for name in NAMES:
        (folder / name).write_bytes(jpeg())


@cache
def csv() -> bytes:
    text = "image,caption,split\n" + "".join(
        f'{name},"a picture, ""{name}"" é",{split}\n'
        for name, split in zip(NAMES, ("train", "val", "test", ""), strict=True)
    )
    return text.encode()


@cache
def json_lines() -> bytes:
    rows = [{"image": name, "caption": ["ein Bild", "ü"], "split": "train"} for name in NAMES]
    return "\n".join(map(json.dumps, rows)).encode()


@cache
def coco() -> bytes:
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
        "annotations": [{"id": i, "image_id": i, "caption": "a picture"} for i in range(4)],
    }
    return json.dumps(content).encode()


@cache
def karpathy() -> bytes:
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": "a picture"}, {"raw": "é"}]}
        for name, split in zip(NAMES, ("train", "restval", "val", "test"), strict=True)
    ]
    return json.dumps({"images": images}).encode()


@cache
def flickr() -> bytes:
    lines = [f"{name}#{i}\ta picture, é no {i}\n" for name in NAMES for i in range(2)]
    return "".join(lines).encode()


@cache
def shard() -> bytes:
    return _tar(tarfile.PAX_FORMAT, "long" * 40 + ".jpg")


@cache
def gnu_shard() -> bytes:
    """With long names as GNU's tar writes them, and captions in JSON."""
    return _tar(tarfile.GNU_FORMAT, "long" * 40 + ".jpg", ".json")


def _tar(format: int, long: str, ending: str = ".txt") -> bytes:
    caption = b'{"caption": "a picture"}' if ending == ".json" else b"a picture"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name in (*NAMES, long):
            for member, content in ((name, jpeg()), (name.replace(".jpg", ending), caption)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                info.pax_headers = {"comment": "é"}
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@cache
def parquet() -> bytes:
    return _parquet([{"bytes": jpeg(), "path": name} for name in NAMES])


@cache
def parquet_of_paths() -> bytes:
    return _parquet(list(NAMES))


def _parquet(images: list[object]) -> bytes:
    buffer = io.BytesIO()
    columns = {"image": images, "caption": [["a picture", "é"] for _ in NAMES]}
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


@cache
def examples() -> list[Example]:
    return [Example(name, name, ("a", "b"), jpeg(), {"split": "train"}) for name in NAMES]


@cache
def records() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "good.arrayrecord")
        write_records(path, examples())
        return path.read_bytes()


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in MNIST's format, not packed."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path) -> None:
    """A small set in MNIST's format, packed by gzip."""
    for prefix in ("train", "t10k"):
        for name, array in (
            ("images-idx3", np.zeros((4, 5, 6), np.uint8)),
            ("labels-idx1", np.arange(4, dtype=np.uint8)),
        ):
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array), mtime=0))


@cache
def refcoco() -> dict[str, bytes]:
    """The two files of references, whose images are `NAMES`."""
    content = refcoco_files.instances()
    for image, name in zip(content["images"], NAMES, strict=True):
        image["file_name"] = name
    return {
        "refs(unc).p": refcoco_files.python2_pickle(refcoco_files.references()),
        "instances.json": json.dumps(content).encode(),
    }


def inaturalist() -> bytes:
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
        "annotations": [{"id": i, "image_id": i, "category_id": i % 2} for i in range(4)],
        "categories": [{"id": i, "name": f"species {i}"} for i in range(2)],
    }
    return json.dumps(content).encode()


def voc() -> bytes:
    """The annotation of one picture."""
    names = (("dog", 0), ("person", 1))
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"
        for name, difficult in names
    )
    return f"<annotation><filename>a.jpg</filename>{objects}</annotation>".encode()


def write_voc(folder: Path) -> None:
    """A set of one picture in PASCAL VOC's layout."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "JPEGImages" / "a.jpg").write_bytes(jpeg())
    (folder / "Annotations" / "a.xml").write_bytes(voc())
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
