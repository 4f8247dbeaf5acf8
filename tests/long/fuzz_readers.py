"""Coverage-guided fuzzing of the readers of strangers' files, with atheris (libFuzzer).

    python tests/long/fuzz_readers.py TARGET [options of libFuzzer] [folders of more inputs]
    python tests/long/fuzz_readers.py TARGET FILE    # reads one input again

It stops at the first input that makes a reader raise anything but `DataError` and `BadImage`, take
20 seconds or 2 GB, and leaves it in ``crash-...``, ``timeout-...`` or ``oom-...``.
"""

import contextlib
import copy
import gzip
import importlib
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

LIMITS = ("-rss_limit_mb=2048", "-timeout=20")
INSTRUMENTED = ("clip_lite_jax", "csv", "gzip", "json", "PIL", "tarfile", "xml")
"""Packages of pure Python that parse; of the first one its data modules alone."""

TARGETS = {
    "csv": 50_000,
    "jsonl": 15_000,
    "coco": 160_000,
    "inaturalist": 100_000,
    "flickr": 45_000,
    "refcoco": 20_000,
    "tar": 12_000,
    "parquet": 60_000,
    "records": 30_000,
    "record": 20_000,
    "idx": 60_000,
    "voc": 110_000,
    "image": 15_000,
}
"""Each with as many inputs as one core reads in some 20 seconds."""

Mutate = Callable[[bytes], bytes]
"""libFuzzer's random changes."""


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
      read: reads bytes as such a file.
      seeds: good ones.
      change: random changes that go deeper than those of any bytes, which get no further than a
        checksum or the grammar; may raise where the file is damaged already.  The last argument is
        a random number.
      max_len: of the bytes.
    """

    read: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    change: Callable[[bytes, Mutate, int], bytes] | None = None
    max_len: int = 65_536


def targets(folder: Path, good: Any) -> dict[str, Target]:
    """All kinds, read from files in `folder`; `good` is the module `good_files`."""
    import hostile

    from clip_lite_jax.data.records import encode_record, write_raw_records

    pictures = folder / "pictures"
    idx, voc = folder / "idx", folder / "voc"
    for path in (pictures, idx, voc):
        path.mkdir()
    good.write_images(pictures)
    references = folder / "references"
    references.mkdir()
    (references / "instances.json").write_bytes(good.refcoco()["instances.json"])
    good.write_idx(idx)
    good.write_voc(voc)

    def file(path: Path, source: Path | None = None, **fields: object) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            path.write_bytes(data)
            good.read(source or path, **fields)

        return read

    def record(data: bytes) -> None:
        path = pictures / "one.arrayrecord"
        write_raw_records(path, [data])
        good.read(path)

    split, near = {"split_column": "split"}, {"image_folder": str(pictures)}
    images = (*hostile.usable().values(), *(data for data, _ in hostile.refused().values()))
    packed = idx / "train-images-idx3-ubyte.gz"
    return {
        "csv": Target(file(pictures / "pairs.csv", **split), (good.csv(),)),
        "jsonl": Target(
            file(pictures / "pairs.jsonl", **split), (good.json_lines(),), change_json_lines
        ),
        "coco": Target(
            file(pictures / "captions_train.json", **near),
            (good.coco(), good.karpathy()),
            change_json,
        ),
        "inaturalist": Target(
            file(pictures / "train2018.json", format="inaturalist", **near),
            (good.inaturalist(),),
            change_json,
        ),
        "flickr": Target(file(pictures / "results.token"), (good.flickr(),)),
        "refcoco": Target(
            file(references / "refs(unc).p", **near), (good.refcoco()["refs(unc).p"],)
        ),
        "tar": Target(file(pictures / "shard.tar"), (good.shard(), good.gnu_shard()), change_tar),
        "parquet": Target(
            file(pictures / "pairs.parquet"), (good.parquet(), good.parquet_of_paths())
        ),
        "records": Target(
            file(pictures / "pairs.arrayrecord"),
            (good.records(),),
            change_records,
            len(good.records()),
        ),
        "record": Target(record, tuple(map(encode_record, good.examples()))),
        "idx": Target(file(packed, idx, format="idx"), (packed.read_bytes(),), change_gzip),
        "voc": Target(file(voc / "Annotations" / "a.xml", voc, format="voc"), (good.voc(),)),
        "image": Target(
            good.read_image,
            tuple(data for data in images if len(data) <= MAX_SEED),
            change_png,
        ),
    }


MAX_SEED = 8192


def change_tar(data: bytes, mutate: Mutate, number: int) -> bytes:
    """Headers with the checksums of their content."""
    del number
    content = bytearray(mutate(data))
    for start in range(0, len(content) - 511, 512):
        if content[start + 257 : start + 262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            total = sum(content[start : start + 512])
            content[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(content)


def change_png(data: bytes, mutate: Mutate, number: int) -> bytes:
    """Chunks of PNG with the checksums of their content."""
    del number
    content, start = bytearray(mutate(data)), 8
    while content.startswith(b"\x89PNG\r\n\x1a\n") and start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[start + 4 : end]))
        start = end + 4
    return bytes(content)


def change_gzip(data: bytes, mutate: Mutate, number: int) -> bytes:
    del number
    return gzip.compress(mutate(gzip.GzipFile(fileobj=io.BytesIO(data)).read(2**16)), mtime=0)


def change_records(data: bytes, mutate: Mutate, number: int) -> bytes:
    """Where an ArrayRecord file is not filled with zeros: at its start and that of the last block.

    Its checksums are none that are quickly made.
    """
    start = (0, 65_536)[number % 2]
    size = (8192, 256)[number % 2]
    new = mutate(data[start : start + size])[:size]
    return data[:start] + new + data[start + len(new) :]


def change_json_lines(data: bytes, mutate: Mutate, number: int) -> bytes:
    lines = data.splitlines()
    place = number // 7 % len(lines)
    lines[place] = change_json(lines[place], mutate, number)
    return b"\n".join(lines)


def change_json(data: bytes, mutate: Mutate, number: int) -> bytes:
    """Other values or keys, of any type."""
    content = json.loads(data)
    rng = random.Random(number)
    parts = list(_parts(content))
    for _ in range(rng.randint(1, 3)):
        if not parts:
            break
        owner, key = rng.choice(parts)
        kind = rng.randrange(4)
        if kind == 0 and isinstance(owner, dict):
            owner[rng.choice(KEYS)] = owner.get(key)
        elif kind == 1 and isinstance(owner, dict):
            owner.pop(key, None)
        elif kind == 2 and isinstance(owner[key], str):
            owner[key] = mutate(owner[key].encode(errors="replace")).decode(
                errors="surrogateescape"
            )
        else:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(content).encode()


VALUES = (None, True, 0, -1, 2**70, 1e308, float("nan"), "", "é", "\ud800", [], [[]], {}, {"": []})
KEYS = ("image", "caption", "id", "name", "file_name", "filepath", "categories", "annotations", "")


def _parts(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and object of JSON with every key of its."""
    if isinstance(content, (list, dict)):
        for key in range(len(content)) if isinstance(content, list) else content:
            yield content, key
            yield from _parts(content[key])


def fuzz(kind: str, options: list[str], folder: Path) -> None:
    """Never returns."""
    import atheris

    # Loaded before the rest asks for them, or they come without instruments.
    with atheris.instrument_imports(include=INSTRUMENTED[1:]):
        for module in (gzip, json.decoder, json):
            importlib.reload(module)
        for name in INSTRUMENTED[1:]:
            importlib.import_module(name)
        importlib.import_module("PIL.Image").init()  # its formats

    import clip_lite_jax.config
    import clip_lite_jax.files  # noqa: F401

    with atheris.instrument_imports(include=INSTRUMENTED):
        import good_files
    target = targets(folder, good_files)[kind]

    index = Path(os.environ["CLIP_LITE_CACHE"], "index")

    def one_input(data: bytes) -> None:
        target.read(data)
        # A file of the same size may be written within the same tick of the clock.
        shutil.rmtree(index, ignore_errors=True)

    def changed(data: bytes, size: int, seed: int) -> bytes:
        if target.change and seed % 4:
            # Damaged files are changed as bytes.
            with contextlib.suppress(Exception):
                new = target.change(data, lambda part: atheris.Mutate(part, size), seed // 4)
                if len(new) <= size:
                    return new
        return atheris.Mutate(data, size)

    arguments = [sys.argv[0], *LIMITS, f"-max_len={target.max_len}", *options]
    if not any(os.path.isfile(option) for option in options):
        seeds, found = folder / "seeds", folder / "found"
        seeds.mkdir()
        found.mkdir()
        for number, data in enumerate(target.seeds):
            (seeds / f"{number:03}").write_bytes(data)
        # What is new goes into the first of the folders.
        own = any(os.path.isdir(option) for option in options)
        arguments += [str(path) for path in ([seeds] if own else [found, seeds])]
    mutator = {"custom_mutator": changed} if target.change else {}
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
