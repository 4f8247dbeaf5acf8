"""``clip-lite data convert``: every example once, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from fifty import FORMATS, UNSPLIT, everything, fifty_pairs, written

from clip_lite_jax.apps import data_convert
from clip_lite_jax.apps.data_convert import Conversion, conversion_of, convert
from clip_lite_jax.cli import main
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened, decode
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    return written("csv_rows", tmp_path / "source")


@pytest.mark.parametrize("name", FORMATS)
def test_every_source_becomes_records(name: str, tmp_path: Path) -> None:
    config = written(name, tmp_path / "source")
    manifest = convert(conversion_of(config, tmp_path / "out", per_shard=7), processes=1)
    assert everything(DataConfig(source=str(tmp_path / "out"))) == everything(config)
    assert sum(split["examples"] for split in manifest["splits"].values()) == 50
    if name not in UNSPLIT:
        assert manifest["splits"]["train"]["shards"] == [7, 7, 7, 7, 2]
    assert manifest["skipped"] == 0


def test_a_data_set_that_tfds_reads(source: DataConfig, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    out = tmp_path / "out"
    convert(conversion_of(source, out, per_shard=20, format="tfds", name="fifty"), processes=1)
    assert (out / "fifty-train.array_record-00001-of-00002").is_file()
    builder = tfds.builder_from_directory(out)
    assert builder.info.name == "fifty"
    assert {name: s.num_examples for name, s in builder.info.splits.items()} == {
        "train": 30,
        "validation": 10,
        "test": 10,
    }
    data = builder.as_data_source("train")
    pair = fifty_pairs()[0]
    assert data[0]["id"] == f"images/{pair.name}".encode()
    assert [text.decode() for text in data[0]["captions"]] == list(pair.captions)
    np.testing.assert_array_equal(data[0]["image"], np.asarray(decode(pair.image)))
    ours = DataConfig(source=str(out), caption_columns=("captions",), group_column="group")
    again = everything(ours)
    for split, expected in everything(source).items():
        assert [row[1:] for row in again[split]] == [row[1:] for row in expected]


def test_larger_pictures_become_smaller(source: DataConfig, tmp_path: Path) -> None:
    convert(conversion_of(source, tmp_path / "out", resize=40), processes=1)
    found = everything(DataConfig(source=str(tmp_path / "out")))
    for split, rows in everything(source).items():
        for (*_, old), (*_, new) in zip(rows, found[split], strict=True):
            side = min(Opened(old).size)
            assert min(Opened(new).size) == min(side, 40)
            assert (new == old) == (side <= 40)
            before, after = (decode(data).resize((8, 8)) for data in (old, new))
            difference = np.asarray(before, int) - np.asarray(after, int)
            assert np.abs(difference).mean() < 8


def test_pictures_of_one_name_in_two_tables(tmp_path: Path) -> None:
    for split, colour in (("train", "red"), ("test", "blue")):
        (tmp_path / split).mkdir()
        draw("circle", colour).save(tmp_path / split / "1.png")
        draw("square", colour).save(tmp_path / split / f"{split}.png")
        table = f"image,caption\n1.png,a {colour} circle\n{split}.png,a square\n"
        (tmp_path / split / "pairs.csv").write_text(table)
    both = DataConfig(
        source=str(tmp_path / "train/pairs.csv"), splits={"test": str(tmp_path / "test/pairs.csv")}
    )
    convert(conversion_of(both, tmp_path / "out"), processes=1)
    found = build_sources(DataConfig(source=str(tmp_path / "out")), BadExamples())
    ids = {
        split: [source.metadata(n).id for n in range(len(source))]
        for split, source in found.items()
    }
    assert ids == {"train": ["train/1.png", "train.png"], "test": ["test/1.png", "test.png"]}
    assert found["test"].metadata(0).captions == ("a blue circle",)


def test_what_cannot_be_used_is_left_out_and_listed(source: DataConfig, tmp_path: Path) -> None:
    images = tmp_path / "source" / "images"
    names = [pair.name for pair in fifty_pairs()]
    (images / names[0]).write_bytes(b"nonsense")
    (images / names[1]).write_bytes((images / names[1]).read_bytes()[:200])
    (images / names[2]).unlink()
    manifest = convert(conversion_of(source, tmp_path / "out"), processes=1)
    assert manifest["splits"]["train"]["examples"] == 27
    assert manifest["skipped"] == 4  # the row of a missing file has two captions, so two lines
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert sum("no such file" in reason for reason in reasons) == 2
    assert sum("cannot be decoded" in reason for reason in reasons) == 2
    manifest = convert(conversion_of(source, tmp_path / "unchecked", check=False), processes=1)
    assert manifest["splits"]["train"]["examples"] == 29


def test_it_goes_on_where_it_was(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = conversion_of(source, tmp_path / "out", per_shard=10)
    jobs, _ = data_convert.plan(conversion)
    for job in jobs[:3]:
        data_convert.convert_shard(job)
    jobs[1].note.unlink()  # killed between the shard and its note
    before = jobs[0].path.stat().st_mtime_ns
    done = []
    run = data_convert.convert_shard
    monkeypatch.setattr(data_convert, "convert_shard", lambda job: done.append(job) or run(job))
    manifest = convert(conversion, processes=1)
    assert done == [jobs[1], *jobs[3:]]
    assert jobs[0].path.stat().st_mtime_ns == before
    assert everything(DataConfig(source=str(tmp_path / "out"))) == everything(source)
    assert convert(conversion, processes=1) == manifest
    with pytest.raises(ConfigError, match="another conversion .*per_shard: 10 there, 11 now"):
        convert(conversion_of(source, tmp_path / "out", per_shard=11), processes=1)
    with pytest.raises(ConfigError, match=r"is not empty \(pairs.csv|images\)"):
        convert(conversion_of(source, tmp_path / "source"), processes=1)
    with pytest.raises(ConfigError, match="--format zip: choose from records, tfds"):
        convert(conversion_of(source, tmp_path / "new", format="zip"), processes=1)


def test_a_folder_with_missing_shards_is_refused(source: DataConfig, tmp_path: Path) -> None:
    convert(conversion_of(source, tmp_path / "out", per_shard=10), processes=1)
    (tmp_path / "out" / "train-00001-of-00003.arrayrecord").unlink()
    with pytest.raises(DataError, match=r"2 of 3 shards train-\* are there; number 1 is missing"):
        everything(DataConfig(source=str(tmp_path / "out")))


def test_the_command_in_processes_killed_and_run_again(source: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "clip_lite_jax.cli",
        "data",
        "convert",
        source.source,
        str(out),
    ]
    command += ["--per-shard", "1", "--processes", "2", "--config.data.split_column=split"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(out.glob("*.arrayrecord"))) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_the_end_of(process.pid)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "train                          30       30" in done.stdout
    assert everything(DataConfig(source=str(out))) == everything(source)
    assert not list(out.glob("*.tmp"))


def wait_for_the_end_of(group: int, seconds: float = 60) -> None:
    """Waits until no process of a group is left: the workers of one that was killed end, too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("processes outlive the one that started them")


def test_fields_of_the_command(
    source: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "convert", source.source, str(tmp_path / "out")]
    assert main([*command, "--config.optim.name=sgd"]) == 2
    assert "only fields of data count here" in capsys.readouterr().err
    assert main([*command, '--config.data.caption_columns=["text"]']) == 2
    assert "no column 'text'" in capsys.readouterr().err
    assert isinstance(conversion_of(source, tmp_path), Conversion)


def test_beam_that_is_not_installed(source: DataConfig, tmp_path: Path) -> None:
    command = ["data", "convert", source.source, str(tmp_path / "out"), "--beam="]
    assert main(command) == 2


def test_a_finished_conversion_says_that_it_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conversion = conversion_of(written("csv_rows", tmp_path / "source"), tmp_path / "out")
    first = convert(conversion, 1)
    assert "was finished before" not in caplog.text
    assert convert(conversion, 1) == first
    assert "was finished before, and stays as it is" in caplog.text
