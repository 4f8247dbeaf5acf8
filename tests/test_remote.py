"""Data in buckets: the same pairs as from a disk, and nothing that a row should not reach."""

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fifty import FORMATS, Pair, everything, fifty_pairs, write_images, written
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from test_labelled import write_cifar10, write_idx, write_voc

from clip_lite_jax import remote
from clip_lite_jax.apps import data_convert, data_splits
from clip_lite_jax.apps.data_convert import conversion_of, convert
from clip_lite_jax.cli import main
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data import pairs as pairs_module
from clip_lite_jax.data import shards
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import Source, build_sources, fingerprint
from clip_lite_jax.errors import BadImage, DataError
from clip_lite_jax.files import replacing
from clip_lite_jax.places import is_remote, matching, place
from clip_lite_jax.remote import RemotePath

BUCKET = "memory://bucket/data"


@pytest.fixture(autouse=True)
def empty(buckets: MemoryFileSystem) -> MemoryFileSystem:
    return buckets


@pytest.fixture
def fifty() -> list[Pair]:
    return fifty_pairs()


def read(config: DataConfig, bad: BadExamples | None = None) -> dict[str, Source]:
    return build_sources(config, BadExamples() if bad is None else bad)


def put(folder: Path, url: str = BUCKET) -> None:
    """Copies a folder into the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(
                f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes()
            )


def moved(config: DataConfig, folder: Path, url: str = BUCKET) -> DataConfig:
    """The same data in the bucket."""
    put(folder, url)

    def there(name: str) -> str:
        return name.replace(str(folder), url)

    images = config.image_folder and there(config.image_folder)
    return replace(config, source=there(config.source), image_folder=images)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same_from_a_bucket(name: str, tmp_path: Path) -> None:
    local = written(name, tmp_path / "local")
    config = moved(local, tmp_path / "local")
    if name == "tfds_folder":
        with pytest.raises(DataError, match=r"read from a local disk.*data convert"):
            read(config)
        return
    bad = BadExamples()
    found = read(config, bad)
    assert bad.reasons == {}
    assert everything(config) == everything(local)
    assert fingerprint(found) == fingerprint(read(local))
    train = pickle.loads(pickle.dumps(found["train"]))  # as it travels to workers
    assert train[0] == found["train"][0]


@pytest.mark.parametrize("table_is_remote", [True, False])
def test_a_table_and_its_images_in_different_places(
    table_is_remote: bool, fifty: list[Pair], tmp_path: Path
) -> None:
    local = written("tsv_columns", tmp_path / "local")
    config = moved(local, tmp_path / "local")
    one, other = (config, local) if table_is_remote else (local, config)
    mixed = replace(one, image_folder=other.image_folder)
    assert everything(mixed) == everything(local)


@pytest.mark.parametrize(
    "pattern", ["", "/train-*.tar", "/train-{00000..00004}.tar", "/train-0000[0-4].tar"]
)
def test_shards_by_folder_pattern_and_braces(pattern: str, tmp_path: Path) -> None:
    local = written("web_dataset", tmp_path / "local")
    config = moved(local, tmp_path / "local")
    found = everything(replace(config, source=BUCKET + pattern))
    assert found["train"] == everything(local)["train"]
    assert [str(path) for path in matching(f"{BUCKET}/val-*.tar")] == [
        f"{BUCKET}/val-{number:05}.tar" for number in range(2)
    ]
    assert not list((tmp_path / "cache").glob("remote/*"))  # shards are not copied


def test_shards_that_are_missing(tmp_path: Path) -> None:
    moved(written("web_dataset", tmp_path / "local"), tmp_path / "local")
    with pytest.raises(DataError, match=r"5 of 10 files are not there, memory:.*00005.tar first"):
        read(DataConfig(source=f"{BUCKET}/train-{{00000..00009}}.tar"))
    for source in (f"{BUCKET}/none-*.tar", f"{BUCKET}/none.tar"):
        with pytest.raises(DataError, match="no such file, and no folder with .tar files"):
            read(DataConfig(source=source))


def test_shards_are_indexed_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moved(written("web_dataset", tmp_path / "local"), tmp_path / "local")
    first = everything(config)
    monkeypatch.setattr(remote, "PART", 512)  # many requests for each shard
    monkeypatch.setenv("CLIP_LITE_CACHE", str(tmp_path / "another cache"))
    assert everything(config) == first
    indexed: list[str] = []
    run = shards.samples_of
    monkeypatch.setattr(
        shards, "samples_of", lambda path, keys: indexed.append(str(path)) or run(path, keys)
    )
    assert everything(config) == first
    assert indexed == []
    name = f"{BUCKET}/train-00001.tar"
    put(tmp_path / "local")
    fsspec.filesystem("memory").pipe_file(name, (tmp_path / "local/val-00000.tar").read_bytes())
    assert everything(config) != first
    assert name in indexed


def test_a_server_that_fails_is_no_damaged_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moved(written("web_dataset", tmp_path / "local"), tmp_path / "local")

    def cat_file(*_: Any, **__: Any) -> bytes:
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", cat_file)
        with pytest.raises(DataError, match=r"memory://bucket/.*\.tar: connection reset"):
            read(config)
    assert len(read(config)["train"]) == 30


def test_labelled_folders(fifty: list[Pair], tmp_path: Path) -> None:
    for pair in fifty:
        split = "val" if pair.split == "test" else pair.split
        name = pair.captions[0].split()[1]
        write_images(tmp_path / "local" / split / f"{name}_thing", [pair])
    local = DataConfig(source=str(tmp_path / "local"))
    assert everything(moved(local, tmp_path / "local")) == everything(local)


def write_fashion(root: Path) -> None:
    for prefix in ("train", "t10k"):
        pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
        write_idx(root / f"{prefix}-images-idx3-ubyte", pixels, packed=True)
        write_idx(root / f"{prefix}-labels-idx1-ubyte", np.arange(3, dtype=np.uint8), packed=False)


def write_imagenet(root: Path) -> None:
    for i, pair in enumerate(fifty_pairs()[:6]):
        folder = root / ("val" if i >= 4 else "train") / ("n01440764", "n01443537")[i % 2]
        write_images(folder, [pair])
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn01443537 goldfish\n")


def write_inaturalist(root: Path) -> None:
    write_images(root / "train_val2018", fifty_pairs()[:2])
    names = [f"train_val2018/{pair.name}" for pair in fifty_pairs()[:2]]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "category_id": i} for i in range(2)],
    }
    (root / "train2018.json").write_text(json.dumps(content))
    categories = [{"id": i, "name": name} for i, name in enumerate(("a moss", "a fern"))]
    (root / "categories.json").write_text(json.dumps(categories))


@pytest.mark.parametrize(
    ("write", "fields"),
    [
        (write_cifar10, {}),
        (write_fashion, {}),
        (write_imagenet, {}),
        (write_inaturalist, {"source": "train2018.json", "format": "inaturalist"}),
        (write_voc, {}),
    ],
)
def test_labelled_sets(
    write: Callable[[Path], Any], fields: dict[str, str], tmp_path: Path
) -> None:
    root = tmp_path / "fashion or not"
    root.mkdir()
    write(root)
    source = str(root / fields.get("source", ""))
    local = DataConfig(source=source, format=fields.get("format"))
    assert everything(moved(local, root, "memory://fashion")) == everything(local)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", "the path leaves memory://bucket/data"),
        ("a/../../secret.jpg", "the path leaves"),
        ("/bucket/secret.jpg", "the path leaves"),
        ("..\\secret.jpg", "the path leaves"),
        ("\\secret.jpg", "the path leaves"),
        ("memory://bucket/secret.jpg", "the path leaves"),
        ("s3://other/secret.jpg", "the path leaves"),
        ("http://127.0.0.1/secret.jpg", "the path leaves"),
        ("file:///etc/passwd", "the path leaves"),
        ("simplecache::file:///etc/passwd", "the path leaves"),
        ("x\x00.jpg", "the path leaves"),
        ("", "no image path"),
        ("a/..", "no path"),
        ("::", "means something else"),
        ("*.jpg", "no such file"),
        ("x" * 5000, "no such file"),
        ("images", "no such file"),
    ],
)
def test_names_that_lead_elsewhere(
    name: str, reason: str, fifty: list[Pair], empty: MemoryFileSystem
) -> None:
    image = fifty[0].image
    empty.pipe_file("memory://bucket/secret.jpg", image)
    empty.pipe_file(f"{BUCKET}/images/x.jpg", image)
    images = pairs_module.images_in(
        RemotePath(BUCKET), pairs_module.pa.array([name, "images/x.jpg"])
    )
    with pytest.raises(BadImage, match=reason):
        images.read(0)
    assert images.read(1) == image
    assert (0 in images.missing()) == (reason != "no such file")
    assert 1 not in images.missing()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        # File systems whose addresses go through urlsplit, which drops white space.
        ("ftp://host/data", ".\t./secret.jpg"),
        ("ftp://host/data", ".\n./secret.jpg"),
        ("ftp://host/data", "x.jpg?y"),
        ("ftp://host/data", "x.jpg#y"),
        ("https://host/data/?token=abc", "x.jpg"),
    ],
)
def test_names_that_a_file_system_takes_for_others(folder: str, name: str) -> None:
    with pytest.raises(DataError, match="means something else in|cannot have a query"):
        RemotePath(folder) / name
    if "?" not in folder:
        images = pairs_module.images_in(RemotePath(folder), pairs_module.pa.array([name]))
        assert 0 in images.missing()


def test_a_name_chooses_no_version_of_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """As s3fs and gcsfs understand ``?versionId=`` and ``#123``."""

    def options(url: str) -> dict[str, bool]:
        return {"version_aware": True} if "#" in url else {}

    monkeypatch.setattr(MemoryFileSystem, "_get_kwargs_from_urls", staticmethod(options))
    with pytest.raises(DataError, match="means something else"):
        RemotePath(BUCKET) / "x.jpg#123"


def test_a_shard_without_a_tag_is_indexed_at_every_start(
    fifty: list[Pair], empty: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moved(written("web_dataset", tmp_path / "local"), tmp_path / "local")
    monkeypatch.setattr(remote, "TAGS", ())
    made = []
    make = shards._index

    def index(path: RemotePath, caption_keys: tuple[str, ...]) -> object:
        made.append(path)
        return make(path, caption_keys)

    monkeypatch.setattr(shards, "_index", index)
    read(config)
    first = len(made)
    read(config)
    assert len(made) == 2 * first > 0


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Threads that copy one object, or machines that share the cache."""
    path = tmp_path / "copy"

    def write(content: bytes) -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            barrier.wait()  # all have written when the first takes its place

    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [bytes([n]) * 1000 for n in range(8)]))
    assert len(set(path.read_bytes())) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


def test_a_server_that_fails_is_no_missing_folder(
    empty: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moved(written("karpathy_coco", tmp_path / "local"), tmp_path / "local")
    info = MemoryFileSystem.info

    def fails(self: MemoryFileSystem, path: str, **options: object) -> object:
        if path.endswith(".json"):
            return info(self, path, **options)
        raise OSError("503 slow down")

    monkeypatch.setattr(MemoryFileSystem, "info", fails)
    with pytest.raises(DataError, match="503 slow down"):
        read(config)


def test_names_that_stay(fifty: list[Pair], empty: MemoryFileSystem) -> None:
    for name, asked in {"a b#?.jpg": "a b#?.jpg", "b/ü.jpg": "./c/../b//ü.jpg"}.items():
        empty.pipe_file(f"{BUCKET}/{name}", fifty[0].image)
        assert (RemotePath(BUCKET) / asked).read_bytes() == fifty[0].image
    web = RemotePath("https://example.com/a/pairs.csv?token=x/y")
    assert (web.name, web.suffix, str(web.parent)) == ("pairs.csv", ".csv", "https://example.com/a")
    for name in ("%2e%2e/b.jpg", "b?c.jpg", "b#c.jpg"):
        below = str(web.parent / name).removeprefix("https://example.com/a/")
        assert not set("?#") & set(below)
        assert "%2e" not in below.lower()
    assert str(RemotePath("s3://bucket").parent) == "s3://bucket"
    assert str(RemotePath("s3://bucket/x.csv").parent.parent) == "s3://bucket"


def test_local_rows_that_name_urls(fifty: list[Pair], tmp_path: Path) -> None:
    moved(written("csv_rows", tmp_path / "local"), tmp_path / "local")
    table = tmp_path / "local" / "pairs.csv"
    url = f"{BUCKET}/images/{fifty[0].name}"
    table.write_text(table.read_text() + f"train,{url},a thing\n")
    bad = BadExamples()
    read(DataConfig(source=str(table), split_column="split"), bad)
    assert list(bad.reasons.values()) == ["no such file"]


def test_images_that_are_missing_or_too_large(
    fifty: list[Pair], tmp_path: Path, empty: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = read(moved(written("csv_rows", tmp_path / "local"), tmp_path / "local"))["train"]
    empty.rm_file(f"{BUCKET}/images/{fifty[0].name}")
    with pytest.raises(BadImage, match="no such file"):
        train[0]
    empty.pipe_file(f"{BUCKET}/images/{fifty[0].name}", b"")
    assert train[0].image == b""
    monkeypatch.setattr(pairs_module, "MAX_BYTES", len(fifty[1].image) - 1)
    with pytest.raises(BadImage, match="over .* bytes"):
        train[1]


def test_errors_that_pass_and_errors_that_stay(
    fifty: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = read(moved(written("csv_rows", tmp_path / "local"), tmp_path / "local"))["train"]
    failures: list[Exception] = [OSError("reset"), ConnectionError("again")]
    cat_file = MemoryFileSystem.cat_file

    def often(self: MemoryFileSystem, *arguments: Any, **options: Any) -> bytes:
        if failures:
            raise failures.pop()
        return cat_file(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", often)
    assert train[0].image == fifty[0].image
    failures[:] = [OSError("reset")] * 3
    with pytest.raises(BadImage, match=f"cannot be read: {BUCKET}/images/.*: reset"):
        train[0]
    failures[:] = [PermissionError("Forbidden")]  # asked once: the next answer would be good
    with pytest.raises(BadImage, match=r"access refused \(Forbidden\): credentials"):
        train[0]


def test_sources_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    for source, message in {
        "s3://bucket/pairs.csv": r"s3://bucket/pairs.csv: .* pip install 'clip_lite_jax\[s3\]'",
        "nothing://x/pairs.csv": "no protocol 'nothing'; there are gcs, gs, http",
        "file:///data/pairs.csv": "goes by its path: /data/pairs.csv",
        f"{BUCKET}/gone.csv": f"data.source='{BUCKET}/gone.csv': No such file",
        f"{BUCKET}/gone.json": f"No such file: '{BUCKET}/gone.json'",
        f"{BUCKET}/gone.token": f"No such file: '{BUCKET}/gone.token'",
        f"{BUCKET}/gone": "nor a folder, nor a file that ends in",
    }.items():
        with pytest.raises(DataError, match=message):
            read(DataConfig(source=source))


def test_credentials_that_are_refused(empty: MemoryFileSystem, monkeypatch: Any) -> None:
    class NoCredentialsError(Exception):
        """As botocore has it."""

    def info(*_: Any, **__: Any) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    for source in ("pairs.csv", "x.tar", "folder"):
        with pytest.raises(DataError, match=f"{BUCKET}/{source}: access refused"):
            read(DataConfig(source=f"{BUCKET}/{source}"))


def test_an_object_is_fetched_once_and_again_when_it_changes(
    tmp_path: Path, empty: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moved(written("csv_rows", tmp_path / "local"), tmp_path / "local")
    fetched: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counted(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> None:
        fetched.append(path)
        get_file(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    first = everything(config)
    assert everything(config) == first
    assert fetched == ["/bucket/data/pairs.csv"]
    table = (tmp_path / "local" / "pairs.csv").read_text().replace("no 0", "no X")
    empty.pipe_file(config.source, table.encode())
    assert first != everything(config)
    assert len(fetched) == 2
    bad = BadExamples()
    empty.pipe_file(config.source, (table + "train,../x.jpg,a thing\n").encode())
    read(config, bad)
    assert list(bad.reasons) == ["pairs.csv:102: ../x.jpg"]


def test_a_download_cut_short_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moved(written("csv_rows", tmp_path / "local"), tmp_path / "local")

    def short(self: MemoryFileSystem, path: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(self.cat_file(path)[:100])

    def broken(self: MemoryFileSystem, path: str, target: str, **_: Any) -> None:
        short(self, path, target)
        raise OSError("connection reset")

    for fault, message in ((short, "100 of .* bytes came"), (broken, "connection reset")):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "get_file", fault)
            with pytest.raises(DataError, match=message):
                read(config)
        assert not list((tmp_path / "cache" / "remote").iterdir())
    assert len(read(config)["train"]) == 30


def test_files_come_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = moved(written("parquet_bytes", tmp_path / "local"), tmp_path / "local")
    all_of_them = threading.Barrier(6)
    get_file = MemoryFileSystem.get_file

    def together(self: MemoryFileSystem, *arguments: Any, **options: Any) -> None:
        all_of_them.wait(30)
        get_file(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", together)
    assert len(read(config)["train"]) == 30


def test_a_large_download_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = moved(written("csv_rows", tmp_path / "local"), tmp_path / "local")
    monkeypatch.setattr(remote, "SHOWN_BYTES", 0)
    read(config)
    assert "pairs.csv: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.json", "a.json is not JSON"),
        ("a.csv", "a.csv: no column 'image'"),
        ("a.jsonl", "no column 'image'"),
        ("a.token", "none of its first images"),
        ("a.parquet", "is no Parquet file"),
        ("a.arrayrecord", "not a complete ArrayRecord file"),
        ("a.tar", "no usable row"),
    ],
)
def test_messages_name_the_url(
    name: str, message: str, tmp_path: Path, empty: MemoryFileSystem
) -> None:
    empty.pipe_file(f"{BUCKET}/{name}", b"x" * 600)
    with pytest.raises(DataError, match=message) as caught:
        read(DataConfig(source=f"{BUCKET}/{name}"))
    assert f"{BUCKET}/{name}" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("format", ["records", "tfds"])
def test_a_conversion_to_a_bucket_is_the_local_one(format: str, tmp_path: Path) -> None:
    local = written("csv_rows", tmp_path / "local")
    config = moved(local, tmp_path / "local")
    expected = convert(conversion_of(local, tmp_path / "out", format=format, per_shard=7), 1)
    url = "memory://bucket/out"
    manifest = convert(conversion_of(config, url, format=format, per_shard=7), processes=1)
    assert manifest == expected
    there = {path.name: path.read_bytes() for path in RemotePath(url).iterdir()}
    assert there.pop("skipped.jsonl") == b""
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if format == "records":
        assert everything(DataConfig(source=url)) == everything(local)


def test_a_conversion_to_a_bucket_goes_on_where_it_was(
    tmp_path: Path, empty: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = written("csv_rows", tmp_path / "local")
    (tmp_path / "local" / "images" / fifty_pairs()[1].name).write_bytes(b"nonsense")
    conversion = conversion_of(local, "memory://bucket/out", per_shard=10)
    put_file, sent = MemoryFileSystem.put_file, []

    def killed(self: MemoryFileSystem, file: str, path: str, **options: Any) -> None:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(path)
        put_file(self, file, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(conversion, processes=1)
    jobs, _ = data_convert.plan(conversion)
    assert data_convert.unfinished(jobs) == jobs[2:]
    empty.rm_file(str(jobs[1].note))  # killed between the shard and its note
    assert data_convert.unfinished(jobs) == jobs[1:]
    manifest = convert(conversion, processes=1)
    assert manifest["splits"]["train"]["shards"] == [9, 10, 10]
    assert manifest["skipped"] == 1
    assert b"cannot be decoded" in empty.cat_file("memory://bucket/out/skipped.jsonl")
    assert len(read(DataConfig(source="memory://bucket/out"))["train"]) == 29
    with pytest.raises(data_convert.ConfigError, match="memory://bucket/out holds another"):
        convert(replace(conversion, per_shard=11), processes=1)
    put(tmp_path / "local")
    with pytest.raises(data_convert.ConfigError, match=f"{BUCKET} is not empty"):
        convert(conversion_of(local, BUCKET), processes=1)


def test_a_clean_table_of_remote_images(
    fifty: list[Pair], empty: MemoryFileSystem, tmp_path: Path
) -> None:
    for name, rows in (("train", "ab"), ("test", "a")):
        lines = ["image,caption,split", *(f"{row}.jpg,a picture,{name}" for row in rows)]
        lines += ["z.jpg,a picture,train"] if name == "test" else []
        empty.pipe_file(f"{BUCKET}/{name}.csv", "\n".join(lines).encode())
    ours, theirs = (
        read(DataConfig(source=f"{BUCKET}/{name}.csv", split_column="split"))
        for name in ("train", "test")
    )
    said = data_splits.write_clean(tmp_path / "clean.jsonl", ours, theirs)
    assert said.startswith("1 of 2")
    assert said.endswith(f"--config.data.image_folder={BUCKET}")
    clean = (tmp_path / "clean.jsonl").read_text()
    assert "b.jpg" in clean
    assert "a.jpg" not in clean


SHARED = """
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

class Shared(DirFileSystem):
    protocol = "shared"

    def __init__(self, **options):
        super().__init__({root!r}, LocalFileSystem(auto_mkdir=True), **options)
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that other processes know, too, as fsspec finds those of packages."""
    package = tmp_path / "package"
    (package / "shared-1.dist-info").mkdir(parents=True)
    (package / "shared_system.py").write_text(SHARED.format(root=str(tmp_path / "shared")))
    points = "[fsspec.specs]\nshared = shared_system:Shared\n"
    (package / "shared-1.dist-info" / "entry_points.txt").write_text(points)
    (package / "shared-1.dist-info" / "METADATA").write_text("Name: shared\nVersion: 1\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), os.getcwd()]))
    return "shared://bucket"


def test_the_command_by_processes(shared: str, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    local = written("csv_rows", tmp_path / "shared" / "bucket")
    command = [sys.executable, "-m", "clip_lite_jax.cli", "data", "convert"]
    command += [f"{shared}/pairs.csv", f"{shared}/out", "--per-shard=5", "--processes=2"]
    command += ["--config.data.split_column=split"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"written: {shared}/out" in done.stdout
    assert everything(DataConfig(source=str(tmp_path / "shared/bucket/out"))) == everything(local)
    assert len(list((tmp_path / "cache" / "remote").iterdir())) == 1  # the table, once for all


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "convert", f"{BUCKET}/gone.csv", str(tmp_path / "out")]) == 2
    assert f"'{BUCKET}/gone.csv': No such file" in capsys.readouterr().err
    assert main(["data", "convert", f"{BUCKET}/gone.csv", "file:///out"]) == 2
    assert "goes by its path: /out" in capsys.readouterr().err


def test_places() -> None:
    assert place("a/b.csv") == Path("a/b.csv")
    assert place(f"{BUCKET}/b.csv") == RemotePath(f"{BUCKET}/b.csv")
    assert not is_remote("tfds:coco_captions")
    assert not is_remote("a/b://c")
