"""`clip-lite eval` and `eval.tasks`: published layouts, result files, models side by side."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw

from clip_lite_jax import cli
from clip_lite_jax.apps.evaluation import evaluate_model, file_name, parse_task, read_result
from clip_lite_jax.apps.evaluation_table import read_results, table
from clip_lite_jax.config import DataConfig, TaskConfig
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluate import read_results as read_test_results
from clip_lite_jax.evaluators.registry import TASKS, build_task
from clip_lite_jax.evaluators.retrieval import retrieval_metrics
from clip_lite_jax.evaluators.tasks import data_of
from clip_lite_jax.inference import DualEncoderModel, load


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
    whole = parse_task(
        f"retrieval:{coco}", {}, {"folds": 2, "captions_per_image": None, "split": "all"}
    )
    result = read_result(evaluate_model(model, "m", [whole], tmp_path)[0])
    assert (result.metrics["images"], result.metrics["captions"]) == (19, 19 * 6)
    assert result.metrics["text_to_image_r5_chance"] == pytest.approx((5 / 10 + 5 / 9) / 2)
    assert "mean over 2 folds" in result.protocol


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
    for out in ("one", "two"):
        arguments = [str(finished_run), f"retrieval:{coco}", "--retrieval.split=test"]
        folder = tmp_path / out / "evaluations"
        assert cli.main(["eval", *arguments, "--out", str(folder), "--batch-size=16"]) == 0
    assert "text_to_image_r1 " in capsys.readouterr().out
    places = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert cli.main(["eval", "--table", *places]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("text_to_image_r5 "))
    halves = row.split("(")
    assert len(halves) == 3  # two models, each with its interval
    assert "any of which is right" in printed


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


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    for content in (b"{", b"[]", b'{"format": 2}', b'{"format": 1}', b"\xff"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.json"):
            read_result(tmp_path / "x.json")


def test_names_of_results_say_what_was_asked() -> None:
    some = TaskConfig(task="retrieval", source="s3://bucket/a b.json", options={"folds": 5})
    assert file_name(some).startswith("retrieval-a_b.json-")
    other = dataclasses.replace(some, options={"folds": 1})
    assert file_name(some) != file_name(other)
    assert file_name(TaskConfig(task="retrieval")).startswith("retrieval-own_data-")


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
