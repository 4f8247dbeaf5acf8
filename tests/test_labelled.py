"""Published sets of labelled pictures, small, in their exact layout."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fifty import fifty_pairs

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import decode
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import DataError

RNG = np.random.default_rng(0)


def read(config: DataConfig) -> dict[str, list[Example]]:
    bad = BadExamples()
    found = build_sources(config, bad)
    assert bad.reasons == {}
    return {split: [s[i] for i in range(len(s))] for split, s in found.items()}


def labels(examples: list[Example]) -> list[str]:
    return [example.attributes["label"] for example in examples]


def write_cifar10(folder: Path, rows: int = 4) -> dict[str, np.ndarray]:
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    pixels = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = RNG.integers(0, 256, (rows, 3073), np.uint8)
        data[:, 0] = np.arange(rows) % 3
        (folder / f"{name}.bin").write_bytes(data.tobytes())
        pixels[name] = data[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels


def test_cifar10(tmp_path: Path) -> None:
    pixels = write_cifar10(tmp_path)
    found = read(DataConfig(source=str(tmp_path)))
    assert {split: len(examples) for split, examples in found.items()} == {"train": 20, "test": 4}
    assert labels(found["test"]) == ["airplane", "automobile", "bird", "airplane"]
    example = found["train"][5]  # the second of the second file
    assert example.captions == ("a photo of a automobile.",)
    assert example.group == "automobile"
    np.testing.assert_array_equal(np.asarray(decode(example.image)), pixels["data_batch_2"][1])


def test_cifar100(tmp_path: Path) -> None:
    (tmp_path / "coarse_label_names.txt").write_text("aquatic_mammals\nfish\n")
    (tmp_path / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    for name, rows in (("train", 3), ("test", 2)):
        data = RNG.integers(0, 256, (rows, 3074), np.uint8)
        data[:, 0], data[:, 1] = 0, np.arange(rows) % 2
        (tmp_path / f"{name}.bin").write_bytes(data.tobytes())
    found = read(DataConfig(source=str(tmp_path), class_caption="{}"))
    assert labels(found["train"]) == ["apple", "aquarium_fish", "apple"]
    assert found["test"][1].captions == ("aquarium_fish",)


def write_idx(path: Path, data: np.ndarray, packed: bool) -> None:
    header = bytes((0, 0, 8, data.ndim)) + np.array(data.shape, ">u4").tobytes()
    content = header + data.tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    images = RNG.integers(0, 256, (12, 28, 28), np.uint8)
    for prefix, some in (("train", slice(0, 10)), ("t10k", slice(10, 12))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[some], packed)
        numbers = (np.arange(12) % 10).astype(np.uint8)[some]
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", numbers, packed)
    found = read(DataConfig(source=str(folder)))
    assert labels(found["train"])[::9] == ["t-shirt or top", "ankle boot"]
    assert found["test"][1].captions == ("a photo of a trouser.",)
    grey = np.asarray(decode(found["test"][0].image))
    np.testing.assert_array_equal(grey, np.repeat(images[10][..., None], 3, axis=2))


def test_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC2012"
    names = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
    for i, pair in enumerate(fifty_pairs()[:6]):
        wnid = ("n01440764", "n01443537")[i % 2]
        path = root / ("val" if i >= 4 else "train") / wnid / f"{wnid}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pair.image)
    (root / "LOC_synset_mapping.txt").write_text(names)
    found = read(DataConfig(source=str(root)))
    assert labels(found["train"]) == ["tench", "tench", "goldfish", "goldfish"]
    assert labels(found["validation"]) == ["tench", "goldfish"]
    assert found["validation"][0].id == "val/n01440764/n01440764_4.JPEG"
    (root / "train" / "n00000000").mkdir()
    (root / "train" / "n00000000" / "x.jpg").write_bytes(fifty_pairs()[0].image)
    with pytest.raises(DataError, match="in no folder of a class that LOC_synset_mapping.txt"):
        read(DataConfig(source=str(root)))


def write_imagenet(root: Path) -> tuple[str, str, str]:
    """A goldfish and the two kinds of cranes, three pictures each; returns the wnids."""
    wnids = ("n01443537", "n02012849", "n03126707")
    names = ("goldfish, Carassius auratus", "crane", "crane")
    for i, pair in enumerate(fifty_pairs()[:9]):
        wnid = wnids[i % 3]
        path = root / ("val" if i >= 6 else "train") / wnid / f"{wnid}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pair.image)
    lines = [f"{wnid} {name}\n" for wnid, name in zip(wnids, names, strict=True)]
    (root / "LOC_synset_mapping.txt").write_text("".join(lines))
    return wnids


def test_classes_of_one_name(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    examples = read(DataConfig(source=str(tmp_path)))["validation"]
    assert labels(examples) == ["goldfish", "crane", "crane"]
    assert [example.attributes["wnid"] for example in examples][1:] == ["n02012849", "n03126707"]


def write_voc(root: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    objects = {
        "000001": [("dog", 0), ("person", 0), ("person", 1)],
        "000002": [("car", 0)],
        "000003": [("chair", 1), ("car", 0)],
    }
    for pair, (id, found) in zip(fifty_pairs(), objects.items(), strict=False):
        (root / "JPEGImages" / f"{id}.jpg").write_bytes(pair.image)
        items = "".join(
            f"<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>"
            f"<difficult>{hard}</difficult><bndbox><xmin>1</xmin></bndbox></object>"
            for name, hard in found
        )
        text = (
            f"<annotation><folder>VOC2007</folder><filename>{id}.jpg</filename>{items}</annotation>"
        )
        (root / "Annotations" / f"{id}.xml").write_text(text)
    for split, ids in (("train", ["000001"]), ("val", ["000002"]), ("test", ["000003"])):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000002\n")
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("000001  1\n")


def test_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    write_voc(root)
    found = read(DataConfig(source=str(root)))
    (train,), (validation,), (test,) = (found[s] for s in ("train", "validation", "test"))
    assert train.captions == ("a photo of a dog and a person.",)
    assert train.attributes == {"labels": "dog,person"}
    assert validation.attributes == {"label": "car"}
    assert test.attributes == {"labels": "car,chair", "difficult": "chair"}
    (root / "Annotations" / "000001.xml").write_text(
        '<!DOCTYPE x [<!ENTITY a "aaaaaaaa">]><annotation>&a;</annotation>'
    )
    with pytest.raises(DataError, match="defines entities"):
        read(DataConfig(source=str(root)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<annotation>", "000001.xml is no XML: no element found"),
        (b'<?xml version="1.0" encoding="none"?><annotation/>', "is no XML: unknown encoding"),
        (b'<?xml version="1.0" encoding="gbk"?><annotation/>', "is no XML: multi-byte encodings"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>'.encode("utf-16"), "is no UTF-8 text"),
    ],
)
def test_damaged_annotations_of_voc(content: bytes, message: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations" / "000001.xml").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("a\x00b", "not a path: .*null"),
        ("../../outside", "the path leaves"),
        ("gone", "gone.xml: no such file"),
    ],
)
def test_names_of_voc_that_are_none(id: str, message: str, tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007")
    (tmp_path / "outside.xml").write_text("<annotation/>")
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "train.txt").write_text(f"{id}\n")
    with pytest.raises(DataError, match=message):
        read(DataConfig(source=str(tmp_path / "VOC2007")))


def test_inaturalist(tmp_path: Path) -> None:
    names = ["Aves/2761/abc.jpg", "Plantae/7/def.jpg"]
    for name, pair in zip(names, fifty_pairs(), strict=False):
        path = tmp_path / "train_val2018" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(pair.image)
    content = {
        "info": {"year": 2018},
        "images": [{"id": i, "file_name": f"train_val2018/{n}"} for i, n in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "category_id": i} for i in range(2)],
        "categories": [{"id": 0, "name": "2761"}, {"id": 1, "name": "7"}],
    }
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    config = DataConfig(source=str(tmp_path / "train2018.json"), format="inaturalist")
    assert labels(read(config)["train"]) == ["2761", "7"]
    del content["categories"]
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    species = [{"id": 0, "name": "Corvus corax"}, {"id": 1, "name": "Rosa canina"}]
    (tmp_path / "categories.json").write_text(json.dumps(species))
    assert labels(read(config)["train"]) == ["Corvus corax", "Rosa canina"]
    with pytest.raises(DataError, match="has categories, not captions: data.format='inaturalist'"):
        read(DataConfig(source=config.source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": [], "file_name": "x"}]}, "train2018.json: 'id' of .* is no number"),
        ({"annotations": [{"image_id": {}}]}, "'image_id' of .* is no number or text"),
        ({"annotations": [{"image_id": 0, "category_id": []}]}, "'category_id' of .* is no number"),
        ({"categories": {"name": 1}}, "train2018.json: 'categories' is no list of objects"),
        ({"categories": [1]}, "train2018.json: 'categories' is no list of objects"),
        ({"categories": [{"id": {}, "name": "x"}]}, "'id' of .* is no number or text"),
        ({"categories": None}, "categories.json: 'categories' is no list of objects"),
    ],
)
def test_damaged_inaturalist(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    content = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "train2018.json").write_text(json.dumps(content | changes))
    (tmp_path / "categories.json").write_text("3" if changes == {"categories": None} else "[]")
    config = DataConfig(
        source=str(tmp_path / "train2018.json"),
        format="inaturalist",
        image_folder=str(tmp_path),
    )
    with pytest.raises(DataError, match=message):
        read(config)


def test_a_class_whose_name_is_no_unicode(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(fifty_pairs()[0].image)
    content = {
        "images": [{"id": 0, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 0, "category_id": 0}],
        "categories": [{"id": 0, "name": "half \ud83d"}],
    }
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    config = DataConfig(source=str(tmp_path / "train2018.json"), format="inaturalist")
    assert labels(read(config)["train"]) == ["half \\ud83d"]


def cut(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: cut(f, "data_batch_3.bin"), "data_batch_3.bin: .* are no rows of 3073"),
        (lambda f: (f / "test_batch.bin").unlink(), "test_batch.bin: No such file"),
        (lambda f: (f / "batches.meta.txt").write_text("one\n"), "label 2, but 1 names of classes"),
        (lambda f: (f / "batches.meta.txt").write_bytes(b"\xff\n"), "is not UTF-8"),
    ],
)
def test_damaged_sets(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        read(DataConfig(source=str(tmp_path)))


def test_damaged_idx(tmp_path: Path) -> None:
    config = DataConfig(source=str(tmp_path), format="idx")
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: .*No such file"):
        read(config)
    path = tmp_path / "train-images-idx3-ubyte"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(b"\x00" * 1000)[:-9])
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        read(config)
    huge = bytes((0, 0, 8, 3)) + np.array((2**31, 2**31, 2**31), ">u4").tobytes()
    empty = bytes((0, 0, 8, 3)) + np.array((0, 2**32 - 1, 2**32 - 1), ">u4").tobytes()
    for content in (huge, empty, huge[:3], huge[:6], huge[:-1]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="no array of bytes in 3 dimensions"):
            read(config)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [((2, 3, 4), (2, 3, 5), "3x4 and 3x5 pixels"), ((2, 0, 4), (2, 0, 4), "images of 0x4 pixels")],
)
def test_idx_of_odd_sizes(
    train: tuple[int, ...], test: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    for prefix, shape in (("train", train), ("t10k", test)):
        images, labels = np.zeros(shape, np.uint8), np.zeros(shape[0], np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images, packed=False)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels, packed=False)
    with pytest.raises(DataError, match=message):
        read(DataConfig(source=str(tmp_path)))


def test_classes_of_mnist_in_a_folder_below_one_of_fashion(tmp_path: Path) -> None:
    folder = tmp_path / "fashion_project" / "sets" / "mnist"
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", np.zeros((4, 5, 5), np.uint8), False)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(4, dtype=np.uint8), False)
    found = build_sources(DataConfig(source=str(folder)), BadExamples())
    assert "shirt" not in " ".join(found["train"].metadata(0).captions)
