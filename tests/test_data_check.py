"""``clip-lite data check``: everything that was planted in the data is found, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fifty import coco, fifty_pairs, written

from clip_lite_jax.apps import data_check
from clip_lite_jax.apps.data_check import check
from clip_lite_jax.apps.data_check_page import table_of, write_page
from clip_lite_jax.apps.data_check_text import problems, script
from clip_lite_jax.cli import main
from clip_lite_jax.config import DataConfig


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    return replace(written("csv_rows", tmp_path / "source"), vocab_size=100)


def found_in(config: DataConfig, folder: Path) -> dict[str, Any]:
    return check(config, folder, processes=1)[0]


def test_good_data(source: DataConfig, tmp_path: Path) -> None:
    found = found_in(source, tmp_path / "out")
    assert found["warnings"] == []
    train = found["splits"]["train"]
    assert (train["examples"], train["usable"]) == (30, 30)
    assert train["formats"] == {"JPEG": 30}
    assert train["shorter_side"]["0"] == 24
    assert train["shorter_side"]["100"] == 71
    captions = found["captions"]
    assert captions["count"] == captions["looked_at"] == 100
    assert captions["per_image"] == {"2": 50}
    assert captions["scripts"] == {"latin": 1.0}
    assert found["duplicates"] == {"copies": 0, "groups": []}
    assert found["leaks"] == []
    assert found["images_per_second_per_core"] > 10
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == json.loads(
        json.dumps(found)
    )
    assert "nothing to complain about" in table_of(found, cores=2)


def plant(source: DataConfig, tmp_path: Path) -> None:
    """Copies, leaks, broken pictures, odd captions."""
    images = tmp_path / "source" / "images"
    by_split: dict[str, list[str]] = {}
    for pair in fifty_pairs():
        by_split.setdefault(pair.split, []).append(pair.name)
    first = (images / by_split["train"][0]).read_bytes()
    for name in (*by_split["train"][1:4], by_split["test"][0]):
        (images / name).write_bytes(first)
    (images / by_split["val"][0]).write_bytes(first[:100])
    (images / by_split["val"][1]).write_bytes(b"")
    (images / by_split["val"][2]).unlink()
    table = Path(source.source)
    extra = f"train,images/{by_split['train'][5]},"
    captions = ["see https://example.org/a.jpg", "a <b>dog</b> &amp; cat", "cafÃ© \ufffd", "123 4"]
    captions.append("word " * 600)
    captions.append("собака")
    with table.open("a", encoding="utf-8") as file:
        file.writelines(f"{extra}{text}\n" for text in captions)


def test_everything_that_was_planted(source: DataConfig, tmp_path: Path) -> None:
    plant(source, tmp_path)
    found, sources = check(source, tmp_path / "out", processes=1)
    assert found["duplicates"]["copies"] == 3
    (group,) = found["duplicates"]["groups"]
    assert (group["split"], group["count"], len(group["ids"])) == ("train", 4, 4)
    (leak,) = found["leaks"]
    assert (leak["of"], leak["in"], leak["images"]) == ("test", "train", 1)
    assert found["splits"]["validation"] == found["splits"]["validation"] | {
        "examples": 9,
        "usable": 7,
    }
    assert found["bad"]["count"] == 4  # two rows of the missing file
    assert dict(found["bad"]["reasons"]) == {
        "no such file": 2,
        "cannot be decoded": 1,
        "empty file": 1,
    }
    kinds = {problem["what"]: problem["count"] for problem in found["captions"]["problems"]}
    assert kinds == {
        "hold a replacement character: they were decoded wrongly": 1,
        "look like UTF-8 read as Latin-1": 1,
        "hold HTML": 1,
        "hold an address of the web": 1,
        "hold the name of a file": 1,
        "hold no letter": 1,
    }
    assert found["captions"]["scripts"].keys() == {"latin", "cyrillic"}
    text = table_of(found, cores=2)
    for words in (
        "pictures of test that are in train too: 1;",
        "examples that cannot be used: 4 (3.8%)",
        "copies of others, byte for byte: 3;",
    ):
        assert words in text
    page = write_page(found, sources, tmp_path / "out", cores=2).read_text()
    assert "&lt;b&gt;dog&lt;/b&gt;" in page
    assert "<b>dog" not in page
    for heading in ("Pictures in two splits", "Copies", "Cannot be used"):
        assert f"<h2>{heading}</h2>" in page


def test_captions_that_are_cut_off(source: DataConfig, tmp_path: Path) -> None:
    found = found_in(replace(source, max_tokens=3), tmp_path / "out")
    assert found["captions"]["truncated_share"] == 1.0
    (warning,) = found["warnings"]
    assert f"{found['captions']['tokens_99']} would hold 99 %" in warning


def test_a_check_goes_on_where_it_was(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "PIECE", 7)
    looked: list[data_check.Piece] = []
    look = data_check.look

    def fails(piece: data_check.Piece) -> None:
        if len(looked) == 4:
            raise KeyboardInterrupt
        looked.append(piece)
        look(piece)

    monkeypatch.setattr(data_check, "look", fails)
    with pytest.raises(KeyboardInterrupt):
        found_in(source, tmp_path / "out")
    monkeypatch.setattr(data_check, "look", lambda piece: looked.append(piece) or look(piece))
    found = found_in(source, tmp_path / "out")
    assert len(looked) == len(set(looked)) == 5 + 2 + 2
    fresh = found_in(source, tmp_path / "other")
    for key in ("splits", "captions", "duplicates", "leaks", "warnings"):
        assert found[key] == fresh[key]


def test_the_command_in_processes(
    source: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["data", "check", source.source, "--out", out, "--processes", "2"]
    assert main([*command, "--config.data.split_column=split"]) == 0
    said = capsys.readouterr().out
    assert f"written: {out}/check.html" in said
    assert "validation                     10           10" in said


def test_problems_of_texts() -> None:
    good = [
        "It's 5 o'clock",
        "naïve café",
        "a < b & c",
        "日本語",
        "Ünïcode",
        "x.y",
        "Âme",
        "Ã la carte",
    ]
    assert problems(good) == []
    assert [script(text) for text in ("日本", "ab", "Ж", "12", "")] == [
        "cjk",
        "latin",
        "cyrillic",
        "",
        "",
    ]


def test_a_source_that_only_validates(tmp_path: Path) -> None:
    config = replace(coco(tmp_path, fifty_pairs())["val"], vocab_size=100)
    found = found_in(config, tmp_path / "out")
    assert {split: known["usable"] for split, known in found["splits"].items()} == {
        "validation": 20
    }


def test_files_that_changed_are_looked_at_again(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "PIECE", 5)
    images = tmp_path / "source" / "images"
    train = [pair.name for pair in fifty_pairs() if pair.split == "train"]
    (images / train[0]).write_bytes(b"broken")
    assert found_in(source, tmp_path / "out")["bad"]["count"] == 1
    good = images / train[1]
    (images / train[0]).write_bytes(good.read_bytes())
    looked: list[data_check.Piece] = []
    look = data_check.look
    monkeypatch.setattr(data_check, "look", lambda piece: looked.append(piece) or look(piece))
    assert found_in(source, tmp_path / "out")["bad"]["count"] == 0
    assert len(looked) == 1
    good.write_bytes(b"broken now")
    assert found_in(source, tmp_path / "out")["bad"]["count"] == 1


def test_the_share_is_that_of_a_run(tmp_path: Path) -> None:
    """Of all rows, those whose picture is missing too."""
    table = written("csv_rows", tmp_path / "source")
    for pair in fifty_pairs()[:12]:
        (tmp_path / "source" / "images" / pair.name).unlink()
    found = found_in(replace(table, vocab_size=100), tmp_path / "out")
    assert found["bad"] | {"count": 24, "of": 100} == found["bad"]
    assert any("24 (24.0%); over data.max_bad_share=0.2" in said for said in found["warnings"])


def test_a_mixture_needs_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "mixture"]) == 2
    assert "mixture: name its parts" in capsys.readouterr().err
