"""The same fifty pairs through every format, in the layout that its publishers give it."""

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import good_files
import pytest
from fifty import (
    FORMATS,
    UNSPLIT,
    Pair,
    add,
    coco,
    csv_rows,
    fifty_pairs,
    web_dataset,
    write_images,
)

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import index
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import Source, build_sources, fingerprint
from clip_lite_jax.errors import BadImage, DataError


@pytest.fixture
def fifty() -> list[Pair]:
    return fifty_pairs()


OTHER_NAME = {"val": "validation"}


def read(config: DataConfig) -> dict[str, Source]:
    bad = BadExamples()
    found = build_sources(config, bad)
    assert bad.reasons == {}
    return found


def contents(source: Source) -> dict[bytes, tuple[str, ...]]:
    examples = [source[i] for i in range(len(source))]
    assert len({example.id for example in examples}) == len(examples)
    return {example.image: example.captions for example in examples}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(name: str, fifty: list[Pair], tmp_path: Path) -> None:
    config = FORMATS[name](tmp_path, fifty)
    found = read(config)
    if name in UNSPLIT:
        together = {k: v for source in found.values() for k, v in contents(source).items()}
        assert together == {pair.image: pair.captions for pair in fifty}
        assert found.keys() == {"train", "validation", "test"}
    else:
        for split in ("train", "val", "test"):
            expected = {pair.image: pair.captions for pair in fifty if pair.split == split}
            assert contents(found[OTHER_NAME.get(split, split)]) == expected
    first = found["train"].metadata(0)
    assert first.image == b""
    assert first.captions == found["train"][0].captions
    assert fingerprint(found) == fingerprint(read(config))


def test_coco_files_hold_the_split_of_their_name(fifty: list[Pair], tmp_path: Path) -> None:
    for split, config in coco(tmp_path, fifty).items():
        if split == "val":
            with pytest.raises(DataError, match="holds nothing to train on"):
                read(config)
            continue
        expected = {pair.image: pair.captions for pair in fifty if pair.split == "train"}
        assert contents(read(config)["train"]) == expected


def test_a_folder_of_classes(fifty: list[Pair], tmp_path: Path) -> None:
    for pair in fifty:
        split = "val" if pair.split == "test" else pair.split
        name = pair.captions[0].split()[1]
        write_images(tmp_path / split / f"{name}_thing", [pair])
    found = read(DataConfig(source=str(tmp_path)))
    assert {name: len(source) for name, source in found.items()} == {"train": 30, "validation": 20}
    example = found["train"][0]
    assert example.captions == ("a photo of a black thing.",)
    assert example.group == "black_thing"


def test_shards_are_indexed_once(
    fifty: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = web_dataset(tmp_path, fifty)
    read(config)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("a shard was read again"))
    found = read(config)
    assert len(contents(found["train"])) == 30
    with pytest.raises(pytest.fail.Exception):  # other captions are another index
        read(replace(config, caption_columns=("alt",)))


def test_processes_index_shards(
    fifty: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = web_dataset(tmp_path, fifty)
    alone = read(config)
    monkeypatch.setenv("CLIP_LITE_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr(index, "ALONE_BYTES", 0)
    assert fingerprint(read(config)) == fingerprint(alone)


def test_shards_with_all_kinds_of_bad_members(fifty: list[Pair], tmp_path: Path) -> None:
    def text(tar: tarfile.TarFile, key: str, content: bytes = b"a thing") -> None:
        add(tar, f"{key}.txt", content)

    def special(tar: tarfile.TarFile, name: str, kind: bytes, target: str = "/etc/passwd") -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        tar.addfile(member)

    image = fifty[0].image
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add(tar, "good.jpg", image)
        text(tar, "good")
        add(tar, "../up.jpg", image)
        add(tar, "/absolute.jpg", image)
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            special(tar, f"{name}.jpg", kind)
            text(tar, name)
        special(tar, "pipe.jpg", tarfile.FIFOTYPE)
        add(tar, "bare.jpg", image)
        text(tar, "alone")
        add(tar, "latin.jpg", image)
        text(tar, "latin", "caf\xe9".encode("latin-1"))
        add(tar, "broken.jpg", image)
        add(tar, "broken.json", b"{")
        add(tar, "two.jpg", image)
        add(tar, "two.png", image)
        add(tar, "good.jpg", image)
        text(tar, "good", b"again")
    whole = (tmp_path / "train-0.tar").read_bytes()
    with tarfile.open(tmp_path / "train-1.tar", "w") as tar:
        add(tar, "first.jpg", image)
        text(tar, "first")
        add(tar, "last.jpg", image * 100)
    (tmp_path / "train-1.tar").write_bytes((tmp_path / "train-1.tar").read_bytes()[:-20_000])
    (tmp_path / "train-2.tar").write_bytes(b"nonsense" * 1000)
    (tmp_path / "train-3.tar").write_bytes(b"")
    (tmp_path / "train-4.tar").write_bytes(whole[:700])
    bad = BadExamples(tmp_path / "skipped.jsonl")
    found = build_sources(DataConfig(source=str(tmp_path)), bad)
    assert contents(found["train"]) == {image: ("a thing",)}
    assert [found["train"].metadata(i).id for i in range(2)] == ["train-0/good", "train-1/first"]
    reasons = bad.reasons
    for key, reason in {
        "train-0/../up": "leaves the archive",
        "train-0//absolute": "leaves the archive",
        "train-0/link": "is no plain file",
        "train-0/hard": "is no plain file",
        "train-0/pipe": "is no plain file",
        "train-0/bare": "empty caption",
        "train-0/alone": "no picture",
        "train-0/latin": "can't decode",
        "train-0/broken": "broken.json",
        "train-0/two": "more than one picture",
        "train-0/good": "occurs twice",
        "train-1/last": "is cut short",
        "train-1/(the rest)": "damaged: unexpected end of data",
        "train-2/(the rest)": "damaged",
        "train-3/(the rest)": "damaged",
    }.items():
        assert reason in reasons.pop(key), key
    assert all(key.startswith("train-4/") for key in reasons)
    assert reasons


def test_an_image_that_goes_away_is_a_bad_example(fifty: list[Pair], tmp_path: Path) -> None:
    (tmp_path / "tar").mkdir()
    train = read(web_dataset(tmp_path / "tar", fifty))["train"]
    for path in (tmp_path / "tar").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(BadImage, match="has become shorter"):
        train[0]
    for path in (tmp_path / "tar").glob("*.tar"):
        path.unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        train[0]
    table = csv_rows(tmp_path, fifty)
    train = read(table)["train"]
    (tmp_path / "images" / fifty[0].name).unlink()
    with pytest.raises(BadImage, match="no such file"):
        train[0]


def test_rows_that_are_no_rows(fifty: list[Pair], tmp_path: Path) -> None:
    write_images(tmp_path, fifty[:1])
    name = fifty[0].name
    lines = [
        json.dumps({"image": name, "caption": " a ring "}),
        "{",
        "[1]",
        json.dumps({"image": name, "caption": 3}),
        json.dumps({"image": name, "caption": ["", " "]}),
        json.dumps({"image": ["x"], "caption": "x"}),
        json.dumps({"caption": "x"}),
        "[" * 100_000,
        "",
        json.dumps({"image": name, "caption": ["a ring", "another"], "more": {}}),
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    bad = BadExamples(tmp_path / "skipped.jsonl")
    found = build_sources(DataConfig(source=str(tmp_path / "pairs.jsonl"), held_out=0), bad)
    assert contents(found["train"]) == {fifty[0].image: ("a ring", "another")}
    expected = ["not a row", "no object", "no text or list", "empty caption", "'image' is no text"]
    expected += ["no image path", "not a row"]
    assert len(bad) == len(expected)
    for (id, reason), wanted in zip(bad.reasons.items(), expected, strict=True):
        assert wanted in reason
        assert id.startswith("pairs.jsonl:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "[1]", "'images' is no list of objects"),
        ("a.json", '{"images": [{"id": 1}]}', "neither COCO's captions .* nor one of Karpathy's"),
        ("a.json", '{"images": [{"id": 1}], "annotations": []}', "'file_name' of .* is no text"),
        ("a.json", '{"images": [], "annotations": []}', "it lists none.*data.image_folder"),
        (
            "a.json",
            '{"images": [{"id": [], "file_name": "x"}], "annotations": []}',
            "'id' of .* is no number or text",
        ),
        (
            "a.json",
            '{"images": [], "annotations": [{"image_id": {}}]}',
            "'image_id' of .* is no number or text",
        ),
        (
            "a.json",
            '{"images": [{"filename": "x", "filepath": [1], "sentences": []}]}',
            "'filepath' of .* is no text",
        ),
        ("a.token", "x.jpg#0\tcap\n", "none of its first images .x.jpg. is in .*flickr30k-images"),
        ("a.token", b"x.jpg#0\t\xff\n", "is not UTF-8"),
        ("a.parquet", "PAR1", "is no Parquet file"),
        ("a.arrayrecord", "x", "not a complete ArrayRecord file"),
        ("a.tar", "x" * 600, "no usable row"),
        ("a.jsonl", '{"picture": "x"}\n', "no column 'image'; it has picture"),
        ("a.xlsx", "", "nor a file that ends in .*data.format says"),
    ],
)
def test_files_that_cannot_be_used(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        build_sources(DataConfig(source=str(tmp_path / name)), BadExamples())


def test_parquet_columns_whose_names_are_no_unicode(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(good_files.parquet().replace(b"element", b"\xe1lement"))
    with pytest.raises(DataError, match=r"a.parquet is no Parquet file that can be read: 'utf-8'"):
        build_sources(DataConfig(source=str(path)), BadExamples())


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source, message in {
        "{00..02}.tar": "3 of 3 files are not there, .*00.tar first",
        "{0..99999999}.tar": "counts 100000000 files",
        "*.tar": "no such file, and no folder with .tar files",
        "gone.parquet": "no such file",
        "gone.json": "No such file",
        "gone.token": "No such file",
    }.items():
        with pytest.raises(DataError, match=message):
            build_sources(DataConfig(source=str(tmp_path / source)), BadExamples())
    with pytest.raises(DataError, match="no pictures in it"):
        build_sources(DataConfig(source=str(tmp_path)), BadExamples())
    with pytest.raises(DataError, match="data.format='zip': choose from annotations"):
        build_sources(DataConfig(source="x", format="zip"), BadExamples())
    with pytest.raises(DataError, match="tfds:no_such_set"):
        build_sources(DataConfig(source="tfds:no_such_set"), BadExamples())


def test_names_and_texts_that_are_no_unicode(fifty: list[Pair], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(fifty[0].image)
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a thing")
    write_images(tmp_path, fifty[1:2])
    (tmp_path / f"{fifty[1].stem}.txt").write_text("a thing")
    bad = BadExamples()
    found = build_sources(DataConfig(source=str(tmp_path), format="folder", held_out=0), bad)
    assert contents(found["train"]) == {fifty[1].image: ("a thing",)}
    assert bad.reasons == {"caf\\udce9.jpg": "its name is not UTF-8: rename it"}
    row = json.dumps({"image": fifty[1].name, "caption": "half \ud83d of one"})
    (tmp_path / "pairs.jsonl").write_text(row)
    found = build_sources(DataConfig(source=str(tmp_path / "pairs.jsonl"), held_out=0), bad)
    assert found["train"][0].captions == ("half \\ud83d of one",)
    with tarfile.open(tmp_path / "train-0.tar", "w", encoding="utf-8") as tar:
        add(tar, name, fifty[2].image)
        add(tar, name.replace(".jpg", ".txt"), b"a thing")
    found = build_sources(DataConfig(source=str(tmp_path / "train-0.tar")), bad)
    assert contents(found["train"]) == {fifty[2].image: ("a thing",)}


@pytest.mark.parametrize("quotes", ["", '"'])
def test_commas_in_captions_without_quotation_marks(quotes: str, tmp_path: Path) -> None:
    write_images(tmp_path, fifty_pairs()[:3])
    a, b, c = (pair.name for pair in fifty_pairs()[:3])
    rows = ["image,caption", f"{a},one, two", f"{b},{quotes}whole{quotes},,", f"{c},three"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    bad = BadExamples()
    config = DataConfig(source=str(tmp_path / "pairs.csv"), held_out=0.0)
    train = build_sources(config, bad)["train"]
    assert [train.metadata(i).captions for i in range(len(train))] == [("whole",), ("three",)]
    ((id, reason),) = bad.reasons.items()
    assert id == f"pairs.csv:2: {a}"
    assert reason.startswith("3 cells, of which the header names 2: a caption that holds a comma")


@pytest.mark.parametrize(
    ("header", "advice"),
    [
        ("image;caption", "parted by ';'"),
        ("image, caption", "white space around"),
        ("photos/1.jpg,a dog", "first line has to name the columns"),
        ("picture,text", "data.image_column and data.caption_columns"),
    ],
)
def test_headers_that_do_not_fit(header: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(f"{header}\nx.jpg,y\n")
    with pytest.raises(DataError, match=advice):
        build_sources(DataConfig(source=str(tmp_path / "pairs.csv")), BadExamples())


def test_a_path_with_backslashes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_images(tmp_path / "sub", fifty_pairs()[:1])
    name = fifty_pairs()[0].name
    (tmp_path / "pairs.csv").write_text(f"image,caption\nsub\\{name},a dog\nsub/{name},a cat\n")
    bad = BadExamples()
    build_sources(DataConfig(source=str(tmp_path / "pairs.csv"), held_out=0.0), bad)
    assert list(bad.reasons.values()) == ["no such file; folders are parted by / here"]
