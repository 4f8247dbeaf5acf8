"""RefCOCO's files: the published layout, and what pickles of strangers do not do."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import refcoco_files
from fsspec.implementations.memory import MemoryFileSystem

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import DataError
from clip_lite_jax.pretrained.pickles import read_pickle


def test_the_published_layout(tmp_path: Path) -> None:
    folder = refcoco_files.write(tmp_path)
    sources = build_sources(DataConfig(source=str(folder)), BadExamples())
    assert {name: len(split) for name, split in sources.items()} == {
        "train": 2, "validation": 2, "test": 4,
    }  # fmt: skip
    example = sources["validation"][0]
    assert example.captions == ("the left one", "red thing")
    assert example.group == "COCO_train2014_000000000001.jpg"
    assert json.loads(example.attributes["box"]) == [2, 3, 16.5, 15]
    assert len(json.loads(example.attributes["candidates"])) == 3
    assert example.attributes["part"] == "val"
    # The same from later protocols, a file by its name, and JSON.
    for protocol in (0, 1, 2, 4):
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refcoco_files.references(), protocol))
        again = build_sources(DataConfig(source=str(folder / "refs(unc).p")), BadExamples())
        assert again["test"][3] == sources["test"][3]
    (folder / "refs.json").write_text(json.dumps(refcoco_files.references()))
    config = DataConfig(source=str(folder / "refs.json"), format="refcoco")
    assert build_sources(config, BadExamples())["test"][3] == sources["test"][3]
    (folder / "refs(google).p").write_bytes(b"")
    with pytest.raises(DataError, match=r"name one of its files: refs\(google\).p, refs\(unc\).p"):
        build_sources(DataConfig(source=str(folder)), BadExamples())


def test_in_a_bucket(buckets: MemoryFileSystem, tmp_path: Path) -> None:
    folder = refcoco_files.write(tmp_path / "here")
    buckets.put(str(tmp_path / "here"), "memory://bucket/data", recursive=True)
    there = DataConfig(source="memory://bucket/data/refcoco")
    remote = build_sources(there, BadExamples())["test"]
    local = build_sources(DataConfig(source=str(folder)), BadExamples())["test"]
    assert [remote[i] for i in range(len(remote))] == [local[i] for i in range(len(local))]


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch it_was_run",)


def laughs() -> bytes:
    """Lists of lists of lists: 10 ** 30 of them when written out."""
    value: Any = "lol"
    for _ in range(30):
        value = [value] * 10
    return pickle.dumps([{"split": "train", "sentences": [], "ref_id": value}], 2)


def repeated() -> bytes:
    """A file of 200 kB that would be 40 million phrases."""
    sentences = [{"sent": "a"}] * 10_000
    return pickle.dumps(
        [
            {"ref_id": n, "ann_id": 0, "image_id": 0, "split": "train", "sentences": sentences}
            for n in range(4_000)
        ],
        2,
    )


def itself() -> bytes:
    value: list[Any] = []
    value.append(value)
    one = refcoco_files.references()[0] | {"sentences": value}
    return pickle.dumps([one], 2)


HOSTILE: dict[str, tuple[Any, str]] = {
    "code": (lambda: pickle.dumps([Malicious()], 0), "asks for posix.system"),
    "code of Python 2": (lambda: b"(lp0\ncposix\nsystem\n(S'id'\ntRa.", "asks for posix.system"),
    "an instance": (lambda: b"(i__main__\nA\n.", "nothing was run"),
    "laughs": (laughs, "an id is no number"),
    "itself": (itself, "a sentence is no text"),
    "repeated": (repeated, "repeat themselves"),
    "cut": (lambda: refcoco_files.python2_pickle(refcoco_files.references())[:700], "no pickle"),
    "empty": (lambda: b"", "no pickle"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "PERSID"),
    "a huge number": (lambda: b"(lp0\nI" + b"9" * 100_000 + b"\na.", "no pickle"),
    "a large place": (lambda: b"(lr\xff\xff\xff\x7fI1\na.", "is no dict"),
    "deep": (lambda: b"(l" * 50_000 + b"a" * 49_999 + b".", "reference 0 is no dict"),
    "no list": (lambda: pickle.dumps({"a": 1}, 0), "no list of references"),
    "numbers": (lambda: pickle.dumps([1, 2], 0), "is no dict"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_references(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clip_lite_jax.data.refcoco.MOST_TEXT", 2_000_000)
    make, reason = HOSTILE[name]
    folder = refcoco_files.write(tmp_path, make())
    with pytest.raises(DataError, match=reason) as caught:
        build_sources(DataConfig(source=str(folder)), BadExamples())
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "it_was_run").exists()


def test_references_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    references = refcoco_files.references()
    references[0]["image_id"] = 77
    references[1]["ann_id"] = 78
    references[2]["ref_id"] = references[3]["ref_id"]
    folder = refcoco_files.write(tmp_path, refcoco_files.python2_pickle(references))
    content = refcoco_files.instances()
    content["images"][2]["file_name"] = "../../../../../../etc/passwd"
    for annotation, box in zip(
        content["annotations"][9:], ([1, 2, float("nan"), 4], "box", [1, 2, 0, 4]), strict=True
    ):
        annotation["bbox"] = box
    (folder / "instances.json").write_text(json.dumps(content))
    bad = BadExamples()
    sources = build_sources(DataConfig(source=str(folder)), bad, training=False)
    assert {name: len(split) for name, split in sources.items()} == {"validation": 1}
    reasons = " ".join(bad.reasons.values())
    for reason in ("not listed", "no annotation 78", "there twice", "leaves", "no annotation 30"):
        assert reason in reasons


def test_a_box_of_another_image_is_none(tmp_path: Path) -> None:
    references = refcoco_files.references()
    references[0]["ann_id"] = 20  # of the picture of testA
    folder = refcoco_files.write(tmp_path, refcoco_files.python2_pickle(references))
    bad = BadExamples()
    sources = build_sources(DataConfig(source=str(folder)), bad, training=False)
    assert {name: len(split) for name, split in sources.items()}["train"] == 1
    assert list(bad.reasons.values()) == ["annotation 20 is of another image"]


def test_a_length_is_not_believed() -> None:
    """The stream's length is the limit of what is read."""
    with pytest.raises((ValueError, EOFError)):
        read_pickle(io.BytesIO(b"X\xff\xff\xff\x7fabc."), Path("x"), lambda *_: None)
