"""`clip-lite eval` and `eval.tasks`: published layouts, result files, models side by side."""

import copy
import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pydantic
import pytest
from conftest import COLOURS, SHAPES, draw

from clip_lite_jax import cli
from clip_lite_jax.apps.evaluation import evaluate_model, file_name, parse_task, read_result
from clip_lite_jax.apps.evaluation_table import read_results, table
from clip_lite_jax.config import DataConfig, EvalConfig, TaskConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluate import read_results as read_test_results
from clip_lite_jax.evaluators.registry import TASKS, build_task
from clip_lite_jax.evaluators.retrieval import retrieval_metrics
from clip_lite_jax.evaluators.tasks import data_of
from clip_lite_jax.files import read_json_lines
from clip_lite_jax.inference import DualEncoderModel, load
from clip_lite_jax.metrics import read_metrics
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_step import make_encode_fns


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return load(finished_run, batch_size=16)


def write_karpathy(folder: Path, kind: str) -> Path:
    """Karpathy's file of COCO or Flickr30k: pictures of six captions, the fourth one broken."""
    below = {"coco": "val2014", "flickr30k": "flickr30k-images"}[kind]
    (folder / below).mkdir()
    images: list[dict[str, Any]] = []
    for number in range(20):
        colour, shape = list(COLOURS)[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
        name = f"COCO_val2014_{number:012}.jpg" if kind == "coco" else f"{1000 + number}.jpg"
        draw(shape, colour).save(folder / below / name)
        texts = [f"{word} {colour} {shape}" for word in ("a", "the", "one", "some", "this", "six")]
        sentences = [{"raw": text, "sentid": number * 6 + n} for n, text in enumerate(texts)]
        image = {"filename": name, "split": "test", "sentences": sentences}
        images.append(image | ({"filepath": below} if kind == "coco" else {}))
    images[19]["split"] = "train"
    (folder / below / images[3]["filename"]).write_bytes(b"no picture")
    path = folder / f"dataset_{kind}.json"
    path.write_text(json.dumps({"images": images, "dataset": kind}))
    return path


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_karpathy(tmp_path_factory.mktemp("coco"), "coco")


@pytest.mark.parametrize("kind", ["coco", "flickr30k"])
def test_karpathys_protocol(model: DualEncoderModel, kind: str, tmp_path: Path) -> None:
    """Five of six captions, the broken picture listed, and the numbers of all scores at once."""
    path = write_karpathy(tmp_path, kind)
    task = parse_task(f"retrieval:{path}", {}, {})
    result = read_result(evaluate_model(model, "m", [task], tmp_path)[0])
    content = json.loads(path.read_text())["images"]
    good = [image for n, image in enumerate(content) if n not in (3, 19)]
    (broken,) = result.bad_examples
    assert broken.endswith(content[3]["filename"])
    assert (result.metrics["images"], result.metrics["captions"]) == (18, 90)
    captions = [s["raw"] for image in good for s in image["sentences"][:5]]
    folder = path.parent / ("val2014" if kind == "coco" else "flickr30k-images")
    images = model.project_image([folder / image["filename"] for image in good])
    scores = np.asarray(model.fns.matrix(images, model.project_text(captions)))
    wanted = retrieval_metrics(scores, np.repeat(np.arange(18), 5))
    for name, value in wanted.items():
        assert result.metrics[name] == pytest.approx(value), name
    low, high = (result.metrics[f"text_to_image_r1_{end}"] for end in ("low", "high"))
    assert low <= wanted["text_to_image_r1"] <= high  # type: ignore[operator]
    assert result.data["splits"] == {"test": 19, "train": 1}
    assert result.model["step"] == 4


def test_folds_are_means_over_parts(model: DualEncoderModel, coco: Path, tmp_path: Path) -> None:
    """Each fold searches its own images and captions."""
    options = {"folds": 2, "captions_per_image": None, "split": "all"}
    task = parse_task(f"retrieval:{coco}", {}, options)
    result = read_result(evaluate_model(model, "m", [task], tmp_path)[0])
    assert "mean over 2 folds" in result.protocol
    splits = build_sources(data_of(task, model.config.data), BadExamples(), training=False)
    both = [source.metadata(n) for source in splits.values() for n in range(len(source))]
    good = [e for e in both if not e.id.endswith(f"{3:012}.jpg")]
    expected = []
    for part in (good[:10], good[10:]):
        images = model.project_image([coco.parent / example.id for example in part])
        captions = model.project_text([text for example in part for text in example.captions])
        scores = np.asarray(model.fns.matrix(images, captions))
        expected.append(retrieval_metrics(scores, np.repeat(np.arange(len(part)), 6)))
    for name in set(expected[0]) - {"images", "captions"}:
        wanted = np.mean([metrics[name] for metrics in expected])
        assert result.metrics[name] == pytest.approx(wanted), name
    assert (result.metrics["images"], result.metrics["captions"]) == (19, 19 * 6)


def test_a_part_of_the_gallery(model: DualEncoderModel, coco: Path, tmp_path: Path) -> None:
    tasks = [
        parse_task(f"retrieval:{coco}", {}, options)
        for options in ({"max_images": 7}, {"one_per_group": True}, {})
    ]
    found = [read_result(path) for path in evaluate_model(model, "m", tasks, tmp_path)]
    assert found[0].metrics["images"] <= 7  # type: ignore[operator]
    assert ", one of each group" in found[1].protocol
    assert len({result.protocol for result in found}) == 3
    assert len(set(table({"m": found}).splitlines()) & {result.protocol for result in found}) == 0
    assert table({"m": found}).count("retrieval on") == 3


def test_too_few_pictures_for_the_folds(
    model: DualEncoderModel, coco: Path, tmp_path: Path
) -> None:
    task = parse_task(f"retrieval:{coco}", {}, {"folds": 19})
    with pytest.raises(DataError, match="18 of 19 pictures can be used"):
        evaluate_model(model, "m", [task], tmp_path)


def test_a_task_that_needs_no_data_reads_none(
    model: DualEncoderModel, coco: Path, tmp_path: Path
) -> None:
    """And options of all tasks are looked at before any is measured."""
    gone = replace(model.config, data=replace(model.config.data, source="gone.csv"))
    other = copy.copy(model)
    other.config = gone
    sides = {"X": "circle", "Y": "square", "A": "red", "B": "blue"}
    pairs = [["a red circle", "a blue circle"], ["square in red", "square in blue"]]
    words = {k: {"name": v, "texts": [f"a {v} circle", f"{v}"]} for k, v in sides.items()}
    sets = {"concept": "red", "pairs": pairs, "tests": [{"name": "shapes", **words}]}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    task = parse_task("bias", {}, {"sets": str(tmp_path / "sets.json")})
    result = read_result(evaluate_model(other, "m", [task], tmp_path)[0])
    assert result.data == {"fingerprint": "", "splits": {}}
    wrong = [parse_task(f"retrieval:{coco}", {}, {}), parse_task("knn:x", {}, {"neighbours": 3})]
    with pytest.raises(ConfigError, match="neighbours"):
        evaluate_model(model, "m", wrong, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_reranking_few_and_information(model: DualEncoderModel, coco: Path, tmp_path: Path) -> None:
    tasks = [
        parse_task(f"retrieval:{coco}", {}, {}),
        parse_task(f"retrieval:{coco}", {}, {"rerank": 95}),
        parse_task(f"information:{coco}", {}, {}),
    ]
    plain, again, information = map(read_result, evaluate_model(model, "m", tasks, tmp_path))
    for name, value in plain.metrics.items():
        assert again.metrics[name] == pytest.approx(value), name
    assert information.metrics["pairs"] == 18


def test_the_command_and_the_table(
    finished_run: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results lie in the folder of the model, however that is written, and side by side."""
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(shutil.copytree(finished_run, tmp_path / f"of_{name}"))
        model = f"{tmp_path}/./{name}/"
        arguments = ["eval", model, "--batch-size=16", f"retrieval:{coco}"]
        assert cli.main([*arguments, "--retrieval.split=test"]) == 0
        assert len(list((tmp_path / name / "evaluations").glob("retrieval-*.json"))) == 1
    assert "text_to_image_r1 " in capsys.readouterr().out
    assert cli.main(["eval", "--table", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    printed = capsys.readouterr().out
    assert "of_one" in printed
    row = next(line for line in printed.splitlines() if line.startswith("text_to_image_r5 "))
    assert len(row.split("(")) == 3  # two models, each with its interval
    assert "any of which is right" in printed


def test_results_of_several_models_in_one_folder(
    model: DualEncoderModel, coco: Path, tmp_path: Path
) -> None:
    other = copy.copy(model)
    other.params = jax.tree.map(lambda x: x + 1, model.params)
    task = parse_task(f"retrieval:{coco}", {}, {"max_images": 3})
    for one in (model, other, model):
        evaluate_model(one, "m", [task], tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_other_protocols_stand_apart(tmp_path: Path) -> None:
    results = {}
    for name, protocol in (("a", "five captions"), ("b", "one caption")):
        folder = tmp_path / name / "evaluations"
        folder.mkdir(parents=True)
        result = {
            "format": 1,
            "task": "retrieval",
            "source": "x",
            "protocol": protocol,
            "metrics": {"text_to_image_r1": 0.5, "lost": None},
            "model": {"path": name},
            "data": {"fingerprint": "0" * 32},
        }
        (folder / "r.json").write_text(json.dumps(result))
        results[name] = tmp_path / name
    printed = table(read_results(list(results.values())))
    assert printed.count("text_to_image_r1") == 2
    assert "not finite" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "retrieval"], "nowhere holds no checkpoints"),
        (["nowhere", "recall"], "no task 'recall': choose from retrieval"),
        (["nowhere"], "name a model and tasks"),
        (["nowhere", "retrieval", "--zero_shot.k=1"], "no task 'zero_shot' is asked for"),
        (["nowhere", "retrieval", "--config.optim.b2=1"], "only fields of data count here"),
        (["nowhere", "retrieval", "--config.data.held_out=0"], "no task has a source of its own"),
        (["nowhere", "retrieval:x", "--retrieval.folds", "5"], "--retrieval.folds needs a value"),
        (["nowhere", "retrieval:x", "--retrieval.fold=5"], "did you mean folds"),
        (["nowhere", "retrieval:x", "--retrieval.folds=x"], "--retrieval.folds=x"),
        (["--table", "nowhere"], "nowhere is no result of clip-lite eval"),
        (["m", "--table", "nowhere"], "--table reads results"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_wrong_options_and_splits(model: DualEncoderModel, coco: Path, tmp_path: Path) -> None:
    def run(options: dict[str, object], fields: dict[str, object] | None = None) -> None:
        task = parse_task(f"retrieval:{coco}", fields or {}, options)
        evaluate_model(model, "m", [task], tmp_path)

    with pytest.raises(ConfigError, match="options of the task 'retrieval'.*folds"):
        run({"folds": 0})
    with pytest.raises(ConfigError, match="folds=21 of 19 images"):
        run({"folds": 21})
    with pytest.raises(
        DataError, match="split 'val' has no examples; there are: .*test 19.*'all' is all"
    ):
        run({"split": "val"})
    with pytest.raises(ConfigError, match="fields of the task 'retrieval'.*formats"):
        run({}, {"formats": "x"})
    with pytest.raises(ConfigError, match="name a source"):
        data_of(TaskConfig(task="retrieval", fields={"format": "x"}), DataConfig())


def test_damaged_results_are_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no results: clip-lite eval"):
        read_results([finished_run])
    number = b'{"format": 1, "metrics": {"x": NaN}}'
    for content in (b"{", b"[]", b'{"format": 2}', b'{"format": 1}', b"\xff", number):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.json"):
            read_result(tmp_path / "x.json")


def test_names_of_results_say_what_was_asked() -> None:
    some = TaskConfig(task="retrieval", source="s3://bucket/a b.json", options={"folds": 5})
    assert file_name(some).startswith("retrieval-a_b.json-")
    other = dataclasses.replace(some, options={"folds": 1})
    assert file_name(some) != file_name(other)
    assert file_name(TaskConfig(task="retrieval")).startswith("retrieval-own_data-")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a model that is none
def test_numbers_that_are_none(model: DualEncoderModel, coco: Path, tmp_path: Path) -> None:
    """A model that has diverged gets results all the same, and they are JSON."""
    lost = copy.copy(model)
    lost.params = jax.tree.map(lambda x: x * np.nan, model.params)
    lost.fns = make_encode_fns(model.model, build_mesh())(lost.params, model.model_state)
    task = parse_task(f"information:{coco}", {}, {})
    result = read_result(evaluate_model(lost, "m", [task], tmp_path)[0])
    assert result.metrics["jsd_loss"] is None
    assert result.model["scale"] is None
    assert "not finite" in table({"m": [result]})


def test_every_task_has_options_and_a_summary() -> None:
    for name, task in TASKS.items():
        assert task.summary, name
        task.options()
    with pytest.raises(ConfigError, match="choose from"):
        build_task("nothing", None, {})  # type: ignore[arg-type]


def test_a_run_ends_with_its_tasks(finished_run: Path) -> None:
    results = read_test_results(finished_run)
    assert results is not None
    numbers = results["test"]["tasks/search"]
    assert (
        numbers["text_to_image_r10"] == results["test"]["retrieval/held_out"]["text_to_image_r10"]
    )
    assert results["protocols"]["tasks/search"].startswith("split test")


def test_a_run_watches_its_tasks(finished_run: Path) -> None:
    """Those that are to be seen while it trains, on data of their own, with what is wrong there."""
    lines = [line for line in read_metrics(finished_run) if "tasks/others/images" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert {line["tasks/others/images"] for line in lines} == {2}
    assert not any(name.startswith("tasks/search") for line in lines for name in line)
    bad = list(read_json_lines(finished_run / "skipped-others.jsonl"))
    assert [item["id"] for item in bad] == ["broken.png"]


def test_names_of_tasks_are_names_of_files() -> None:
    with pytest.raises(pydantic.ValidationError, match="String should match pattern"):
        EvalConfig(tasks={"../x": TaskConfig(task="retrieval")})
