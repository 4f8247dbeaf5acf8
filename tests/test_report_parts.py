"""The parts of a report against loops by hand: intervals, map, errors, data, cost, tasks."""

import base64
import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, write_pairs
from test_report import Page, fake_retrieval

from clip_lite_jax import status as status_module
from clip_lite_jax.apps.evaluation import Result
from clip_lite_jax.apps.report import write_report
from clip_lite_jax.apps.report_cost import cost
from clip_lite_jax.apps.report_data import data_health
from clip_lite_jax.apps.report_errors import build_errors
from clip_lite_jax.apps.report_information import information_curves
from clip_lite_jax.apps.report_map import embedding_map, principal
from clip_lite_jax.apps.report_pages import flop
from clip_lite_jax.apps.report_plots import Plot, curves
from clip_lite_jax.apps.report_tables import Recall
from clip_lite_jax.apps.report_tasks import tasks_of_model
from clip_lite_jax.config import DataConfig, NegativesConfig, PartConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import build_sources
from clip_lite_jax.data.tokenizer import Tokenizer, train_tokenizer
from clip_lite_jax.evaluators.bootstrap import RESAMPLES, wilson, with_shared_intervals
from clip_lite_jax.evaluators.ranking import dense_counts
from clip_lite_jax.evaluators.retrieval import Queries, retrieval_intervals
from clip_lite_jax.status import Status


def test_shared_intervals_equal_a_bootstrap_by_hand() -> None:
    """Of both directions of a search: one draw of groups for all numbers."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(12), rng.integers(1, 4, 12))
    groups = np.arange(12) // 2
    scores = np.round(rng.normal(size=(12, len(owner))) + 2 * (owner == np.arange(12)[:, None]), 1)
    found = retrieval_intervals(dense_counts(scores, owner), owner, groups)
    to_image = [np.sum(scores[:, c] >= scores[owner[c], c]) for c in range(len(owner))]
    to_text = [1 + np.sum(scores[i, owner != i] >= scores[i, owner == i].max()) for i in range(12)]
    draws = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=RESAMPLES)
    for name, ranks, group in (
        ("text_to_image_r5", np.array(to_image), groups[owner]),
        ("image_to_text_r1", np.array(to_text), groups),
    ):
        hits = ranks <= int(name[-1])
        means = [np.repeat(hits, times[group]).mean() for times in draws]
        wanted = np.quantile(means, (0.025, 0.975))
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx(wanted)
    empty = with_shared_intervals([({"x": np.zeros(0)}, None)])
    assert np.isnan(list(empty.values())).all()


def test_ranks_of_queries_come_back_from_json() -> None:
    owner = np.array([0, 0, 1, 2])
    ranks = {"text_to_image": np.array([1, 2, 3, 1]), "image_to_text": np.array([1, 4, 2])}
    queries = Queries("abc", np.array([0, 1, 1]), owner, ranks)
    text = json.loads(json.dumps(queries.to_json()))
    back = Queries.from_json(text)
    assert back is not None
    np.testing.assert_array_equal(back.owner, owner)
    for direction, wanted in ranks.items():
        np.testing.assert_array_equal(back.ranks[direction], wanted)
    for wrong in (
        None,
        {},
        text | {"captions": "1 1 1"},
        text | {"captions": "99999999999 1 1"},
        text | {"text_to_image": "1 2 3"},
        text | {"groups": "a b c"},
        text | {"groups": ["0"]},
        text | {"image_to_text": ""},
    ):
        assert Queries.from_json(wrong) is None


def test_a_bootstrap_without_width_gives_way_to_wilson() -> None:
    assert Recall(1, 0.5, 0.1, 20, 20, (0.3, 0.7)).interval == (0.3, 0.7)
    assert Recall(1, 0.0, 0.1, 20, 20, (0.0, 0.0)).interval == wilson(0, 20) != (0, 0)


def test_principal_components_are_those_of_the_covariance() -> None:
    vectors = np.random.default_rng(1).normal(size=(40, 6)) * [5, 3, 1, 1, 0.1, 0.1]
    found, shares = principal(vectors)
    values, directions = np.linalg.eigh(np.cov(vectors.T))
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum())
    wanted = (vectors - vectors.mean(axis=0)) @ directions[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(found), np.abs(wanted))
    again, _ = principal(vectors[::-1])
    np.testing.assert_allclose(again[::-1], found)  # the SVD may turn signs, the map does not
    assert principal(np.ones((3, 1)))[0].shape == (3, 2)


def test_the_map_states_the_gap() -> None:
    owner = np.repeat(np.arange(10), 2)
    retrieval: Any = fake_retrieval(owner)
    retrieval.averaged = None
    rng = np.random.default_rng(2)
    images, texts = rng.normal(size=(10, 4)) + 1, rng.normal(size=(20, 4)) - 1
    found = embedding_map(retrieval, images, texts)
    assert found is not None
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts[::2])]
    means = [x.mean(axis=0) for x in units]
    assert found.gap == pytest.approx(np.sqrt(np.sum((means[0] - means[1]) ** 2)))
    cosines = [a @ b for a, b in zip(*units, strict=True)]
    assert found.matched == pytest.approx(np.mean(cosines))
    everything = [units[0][i] @ units[1][j] for i in range(10) for j in range(10) if i != j]
    assert found.shuffled == pytest.approx(np.mean(everything))
    assert found.kinds == "category"
    assert (found.pairs, found.drawn) == (10, 10)
    retrieval.averaged = np.full(10, 2)
    averaged = embedding_map(retrieval, images, texts)
    assert averaged is not None
    assert averaged.gap != found.gap
    assert embedding_map(retrieval, images, rng.normal(size=(20, 5))) is None  # no common space


@pytest.mark.parametrize("ties", [False, True])
def test_errors_equal_a_loop_over_the_queries(ties: bool) -> None:
    rng = np.random.default_rng(3)
    owner = np.repeat(np.arange(12), 2)
    retrieval: Any = fake_retrieval(owner)
    retrieval.examples = [
        Example(e.id, f"group {i % 5}", e.captions, e.image, e.attributes)
        for i, e in enumerate(retrieval.examples)
    ]
    scores = rng.normal(size=(12, 24)) + 1.5 * (owner == np.arange(12)[:, None])
    scores = np.round(scores) if ties else scores
    errors = build_errors("g", retrieval, scores, shown=1000)
    wrong, pairs, within = 0, Counter[frozenset[str]](), 0
    for caption in range(24):
        others = [i for i in range(12) if i != owner[caption]]
        first = max(others, key=lambda i: scores[i, caption])
        if scores[first, caption] >= scores[owner[caption], caption]:
            wrong += 1
            within += first % 2 == owner[caption] % 2
            pairs[frozenset((f"group {owner[caption] % 5}", f"group {first % 5}"))] += 1
    assert (errors.wrong, errors.of, errors.within) == (wrong, 24, within)
    assert errors.within_by_chance == pytest.approx(5 / 11)
    assert [c.times for c in errors.confusions] == sorted(pairs.values(), reverse=True)
    assert all(c.margin >= 0 for c in errors.confusions)
    for i, example in enumerate(retrieval.examples):  # every third picture has no category
        if i % 3 == 0:
            retrieval.examples[i] = replace(example, attributes={})
    some = build_errors("g", retrieval, scores)
    asked = [
        (c, int(np.argmax(np.where(np.arange(12) == owner[c], -np.inf, scores[:, c]))))
        for c in range(24)
    ]
    lost = [(int(owner[c]), f) for c, f in asked if scores[f, c] >= scores[owner[c], c]]
    known = [(one, found) for one, found in lost if one % 3]
    assert (some.wrong, some.categorised) == (wrong, len(known))
    assert some.within == sum(found % 3 != 0 and found % 2 == one % 2 for one, found in known)
    assert some.categorised < some.wrong
    perfect = build_errors("g", retrieval, 9.0 * (owner == np.arange(12)[:, None]))
    assert (perfect.wrong, perfect.confusions, perfect.within) == (0, [], None)


class Listed:
    """Examples in a list."""

    def __init__(self, *examples: tuple[str, str, tuple[str, ...]]) -> None:
        self.examples = [Example(id, group, captions, b"", {}) for id, group, captions in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        raise AssertionError("no picture is read")

    def metadata(self, index: int) -> Example:
        return self.examples[index]


def test_the_health_of_data_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["a cat", "a dog", "one two three four five six seven", "a bird", "a fish"]
    train = Listed(
        ("0", "cat", ("a cat", "a cat")),  # twice at one image is no repetition
        ("1", "dog", ("a dog", "a bird")),
        ("2", "dog", ("a dog",)),
        ("3", "bird", ("a bird", captions[2])),
    )
    test = Listed(("4", "fish", ("a fish", "a cat")), ("5", "cat", ("qqq",)))
    data = DataConfig(source="pairs.csv", max_tokens=8)
    tokenizer = Tokenizer(train_tokenizer(iter(captions * 20), 40), 8)
    health = data_health({"test": test, "train": train, "none": Listed()}, tokenizer, data)
    first, second = health.splits
    assert [split.name for split in health.splits] == ["train", "test"]
    assert (first.images, first.captions, first.most_captions, first.groups) == (4, 7, 2, 3)
    assert first.repeated == pytest.approx(4 / 7)  # a dog, a bird, a dog, a bird
    assert first.ambiguous == pytest.approx(2 / 7)  # a bird
    assert first.cut == pytest.approx(1 / 7)
    assert second.in_training == pytest.approx(1 / 3)
    assert second.groups_in_training == 1
    assert second.unknown is not None
    assert second.unknown > 0 == first.unknown
    assert health.used <= health.vocabulary
    assert not health.leaks_checked  # there is nothing to tell pictures apart by
    assert not health.sampled
    monkeypatch.setattr("clip_lite_jax.apps.report_data.LOOKED_AT", 2)
    some = data_health({"train": train}, tokenizer, data)
    assert some.sampled
    assert (some.splits[0].images, some.splits[0].looked_at) == (4, 2)


def test_time_is_added_up_by_state_and_over_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(status_module, "monotonic", lambda: clock[0])
    for _ in range(2):
        with Status(tmp_path, 4, active=True) as status:
            clock[0] += 2
            status.enter(status_module.COMPILING)
            clock[0] += 3
            status.beat(1)
            clock[0] += 20
            status.beat(2)  # a sign of life counts as well: a kill loses little
            clock[0] += 4
            status.enter(status_module.EVALUATING)
            clock[0] += 1
        clock[0] += 1000  # nobody was there
    lines = [
        {"step": 1, "images_per_second": 8.0, "step_seconds": 2.0, "data_wait": 0.5,
         "flops_per_second": 5.0},
        {"step": 2, "images_per_second": 16.0, "step_seconds": 1.0, "data_wait": 0.2},
        {"step": 2, "information/pairs": 3},
    ]  # fmt: skip
    found = cost(tmp_path, lines, {"seconds": 7.0}, step=4, batch_size=16, examples=10)
    spent = {"starting": 4.0, "compiling": 6.0, "training": 48.0, "evaluating": 2.0}
    assert [part.seconds for part in found.parts] == list(spent.values())
    assert found.seconds == 60
    assert found.parts[2].share == pytest.approx(0.8)
    assert found.waiting == pytest.approx((2 * 0.5 + 1 * 0.2) / 3)
    assert (found.pairs, found.epochs, found.evaluation) == (64, 6.4, 7)
    assert found.pairs_per_second == pytest.approx(16 / 1.5)
    assert found.flops_per_step == 10
    assert found.flops == 40 * (found.devices or 0)
    assert (found.memory, found.mfu) == (None, None)
    old = cost(tmp_path / "none", [], None, 4, 16, 10)
    assert (old.parts, old.seconds, old.step_seconds, old.flops) == ([], None, None, None)
    assert [flop(x) for x in (0, 999, 1.5e9, 2e30)] == [
        "0 FLOP",
        "999 FLOP",
        "1.5 GFLOP",
        "2e+09 ZFLOP",
    ]


def svg(plot: Plot) -> str:
    return base64.b64decode(plot.light.partition(",")[2]).decode()


def test_information_over_training_says_which_are_bounds() -> None:
    names = ("jsd_lower_bound", "nwj_lower_bound", "infonce_lower_bound", "score_positive")
    names += ("calibrated_jsd_lower_bound", "calibrated_nwj_lower_bound")
    lines = [
        {"step": step, "information/pairs": 20}
        | {f"information/{name}": 0.1 * step for name in names}
        | {f"information/{name}_low": 0.05 * step for name in names}
        | {f"information/{name}_high": 0.2 * step for name in names}
        | {"information/true_information": 2.0}
        for step in (1, 2)
    ]
    config = tiny_config(Path("pairs.csv"))
    plain = information_curves(lines, config)
    assert plain is not None
    assert "lower bounds on the information, for any critic" in plain.caption
    assert "tends to its optimum, log r" in plain.caption
    assert "log N = 3.00" in plain.caption
    assert "The truth is 2.00" in plain.alt
    assert plain.dark != plain.light
    assert re_count(svg(plain), "FillBetween") == 3
    hard = information_curves(lines, tiny_config(Path("p"), negatives=NegativesConfig(name="hard")))
    assert hard is not None
    assert "scaled and shifted first" in hard.caption
    assert "certified, cal." in hard.alt
    assert "the optimum of T is not log r" in hard.caption
    infonce = tiny_config(Path("p"))
    assert information_curves([{"step": 1, "loss": 1.0}], infonce) is None
    below = [line | {"information/score_positive": -9.0} for line in lines]
    low = information_curves(below, config)
    assert low is not None
    assert "below this figure" in low.caption


def re_count(text: str, what: str) -> int:
    return text.count(f'id="{what}')


def test_recalls_have_bands_where_the_log_has_intervals() -> None:
    line = {f"retrieval/g/{way}_r10": 0.5 for way in ("text_to_image", "image_to_text")}
    line |= {f"{key}_chance": 0.1 for key in line}
    bare = [{"step": step, **line} for step in (0, 5)]
    (plain,) = curves(bare, "jsd", hard=False)
    assert "95 %" not in plain.caption
    ends = {
        f"{k}_{end}": v for k in line if k[-1] == "0" for end, v in (("low", 0.4), ("high", 0.6))
    }
    (banded,) = curves([row | ends for row in bare], "jsd", hard=False)
    assert "95 %" in banded.caption
    assert re_count(svg(banded), "FillBetween") == 2 + re_count(svg(plain), "FillBetween")
    assert not curves([{"step": 1, "tasks/t/text_to_image_r10": 0.5}], "jsd", hard=False)


HOSTILE = "<img src=x onerror=alert(1)>"


def test_results_of_tasks_are_shown_with_their_protocol(finished_run: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    rows = [{"class": f"{HOSTILE} {i}", "count": 5, "accuracy": i / 20} for i in range(20)]
    result = Result(
        task="zero_shot",
        source="pictures",
        protocol=f"80 prompts {HOSTILE}",
        metrics={"top1": 0.5, "top1_low": 0.4, "top1_high": 0.625, "r1": 0.0, "nothing": None},
        model={"step": 3},
        data={"fingerprint": "0123456789abcdef"},
        tables={
            "per_class": [{"class": "left out", "count": 0}, *rows[::-1]],
            "other": [{"a": 1, "b": "two"}],
        },
    )
    folder = workdir / "evaluations"
    folder.mkdir()
    (folder / "zero_shot.json").write_text(json.dumps(asdict(result)))
    (folder / "broken.json").write_text("{")
    (shown,), problems = tasks_of_model(workdir, step=4)
    assert "broken.json" in problems[0]
    assert [m.interval for m in shown.metrics] == ["0.4 to 0.625", "", ""]
    assert [m.value for m in shown.metrics] == ["0.5", "0", "not finite"]
    assert "of step 3, not of this report's 4" in shown.origin
    per_class, other = shown.tables
    assert (per_class.worst, per_class.of) == ("accuracy", 21)
    assert [row[2] for row in per_class.rows] == ["0", *(f"{i / 20:.4g}" for i in range(1, 10))]
    assert other.rows == [["1", "two"]]
    source = write_report(workdir).read_text()
    page = Page(source)
    assert "tasks" in page.sections
    assert "ties count as wrong" in page.text  # the protocol of eval.tasks
    assert "the worst 10 of 21 by accuracy" in page.text
    assert HOSTILE in page.text
    assert HOSTILE not in source


def test_leaks_and_pictures_that_are_there_twice(tmp_path: Path) -> None:
    table = write_pairs(tmp_path)
    part = PartConfig(source=str(table))
    data = DataConfig(source="", mixture={"a": part, "b": part}, held_out=0.25)
    sources = build_sources(data, BadExamples(), training=False)
    tokenizer = Tokenizer(train_tokenizer(iter(["a red ring"] * 20), 20), 8)
    train = data_health(sources, tokenizer, data).splits[0]
    assert train.same_pictures == train.images == len(sources["train"])  # each twice
    held_out = next(name for name in sources if name != "train")
    mixed = {"train": sources["train"], "leaked": sources["train"], held_out: sources[held_out]}
    health = data_health(mixed, tokenizer, data)
    assert health.leaks_checked
    (leak,) = health.leaks
    assert f"{train.images} of the {train.images} pictures of leaked are in train" in leak
    assert [split.in_training for split in health.splits if split.name == "leaked"] == [1.0]
