"""The comparison of objectives: every run once, a table for reports and one for the docs."""

import json
from pathlib import Path

from benchmarks import compare as benchmark
from clip_lite_jax.apps.report_tables import COMPARE_FILE


def test_markdown_has_means_deviations_and_chance() -> None:
    key = "retrieval/unseen_things/text_to_image_r10"
    row = {"label": "JSD", "train_seconds": [10.0, 12.0]}
    test = {key: [0.2, 0.4], f"{key}_chance": [0.1, 0.1], "information/jsd_loss": [1.0, 1.0]}
    assert benchmark.markdown({"rows": [row | {"test": test}]}).splitlines() == [
        "| run | training | unseen things, text → image |",
        "| --- | --- | --- |",
        "| JSD | 11 s | 0.300 ± 0.141 |",
        "| chance |  | 0.100 |",
    ]


def test_the_docs_show_the_published_table() -> None:
    docs = Path(__file__).parent.parent / "docs" / "results.md"
    assert benchmark.markdown(json.loads(COMPARE_FILE.read_text())) in docs.read_text()
