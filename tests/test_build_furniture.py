"""The table of products reads as a source: every picture, both captions, products as groups."""

import io
from pathlib import Path

import pytest
from conftest import draw

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import build_sources
from tools import build_furniture


def test_the_table_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def catalogue(path: Path) -> list[Example]:
        buffer = io.BytesIO()
        draw("circle", "red").save(buffer, format="PNG")
        maker = path.stem
        lamp = ("Lamp, small", 'Lamp, small, "Lights"')
        captions = {"lamp, small": lamp, f"bed {maker}": (f"Bed {maker}",)}
        return [Example(f"{maker}/{g}", g, c, buffer.getvalue(), {}) for g, c in captions.items()]

    monkeypatch.setattr(build_furniture, "read_catalogue", catalogue)
    assert build_furniture.write_table(tmp_path / "in", tmp_path / "out") == 10
    bad = BadExamples()
    columns = ("name", "description")
    data = DataConfig(
        source=str(tmp_path / "out" / "products.csv"),
        caption_columns=columns,
        group_column="product",
    )
    sources = build_sources(data, bad, training=False).values()
    examples = [source[i] for source in sources for i in range(len(source))]
    assert len(examples) == 10
    assert len({example.group for example in examples}) == 6
    lamps = [example.captions for example in examples if "Lamp, small" in example.captions]
    assert lamps == [("Lamp, small", 'Lamp, small, "Lights"')] * 5
