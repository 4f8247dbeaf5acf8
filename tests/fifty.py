"""Fifty pairs, written in every format as its publishers lay it out."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import COLOURS, SHAPES, draw

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.records import Example, write_records
from clip_lite_jax.data.sources import build_sources

COUNT = 50


@dataclass(frozen=True)
class Pair:
    name: str  # 000017.jpg
    image: bytes
    captions: tuple[str, ...]
    split: str

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".jpg")


def jpeg(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


@cache
def fifty_pairs() -> list[Pair]:
    pairs = []
    for i in range(COUNT):
        colour, shape = COLOURS[i % 8], SHAPES[i // 8 % 6]
        captions = tuple(
            f"{text} no {i}" for text in (f"a {colour} {shape}", f'{shape}, "{colour}"')
        )
        split = ("train", "train", "train", "val", "test")[i % 5]
        image = jpeg(draw(shape, colour, 24 + i))  # no two are alike
        pairs.append(Pair(f"{i:06}.jpg", image, captions, split))
    return pairs


def write_images(folder: Path, pairs: list[Pair], prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        (folder / f"{prefix}{pair.name}").write_bytes(pair.image)


def csv_rows(root: Path, pairs: list[Pair]) -> DataConfig:
    write_images(root / "images", pairs)
    with (root / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "image", "caption"])
        for pair in pairs:
            for caption in pair.captions:
                writer.writerow([pair.split, f"images/{pair.name}", caption])
    return DataConfig(source=str(root / "pairs.csv"), split_column="split")


def tsv_columns(root: Path, pairs: list[Pair]) -> DataConfig:
    write_images(root / "pictures", pairs)
    with (root / "pairs.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["image", "title", "alt", "split"])
        for pair in pairs:
            writer.writerow([pair.name, *pair.captions, pair.split])
    return DataConfig(
        source=str(root / "pairs.tsv"),
        image_folder=str(root / "pictures"),
        caption_columns=("title", "alt"),
        split_column="split",
    )


def json_lines(root: Path, pairs: list[Pair]) -> DataConfig:
    write_images(root, pairs)
    lines = [
        json.dumps({"file": pair.name, "texts": pair.captions, "part": pair.split})
        for pair in pairs
    ]
    (root / "pairs.jsonl").write_text("\n".join(lines))
    return DataConfig(
        source=str(root / "pairs.jsonl"),
        image_column="file",
        caption_columns=("texts",),
        split_column="part",
    )


def parquet_paths(root: Path, pairs: list[Pair]) -> DataConfig:
    write_images(root, pairs)
    columns = {
        "image": [pair.name for pair in pairs],
        "caption": [list(pair.captions) for pair in pairs],
        "split": [pair.split for pair in pairs],
    }
    pq.write_table(pa.table(columns), root / "pairs.parquet")
    return DataConfig(source=str(root / "pairs.parquet"), split_column="split")


def parquet_bytes(root: Path, pairs: list[Pair]) -> DataConfig:
    """As Hugging Face's hub stores images: files for each split, in groups of rows."""
    for split in ("train", "val", "test"):
        some = [pair for pair in pairs if pair.split == split]
        for part, half in enumerate((some[::2], some[1::2])):
            columns = {
                "image": [{"bytes": pair.image, "path": pair.name} for pair in half],
                "caption": [list(pair.captions) for pair in half],
            }
            file = root / f"{split}-{part:05}-of-00002.parquet"
            pq.write_table(pa.table(columns), file, row_group_size=4)
    return DataConfig(source=str(root))


def coco(root: Path, pairs: list[Pair]) -> dict[str, DataConfig]:
    """Two files, as COCO 2014 has: ``train`` and ``val``."""
    configs = {}
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        some = [pair for pair in pairs if (pair.split == "train") == (split == "train")]
        prefix = f"COCO_{split}2014_000000"
        write_images(root / f"{split}2014", some, prefix)
        images = [
            {"license": 5, "file_name": f"{prefix}{pair.name}", "id": int(pair.stem)}
            for pair in some
        ]
        annotations = [
            {"image_id": int(pair.stem), "id": 10 * int(pair.stem) + i, "caption": caption}
            for i in range(2)
            for pair in some
            for caption in [pair.captions[i]]
        ]
        content = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
        file = root / "annotations" / f"captions_{split}2014.json"
        file.write_text(json.dumps(content))
        configs[split] = DataConfig(source=str(file))
    return configs


def karpathy_coco(root: Path, pairs: list[Pair]) -> DataConfig:
    images = []
    for i, pair in enumerate(pairs):
        folder = "val2014" if pair.split != "train" or i % 2 else "train2014"
        write_images(root / folder, [pair], f"COCO_{folder}_000000")
        split = "restval" if pair.split == "train" and folder == "val2014" else pair.split
        images.append(
            {
                "filepath": folder,
                "sentids": [2 * i, 2 * i + 1],
                "filename": f"COCO_{folder}_000000{pair.name}",
                "imgid": i,
                "split": split,
                "sentences": [
                    {"tokens": text.split(), "raw": text, "imgid": i, "sentid": 2 * i + n}
                    for n, text in enumerate(pair.captions)
                ],
                "cocoid": int(pair.stem),
            }
        )
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return DataConfig(source=str(root / "dataset_coco.json"))


def karpathy_flickr(root: Path, pairs: list[Pair]) -> DataConfig:
    write_images(root / "flickr30k-images", pairs)
    images = [
        {
            "sentids": [2 * i, 2 * i + 1],
            "imgid": i,
            "sentences": [{"tokens": text.split(), "raw": text} for text in pair.captions],
            "split": pair.split,
            "filename": pair.name,
        }
        for i, pair in enumerate(pairs)
    ]
    file = root / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return DataConfig(source=str(file))


def flickr_token(root: Path, pairs: list[Pair]) -> DataConfig:
    write_images(root / "flickr30k-images", pairs)
    lines = [f"{p.name}#{n}\t{text}" for p in pairs for n, text in enumerate(p.captions)]
    (root / "results_20130124.token").write_text("\n".join(lines) + "\n")
    return DataConfig(source=str(root / "results_20130124.token"))


def folder(root: Path, pairs: list[Pair]) -> DataConfig:
    for pair in pairs:
        write_images(root / pair.stem[-1], [pair])
        (root / pair.stem[-1] / f"{pair.stem}.txt").write_text("\n".join(pair.captions) + "\n")
    return DataConfig(source=str(root), format="folder")


def web_dataset(root: Path, pairs: list[Pair]) -> DataConfig:
    """As img2dataset writes it: three members for each sample, shards of a thousand."""
    for split in ("train", "val", "test"):
        some = [pair for pair in pairs if pair.split == split]
        for number, start in enumerate(range(0, len(some), 6)):
            with tarfile.open(root / f"{split}-{number:05}.tar", "w") as tar:
                for pair in some[start : start + 6]:
                    about = {
                        "caption": pair.captions[0],
                        "alt": pair.captions[1],
                        "status": "success",
                    }
                    add(tar, pair.name, pair.image)
                    add(tar, f"{pair.stem}.json", json.dumps(about).encode())
                    add(tar, f"{pair.stem}.txt", pair.captions[0].encode())
    return DataConfig(source=str(root), caption_columns=("caption", "alt"))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def array_record(root: Path, pairs: list[Pair]) -> DataConfig:
    for number, some in enumerate((pairs[:20], pairs[20:])):
        write_records(
            root / f"pairs-{number:05}-of-00002.arrayrecord",
            [Example(p.name, p.stem, p.captions, p.image, {"split": p.split}) for p in some],
        )
    return DataConfig(source=str(root / "pairs-{00000..00001}-of-00002.arrayrecord"))


def tfds_folder(root: Path, pairs: list[Pair]) -> DataConfig:
    """A builder with the features of ``coco_captions``."""
    import tensorflow_datasets as tfds

    class CocoCaptionsLike(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.1.0")

        def _info(self) -> Any:
            captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "captions": captions,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {name: self._generate_examples(name) for name in ("train", "val", "test")}

        def _generate_examples(self, split: str) -> Any:
            for i, pair in enumerate(pairs):
                if pair.split == split:
                    texts = [{"id": n, "text": text} for n, text in enumerate(pair.captions)]
                    yield (
                        i,
                        {
                            "image": io.BytesIO(pair.image),
                            "image/filename": pair.name,
                            "image/id": i,
                            "captions": texts,
                        },
                    )

    builder = CocoCaptionsLike(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return DataConfig(source=str(builder.data_path), caption_columns=("captions/text",))


FORMATS: dict[str, Callable[[Path, list[Pair]], DataConfig]] = {
    writer.__name__: writer
    for writer in (
        csv_rows,
        tsv_columns,
        json_lines,
        parquet_paths,
        parquet_bytes,
        karpathy_coco,
        karpathy_flickr,
        flickr_token,
        folder,
        web_dataset,
        array_record,
        tfds_folder,
    )
}


def written(name: str, folder: Path) -> DataConfig:
    """The fifty pairs in one of the formats, in a new folder."""
    folder.mkdir()
    return FORMATS[name](folder, fifty_pairs())


UNSPLIT = ("flickr_token", "folder")
"""Formats that say nothing of splits."""


Row = tuple[str, str, tuple[str, ...], bytes]


def everything(config: DataConfig) -> dict[str, list[Row]]:
    """All that is known of all examples, by split."""
    found = {}
    for split, source in build_sources(config, BadExamples()).items():
        examples = (source[i] for i in range(len(source)))
        found[split] = [(e.id, e.group, e.captions, e.image) for e in examples]
    return found
