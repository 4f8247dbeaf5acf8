"""Coverage-guided fuzzing of the readers of strangers' files, with atheris (libFuzzer).

    python tests/long/fuzz_readers.py TARGET [options of libFuzzer] [folders of more inputs]
    python tests/long/fuzz_readers.py TARGET FILE    # reads one input again

It stops at the first input that makes a reader raise anything but `DataError` and `BadImage`, take
20 seconds or 2 GB, and leaves it in ``crash-...``, ``timeout-...`` or ``oom-...``.
"""

import contextlib
import gzip
import io
import os

import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

LIMITS = ("-rss_limit_mb=2048", "-timeout=20", "-max_len=65536")
INSTRUMENTED = ("clip_lite_jax", "csv", "gzip", "json", "PIL", "tarfile", "xml")
"""Packages of pure Python that parse; of the first one its data modules alone."""

Bytes = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
      read: reads bytes as such a file.
      seeds: good ones.
      plain, whole: from a file to what is worth changing in it, and back.  Random changes get no
        further than a wrong checksum; most are made in what `plain` gives, and `whole` puts it
        into a file whose checksums are right.
    """

    read: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    plain: Bytes | None = None
    whole: Bytes | None = None


def targets(folder: Path, good: Any) -> dict[str, Target]:
    """All kinds, read from files in `folder`; `good` is the module `good_files`."""
    import hostile

    from clip_lite_jax.data.records import write_raw_records

    pictures = folder / "pictures"
    idx, voc = folder / "idx", folder / "voc"
    for path in (pictures, idx, voc):
        path.mkdir()
    good.write_images(pictures)
    good.write_idx(idx)
    good.write_voc(voc)

    def file(name: str, **fields: object) -> Callable[[bytes], None]:
        path = pictures / name

        def read(data: bytes) -> None:
            path.write_bytes(data)
            good.read(path, **fields)

        return read

    def set_with(path: Path, source: Path, format: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            path.write_bytes(data)
            good.read(source, format=format)

        return read

    def record(data: bytes) -> None:
        path = pictures / "one.arrayrecord"
        write_raw_records(path, [data])
        good.read(path)

    split, near = {"split_column": "split"}, {"image_folder": str(pictures)}
    images = (*hostile.usable().values(), *(data for data, _ in hostile.refused().values()))
    packed = idx / "train-images-idx3-ubyte.gz"
    return {
        "csv": Target(file("pairs.csv", **split), (good.csv(),)),
        "jsonl": Target(file("pairs.jsonl", **split), (good.json_lines(),)),
        "coco": Target(file("captions_train.json", **near), (good.coco(), good.karpathy())),
        "inaturalist": Target(
            file("train2018.json", format="inaturalist", **near), (good.inaturalist(),)
        ),
        "flickr": Target(file("results.token"), (good.flickr(),)),
        "tar": Target(
            file("shard.tar"), (good.shard(), good.gnu_shard()), lambda data: data, with_sums
        ),
        "parquet": Target(file("pairs.parquet"), (good.parquet(), good.parquet_of_paths())),
        "records": Target(file("pairs.arrayrecord"), (good.records(),)),
        "record": Target(record, tuple(map(good.encode_record, good.examples()))),
        "idx": Target(
            set_with(packed, idx, "idx"),
            (packed.read_bytes(),),
            lambda data: gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_PLAIN),
            partial(gzip.compress, mtime=0),
        ),
        "voc": Target(set_with(voc / "Annotations" / "a.xml", voc, "voc"), (good.voc(),)),
        "image": Target(
            good.read_image,
            tuple(data for data in images if len(data) <= MAX_SEED),
            lambda data: data,
            with_crcs,
        ),
    }


TARGETS = (
    *("csv", "jsonl", "coco", "inaturalist", "flickr", "tar", "parquet", "records", "record"),
    *("idx", "voc", "image"),
)
MAX_SEED = 8192
MAX_PLAIN = 65_536


def with_sums(data: bytes) -> bytes:
    """A tar file whose headers have the checksums of their content."""
    content = bytearray(data)
    for start in range(0, len(content) - 511, 512):
        if content[start + 257 : start + 262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            total = sum(content[start : start + 512])
            content[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(content)


def with_crcs(data: bytes) -> bytes:
    """A PNG file whose chunks have the checksums of their content; any other as it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    content, start = bytearray(data), 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[start + 4 : end]))
        start = end + 4
    return bytes(content)


def fuzz(name: str, options: list[str], folder: Path) -> None:
    """Never returns."""
    import atheris

    # Loaded before the rest asks for them, or they come without instruments.
    with atheris.instrument_imports(include=INSTRUMENTED[1:]):
        import csv, gzip, json, tarfile, xml.etree.ElementTree  # noqa: E401, F401

    import clip_lite_jax.config
    import clip_lite_jax.files  # noqa: F401

    with atheris.instrument_imports(include=INSTRUMENTED):
        import good_files
    target = targets(folder, good_files)[name]

    index = Path(os.environ["CLIP_LITE_CACHE"], "index")

    def one_input(data: bytes) -> None:
        target.read(data)
        # A file of the same size may be written within the same tick of the clock.
        shutil.rmtree(index, ignore_errors=True)

    def changed(data: bytes, size: int, seed: int) -> bytes:
        if target.plain and target.whole and seed % 4:
            with contextlib.suppress(OSError, EOFError, zlib.error):
                new = target.whole(atheris.Mutate(target.plain(data), MAX_PLAIN))
                if len(new) <= size:
                    return new
        return atheris.Mutate(data, size)

    arguments = [sys.argv[0], *LIMITS, *options]
    if not any(os.path.isfile(option) for option in options):
        seeds, found = folder / "seeds", folder / "found"
        seeds.mkdir()
        found.mkdir()
        for number, data in enumerate(target.seeds):
            (seeds / f"{number:03}").write_bytes(data)
        # What is new goes into the first of the folders.
        own = any(os.path.isdir(option) for option in options)
        arguments += [str(path) for path in ([seeds] if own else [found, seeds])]
    mutator = {"custom_mutator": changed} if target.plain else {}
    atheris.Setup(arguments, one_input, **mutator)
    atheris.Fuzz()


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        print(f"{__doc__}\nThe targets: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz_", dir=memory) as folder:
        # libFuzzer ends its process without a chance to tidy up.
        child = os.fork()
        if not child:
            os.environ["CLIP_LITE_CACHE"] = os.path.join(folder, "cache")
            fuzz(sys.argv[1], sys.argv[2:], Path(folder))
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
