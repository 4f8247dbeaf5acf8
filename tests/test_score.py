"""``clip-lite score``: numbers against loops, planted faults, and the source that is left."""

import json
import shlex
import shutil
import tracemalloc
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import draw, tiny_config
from scored import COPIES, EVIL, write_faulty

from clip_lite_jax import load
from clip_lite_jax.apps import score_calibration, score_find, score_pieces
from clip_lite_jax.apps.data_decisions import (
    Decision,
    is_a_table_of_files,
    make_decisions,
    read_decisions,
    unread_in,
    write_decisions,
)
from clip_lite_jax.apps.score import (
    SCORES_FILE,
    Found,
    Settings,
    describe,
    score,
    summary,
)
from clip_lite_jax.apps.score_calibration import own_calibration, why_not_log_r
from clip_lite_jax.apps.score_drops import dropped_below, dropped_share
from clip_lite_jax.apps.score_find import near_groups, swaps, wrong_share
from clip_lite_jax.apps.score_page import write_page
from clip_lite_jax.cli import main
from clip_lite_jax.commands.arguments import data_config
from clip_lite_jax.config import (
    CriticConfig,
    DataConfig,
    NegativesConfig,
    ObjectiveConfig,
    PartConfig,
)
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.pairs import FileImages
from clip_lite_jax.data.sources import build_sources, fingerprint
from clip_lite_jax.errors import ConfigError, DataError, Unreadable
from clip_lite_jax.evaluators.calibration import (
    Calibration,
    CalibrationOptions,
    CalibrationTask,
    quality,
    trials_of,
)
from clip_lite_jax.evaluators.tasks import TaskData
from clip_lite_jax.inference import DualEncoderModel


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return load(finished_run)


@pytest.fixture(scope="module")
def source(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(source=str(write_faulty(pairs, tmp_path_factory.mktemp("faulty"))))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored")


@pytest.fixture(scope="module")
def found(model: DualEncoderModel, source: DataConfig, out: Path, pairs: Path) -> Found:
    """Scored, and calibrated on the pairs without faults."""
    calibrate = DataConfig(source=str(pairs), held_out=0.3)
    return score(model, source, out, Settings(calibrate=calibrate, near=None))


def test_the_table_is_what_the_critic_says(
    found: Found, model: DualEncoderModel, source: DataConfig, out: Path
) -> None:
    rows = pq.read_table(out / SCORES_FILE).to_pylist()
    assert len(rows) == 55
    folder = Path(source.source).parent
    # Of the torn picture there is a caption to compare with all the same.
    captions = [row["caption"] for row in rows] + ["a torn picture"]
    images = model.project_image([folder / row["id"] for row in rows])
    matrix = np.asarray(model.fns.matrix(images, model.project_text(captions)))
    assert found.fitted is not None
    for i, row in enumerate(rows):
        assert row["caption_index"] == 0
        assert row["score"] == pytest.approx(matrix[i, i], abs=1e-4)
        # All captions are in the sample: it may hold more than there are.
        others = [matrix[i, j] for j in range(56) if captions[j] != captions[i]]
        assert row["ranked_among"] == len(others)
        at_least = [1 + sum(x >= matrix[i, i] + shift for x in others) for shift in (1e-4, -1e-4)]
        assert at_least[0] <= row["rank"] <= at_least[1]
        assert row["wrong_suspect"] == ((row["rank"] - 1) / len(others) > 0.2)
        contrast = matrix[i, i] - np.log(np.mean(np.exp(others)))
        assert row["contrast"] == pytest.approx(contrast, abs=1e-4)
        probability = found.fitted.calibration.probability(matrix[i, i])
        assert row["probability"] == pytest.approx(probability, abs=1e-4)
    assert {row["split"] for row in rows} == set(found.splits)


def test_faults_that_were_planted(found: Found, out: Path) -> None:
    assert found.repeated[0] == ("image not available", 3)
    ids = [{found.image(int(row))[1].id for row in group.rows} for group in found.copies]
    assert ids == [{"red_circle.png", "copy_a.png", "copy_b.png"}, {"pink_bar.png", "copy_c.png"}]
    assert {group.kind for group in found.copies} == {"same file"}
    known = summary(found)
    assert known["skipped"] == 2
    skipped = [json.loads(line)["id"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(id.rpartition(" ")[2] for id in skipped) == ["gone.png", "torn.png"]
    said = describe(found)
    assert "copies            3 of equal files" in said
    assert json.loads((out / "findings.json").read_text())["pairs"] == 55


def test_a_stopped_run_goes_on_where_it_was(
    found: Found,
    model: DualEncoderModel,
    source: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_pieces, "PIECE", 20)
    seen: list[score_pieces.Piece] = []
    work = score_pieces.score_piece

    def stops(*given: object) -> score_pieces.Scored:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(given[2])  # type: ignore[arg-type]
        return work(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(score_pieces, "score_piece", stops)
    settings = Settings(calibration=False, near=None)
    with pytest.raises(KeyboardInterrupt):
        score(model, source, tmp_path, settings)
    monkeypatch.setattr(
        score_pieces, "score_piece", lambda *given: seen.append(given[2]) or work(*given)
    )
    again = score(model, source, tmp_path, settings)
    assert len(seen) == len({piece.path for piece in seen}) > 3
    np.testing.assert_allclose(again.scores.score, found.scores.score, atol=1e-5)
    np.testing.assert_array_equal(again.scores.digest, found.scores.digest)
    assert again.fitted is None
    assert "not calibrated" in describe(again)
    table = pq.read_table(tmp_path / SCORES_FILE)
    assert table["probability"].null_count == 55
    first = seen[0].path
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(DataError, match="is damaged"):
        score(model, source, tmp_path, settings)


def test_swapped_captions_are_found_and_moved_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 512))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = images.copy()
    texts[[0, 1]], texts[[2, 3]] = texts[[1, 0]], texts[[3, 2]]
    texts[[4, 5, 6]] = texts[[5, 6, 4]]  # moved round: no two of them are exchanged
    texts[[8, 9]] = texts[[9, 8]]  # exchanged, but alike
    numbers = 100 + np.arange(40)

    def look(shift: np.ndarray, least: float | None = None) -> set[tuple[int, int]]:
        found = swaps(
            numbers,
            images,
            texts,
            lambda a, b: {a, b} == {108, 109},
            lambda i, t: 12 * i @ t.T + shift,
            Calibration(),
            least,
        )
        assert all(s.gain > (np.log(40) if least is None else least) for s in found)
        return {(s.pair, s.other) for s in found}

    planted = {(100, 101), (102, 103)}
    assert look(np.zeros((1, 40))) == planted
    # What an image has too much with all captions, or a caption with all images, does not count.
    assert look(rng.normal(0, 30, (40, 1)) + rng.normal(0, 30, (1, 40))) >= planted
    assert look(np.zeros((1, 40)), least=1000.0) == set()


def closure(near: np.ndarray) -> np.ndarray:
    """Groups of a relation, bool ``[n, n]``: slow, and by definition."""
    label = np.arange(len(near))
    for i, j in zip(*np.nonzero(near), strict=True):
        label[label == label[j]] = label[i]
    return label


def as_sets(label: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(label == k).tolist()) for k in set(label.tolist())}


def test_groups_of_many_images_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    units = rng.normal(size=(300, 24)).astype(np.float32)
    units[200:] = units[:100] + rng.normal(0, 0.02, (100, 24))
    units[50] = units[51]
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    chain = np.deg2rad(np.arange(0, 150, 10))  # each is near to the next one only
    units[120:135] = 0
    units[120:135, 0], units[120:135, 1] = np.cos(chain), np.sin(chain)
    expected = as_sets(closure(units @ units.T >= 0.98))
    assert max(map(len, expected)) >= 15
    assert sum(len(group) == 2 for group in expected) > 80
    assert as_sets(near_groups(units, 0.98)) == expected
    monkeypatch.setattr(score_find, "COMPARED", 16)
    assert as_sets(near_groups(units, 0.98)) == expected
    monkeypatch.setattr(score_find, "BLOCK", 64)
    monkeypatch.setattr(score_find, "EXACT", 10)
    assert as_sets(near_groups(units, 0.98)) == expected


def test_where_all_images_are_alike_memory_stays_small() -> None:
    """Of 8,000 there are 32 million pairs, which would take half a gigabyte."""
    alike = np.ones((8_000, 4), np.float32) / 2
    tracemalloc.start()
    try:
        assert len(np.unique(near_groups(alike, 0.98))) == 1
        assert tracemalloc.get_traced_memory()[1] < 80e6
    finally:
        tracemalloc.stop()


def test_near_duplicates_are_closed_groups(
    model: DualEncoderModel, source: DataConfig, tmp_path: Path, out: Path, found: Found
) -> None:
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)  # nothing is encoded again
    near = score(model, source, tmp_path, Settings(calibration=False, near=0.999))
    images = np.stack(
        [
            model.encode_image([Path(source.source).parent / near.image(r)[1].id])[0]
            for r in range(len(near.scores.split))
        ]
    )
    cosine = images @ images.T
    digests = [near.scores.digest[r].tobytes() for r in range(len(images))]
    equal = np.array([[a == b for a in digests] for b in digests])
    expected = as_sets(closure((cosine >= 0.999) | equal))
    assert {frozenset(g.rows.tolist()) for g in near.copies} == {g for g in expected if len(g) > 1}
    assert len(near.copies) >= len(found.copies)


def test_the_share_of_wrong_captions() -> None:
    rng = np.random.default_rng(3)
    worse = np.concatenate([np.zeros(8000), rng.random(2000)])
    assert wrong_share(worse) == pytest.approx(0.2, abs=0.02)
    assert wrong_share(np.zeros(0)) == 0


def test_what_is_left_as_a_table(
    found: Found, source: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worst = dropped_share(found, 0.2)
    assert len(worst.decisions) == 11 + 1  # the torn picture goes, too
    limit = float(np.median(found.scores.score))
    below = dropped_below(found, limit)
    assert len(below.decisions) == 1 + int(np.sum(found.scores.score < limit))
    order = np.argsort(found.scores.contrast)[:11]
    expected = {found.pair(int(n))[1].id for n in order} | {"torn.png"}
    assert {d.id for d in worst.decisions} == expected
    file = tmp_path / "decisions.json"
    write_decisions(file, worst)
    out = tmp_path / "it's mine"  # a shell takes what is said of it as it is
    command = ["score", source.source, "--out", str(out), "--decisions", str(file)]
    assert main(command) == 0
    told = capsys.readouterr().out.partition("train with ")[2].splitlines()[0]
    config = data_config("emoji", shlex.split(told))
    assert config == DataConfig(
        source=str(out / "clean.jsonl"),
        image_folder=str(Path(source.source).parent),
        split_column="split",
        group_column="group",
    )
    left = build_sources(config, BadExamples(), training=False)
    before = {
        (split, example.id, example.group, example.captions)
        for split, part in found.sources.items()
        for example in (part.metadata(i) for i in range(len(part)))
    }
    after = {
        (split, example.id, example.group, example.captions)
        for split, part in left.items()
        for example in (part.metadata(i) for i in range(len(part)))
    }
    gone = {(d.split, d.id) for d in worst.decisions}
    assert after == {known for known in before if known[:2] not in gone}
    assert len(gone) == 12


def test_what_is_left_as_records(found: Found, source: DataConfig, tmp_path: Path) -> None:
    split = next(
        s
        for s, part in found.sources.items()
        for i in range(len(part))
        if part.metadata(i).id == "red_circle.png"
    )
    dropped = [Decision(split=split, id="red_circle.png", caption=0, drop=True)]
    dropped.append(Decision(split=split, id="copy_a.png", caption=5, drop=True))  # it has none
    file = tmp_path / "decisions.json"
    write_decisions(file, make_decisions(found.fingerprint, dropped))
    command = ["data", "convert", source.source, str(tmp_path / "clean")]
    command += ["--processes", "1", "--decisions", str(file)]
    assert main(command) == 0
    config = DataConfig(source=str(tmp_path / "clean"))
    left = build_sources(config, BadExamples(), training=False)
    ids = {part.metadata(i).id for part in left.values() for i in range(len(part))}
    assert len(ids) == 54
    assert "red_circle.png" not in ids
    assert set(COPIES) <= ids
    # Other decisions are another conversion.
    write_decisions(file, make_decisions(found.fingerprint, dropped[1:]))
    assert main(command) == 2


def test_one_caption_of_several_goes(pairs: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(pairs))
    sources = build_sources(data, BadExamples(), training=False)
    split = next(iter(sources))
    example = sources[split].metadata(0)
    drop = [Decision(split=split, id=example.id, caption=0, drop=True)]
    drop.append(Decision(split=split, id=example.id, caption=1, drop=False))
    decisions = make_decisions(fingerprint(sources), drop)
    assert decisions.kept(split, example) == example.captions[1:]
    assert decisions.kept("another split", example) == example.captions


def test_decisions_that_are_none_are_refused(
    found: Found,
    source: DataConfig,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = {"split": "train", "id": "a", "caption": 0, "drop": True}
    good = {"format": "clip-lite decisions 1", "source": found.fingerprint, "decisions": [one]}
    for number, (content, said) in enumerate(
        (
            ("not json", "is not JSON"),
            ([], "holds no decisions"),
            (good | {"format": "2"}, "holds no decisions"),
            (good | {"decisions": [one | {"caption": -1}]}, "caption"),
            (good | {"decisions": [one | {"drop": "maybe"}]}, "drop"),
            (good | {"more": 1}, "more"),
            (good | {"source": "of others"}, "are about another source"),
        )
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        out = str(tmp_path / "out")
        assert main(["score", source.source, "--out", out, "--decisions", str(file)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(DataError, match="no such file"):
        read_decisions(tmp_path / "nowhere.json")


def test_the_command_asks_for_what_it_needs(
    finished_run: Path, source: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["score", source.source, "--out", out]) == 2
    assert "--model is needed" in capsys.readouterr().err
    command = ["score", "--model", str(finished_run), source.source, "--out", out]
    for arguments, said in (
        (["--split", "dev"], "--split dev: choose from"),
        (["--near", "1.5"], "--near 1.5: above 0, up to 1"),
        (["--others", "1"], "--others 1: 2 or more"),
    ):
        assert main([*command, *arguments]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="between 0 and 1"):
        dropped_share(None, 1.5)  # type: ignore[arg-type]


def test_folders_of_others_stay_as_they_are(
    finished_run: Path,
    found: Found,
    source: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "score.json", "skipped.jsonl"):
        (run / name).write_text("{}")
    file = tmp_path / "decisions.json"
    write_decisions(file, make_decisions(found.fingerprint, []))
    for place, said in (
        (str(run), "run is not empty (config.json)"),
        ("gs://bucket/scored", "write to a folder of this machine"),
        (str(file), "cannot be written"),
    ):
        for means in (
            ["--model", str(finished_run), "--no-calibration"],
            ["--decisions", str(file)],
        ):
            assert main(["score", source.source, "--out", place, *means]) == 2
            assert said in capsys.readouterr().err
    assert {path.name: path.read_text() for path in run.iterdir()} == dict.fromkeys(
        ("config.json", "score.json", "skipped.jsonl"), "{}"
    )


def test_images_below_several_folders_are_no_table(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    draw("ring", "gold").save(other / "gold_ring.png")
    (other / "other.csv").write_text("image,caption\ngold_ring.png,a gold ring\n")
    splits = f'--config.data.splits={{"validation": "{other / "other.csv"}"}}'
    sources = build_sources(data_config(str(pairs), [splits]), BadExamples(), training=False)
    assert not is_a_table_of_files(sources)
    file, out = tmp_path / "decisions.json", tmp_path / "out"
    write_decisions(file, make_decisions(fingerprint(sources), []))
    command = ["score", str(pairs), splits, "--out", str(out), "--decisions", str(file)]
    assert main([*command, "--format", "table"]) == 2
    said = capsys.readouterr().err
    assert "below 2 folders" in said
    assert str(other) in said
    assert not out.exists()
    assert main(command) == 0
    assert f"train with --config.data.source={out / 'clean'}\n" in capsys.readouterr().out
    assert unread_in(out / "clean") == 0
    failed = BadExamples(out / "clean" / "skipped.jsonl")
    failed.extend([("a", "cannot be read: Input/output error"), ("b", "empty file")])
    assert unread_in(out / "clean") == 1
    left = build_sources(DataConfig(source=str(out / "clean")), BadExamples(), training=False)
    assert {split: len(part) for split, part in left.items()} == {"train": 48, "validation": 1}


@pytest.mark.parametrize(
    "named",
    [
        {"source": "http://host.invalid/pairs.csv"},
        {"source": "simplecache::https://host.invalid/pairs.csv"},
        {"source": "tfds:huggingface:them/theirs"},
        {"image_folder": "s3://bucket/pictures"},
        {"splits": {"validation": "gs://bucket/val.csv"}},
        {"source": "", "mixture": {"a": PartConfig(source="s3://bucket/a.parquet")}},
        {
            "source": "",
            "mixture": {"a": PartConfig(source="a.csv", fields={"image_folder": "s3://bucket/b"})},
        },
    ],
)
def test_no_host_that_a_model_names_is_asked(
    named: dict[str, Any],
    model: DualEncoderModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    strange = copy(model)
    strange.config = replace(model.config, data=replace(model.config.data, **named))
    monkeypatch.setattr(score_calibration, "build_sources", lambda *given, **_: pytest.fail("read"))
    assert own_calibration(strange) is None
    assert "--calibrate '" in caplog.text


def test_a_picture_that_could_not_be_read_is_tried_again(
    model: DualEncoderModel,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = DataConfig(source=str(write_faulty(pairs, tmp_path / "faulty")))
    read = FileImages.read

    def fails(images: FileImages, index: int) -> bytes:
        if images.paths[index].as_py() == "evil.png":
            raise Unreadable("cannot be read: Input/output error")
        return read(images, index)

    out, settings = tmp_path / "out", Settings(calibration=False, near=None)
    with monkeypatch.context() as patch:
        patch.setattr(FileImages, "read", fails)
        first = score(model, data, out, settings)
    assert dict(first.unread.reasons) == {"evil.png": "cannot be read: Input/output error"}
    assert {d.id for d in dropped_below(first, -1e9).decisions} == {"torn.png"}
    assert summary(first)["unread"] == 1
    assert summary(first)["skipped"] == 2
    assert "could not be read 1 this time" in describe(first)
    assert "Input/output error" in write_page(first, out, show=1).read_text()
    second = score(model, data, out, settings)
    assert len(second.unread) == 0
    assert not (out / "unread.jsonl").exists()
    assert len(second.scores.score) == len(first.scores.score) + 1
    # A picture that has changed is scored anew, and not shown beside a score that is not its own.
    shutil.copy(tmp_path / "faulty" / "red_ring.png", tmp_path / "faulty" / "copy_a.png")
    page = write_page(second, out, show=100).read_text()
    assert "not shown, for they are not those that were scored: 1" in caplog.text
    assert page.count("no picture") >= 1
    third = score(model, data, out, settings)
    copied = [{third.image(int(row))[1].id for row in group.rows} for group in third.copies]
    assert {"red_ring.png", "copy_a.png"} in copied
    assert {"red_circle.png", "copy_b.png"} in copied


def test_a_critic_without_cosines_has_no_near_images(
    model: DualEncoderModel, source: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = copy(model)
    critic = CriticConfig(name="concat")
    other.config = replace(model.config, model=replace(model.config.model, critic=critic))
    found = score(other, source, tmp_path, Settings(calibration=False, near=0.001))
    assert {group.kind for group in found.copies} == {"same file"}
    assert "near ones not looked for" in describe(found)
    assert "says nothing with a concat critic" in caplog.text


def test_the_page_is_one_file_that_runs_nothing_of_strangers(
    found: Found, out: Path, tmp_path: Path
) -> None:
    page = write_page(found, tmp_path, show=100).read_text()
    assert EVIL.partition(" ")[0] not in page
    assert "<img src=x" not in page
    cards = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["cards"]
    assert page.count('<article class="card"') == len(cards)
    known = json.loads((out / "findings.json").read_text())
    rows = pq.read_table(out / SCORES_FILE).to_pylist()
    wrong = [row for row in rows if row["wrong_suspect"] and row["swap_with"] is None]
    wrong.sort(key=lambda row: row["contrast"])
    assert len(cards) == len(wrong) + known["swaps"] + known["copy_groups"]
    assert len(wrong) > 5
    for row, card in zip(wrong, cards, strict=False):
        shown = {"split": row["split"], "id": row["id"], "caption": row["caption_index"]}
        assert card == {"items": [shown], "drops": [0]}
    copied = [{item["id"] for item in card["items"]} for card in cards[-known["copy_groups"] :]]
    assert copied == [
        {"red_circle.png", "copy_a.png", "copy_b.png"},
        {"pink_bar.png", "copy_c.png"},
    ]
    assert f"{known['wrong_suspects']} wrong captions, {known['swaps']} times two swapped" in page
    assert "http://" not in page
    assert "https://" not in page


def test_the_task_fits_on_one_split_and_judges_another(
    model: DualEncoderModel, pairs: Path
) -> None:
    config = DataConfig(source=str(pairs), held_out=0.4)
    splits = build_sources(config, BadExamples(), training=False)
    inputs = TowerInputs(model.pixels, model.tokenizer)
    data = TaskData(splits, inputs, model.batch_size, BadExamples())
    task = CalibrationTask(data, CalibrationOptions(wrong=3, bins=5))
    found = task.outcome(model.fns)
    parts = []
    for split in ("validation", "test"):
        known = [splits[split].metadata(i) for i in range(len(splits[split]))]
        images = model.project_image([pairs.parent / example.id for example in known])
        captions = [example.captions[0] for example in known]
        scores = np.asarray(model.fns.matrix(images, model.project_text(captions)))
        groups = np.array([example.group for example in known])
        parts.append(trials_of(scores, groups, np.array(captions), wrong=3))
    fitted = parts[0].fit()
    expected = quality(fitted, parts[1], bins=5)
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    before = quality(Calibration(), parts[1], bins=5)
    assert found.metrics["uncalibrated_brier"] == pytest.approx(before["brier"], abs=1e-4)
    assert found.metrics["pairs"] == len(parts[1].real)
    assert found.metrics["fitted_on"] == len(parts[0].real)
    rows = found.tables["reliability_calibrated"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert "fitted on 'validation', judged on 'test'" in task.protocol
    sizes = " and ".join(f"{len(part.real):,}" for part in parts)
    assert f"({sizes} pairs, at most 2,000 of a split by a hash of ids, the first" in task.protocol
    halves = CalibrationTask(data, CalibrationOptions(fit="test", read="test"))
    assert f"({len(parts[1].real)} pairs halved by group, at most" in halves.protocol
    scores = {"test": halves.galleries["test"].scores(model.fns)}
    one, other = halves.halves(scores)
    assert not set(one.groups) & set(other.groups)
    assert len(one.real) + len(other.real) == len(parts[1].real)


def test_when_t_is_not_log_r() -> None:
    config = tiny_config(Path("pairs.csv"))
    assert why_not_log_r(config) == []
    for objective, negatives, said in (
        ("jsd", NegativesConfig(name="hard", beta=0.5), "exp(0.5 T)"),
        ("jsd", NegativesConfig(name="importance", proposal="exp"), "large weights"),
        ("jsd", NegativesConfig(name="queue"), "earlier steps"),
        ("jsd", NegativesConfig(name="k", pool="memory"), "earlier steps"),
        ("infonce", NegativesConfig(name="all"), "log r plus a constant"),
        ("sigmoid", NegativesConfig(name="all"), "negatives per pair"),
    ):
        changed = replace(config, objective=ObjectiveConfig(name=objective), negatives=negatives)
        (reason,) = why_not_log_r(changed)
        assert said in reason
    unbiased = replace(config, negatives=NegativesConfig(name="importance"))
    assert why_not_log_r(unbiased) == []
