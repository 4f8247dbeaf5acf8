"""`clip-lite index` and `clip-lite search`: what is found, kept, and refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
from conftest import COLOURS, SHAPES, draw, tiny_config

import clip_lite_jax
from clip_lite_jax import cli
from clip_lite_jax.apps import encoding, index_build, index_faiss, index_files
from clip_lite_jax.apps import index as index_module
from clip_lite_jax.apps.identity import identity_of
from clip_lite_jax.apps.index import Hit, Index, best
from clip_lite_jax.apps.index_build import Built, Options, build_index
from clip_lite_jax.apps.queries import ModelEncoder, Part, Query, combined, query, removed
from clip_lite_jax.apps.search import Request, find, text_index
from clip_lite_jax.config import CriticConfig, DataConfig
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.models import build_model


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return clip_lite_jax.load(finished_run, batch_size=16)


@pytest.fixture(scope="module")
def indexed(
    model: DualEncoderModel,
    finished_run: Path,
    pairs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An index of the 48 pictures and their 96 captions."""
    folder = tmp_path_factory.mktemp("indexed") / "index"
    data, options = DataConfig(source=str(pairs)), Options("both")
    built = build_index(model, data, folder, options, str(finished_run))
    assert built.rows == {"images": 48, "texts": 96}
    return folder


def no_model() -> DualEncoderModel:
    raise AssertionError("a model was loaded")


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def test_the_best_are_the_first_of_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 50):
        for _ in range(40):
            values = rng.integers(-3, 4, size).astype(np.float32)  # full of ties
            values[rng.random(size) < 0.1] = np.nan
            count = int(rng.integers(1, size + 1))
            places, found = best(values, count)
            known = [(-np.inf if np.isnan(v) else v, -n) for n, v in enumerate(values.tolist())]
            order = sorted(range(size), key=lambda n: known[n], reverse=True)[:count]
            assert places.tolist() == order
            assert found.tolist() == [known[n][0] for n in order]


def test_texts_find_pictures_by_the_score_of_the_critic(
    model: DualEncoderModel, indexed: Path, pairs: Path
) -> None:
    index = Index.open(indexed)
    hits = index.search(ModelEncoder(model).text("a red circle"), count=48)
    files = [hit.path for hit in hits]
    assert all(file is not None and file.parent == pairs.parent for file in files)
    expected = model.score(files, ["a red circle"] * 48)  # type: ignore[arg-type]
    np.testing.assert_allclose([hit.value for hit in hits], expected, atol=1e-3)
    assert [hit.value for hit in hits] == sorted([hit.value for hit in hits], reverse=True)
    assert index.picture(hits[0]) == files[0].read_bytes()  # type: ignore[union-attr]
    assert ids(index.search(ModelEncoder(model).text("a red circle"), count=3)) == ids(hits)[:3]


def test_pictures_find_pictures_and_texts(
    model: DualEncoderModel, indexed: Path, pairs: Path, tmp_path: Path
) -> None:
    index, picture = Index.open(indexed), pairs.parent / "red_ring.png"
    alike = find(index, Request([Part(image=picture)], count=48), no_model)  # it is in the index
    assert alike[0].id == "red_ring.png"
    assert alike[0].value == pytest.approx(1, abs=1e-5)
    rows = model.encode_image([hit.path for hit in alike])  # type: ignore[misc]
    np.testing.assert_allclose([hit.value for hit in alike], rows @ rows[0], atol=1e-5)
    draw("ring", "red").save(tmp_path / "elsewhere.png")
    request = Request([Part(image=tmp_path / "elsewhere.png")], count=48)
    assert ids(find(index, request, lambda: model)) == ids(alike)
    texts = find(index, Request([Part(image=picture)], count=96, kind="texts"), no_model)
    captions = [hit.caption for hit in texts]
    assert sorted(captions) == sorted(  # type: ignore[type-var]
        text for c in COLOURS for s in SHAPES for text in (f"a {c} {s}", f"{s} in {c}")
    )
    expected = model.score([picture] * 96, captions)  # type: ignore[arg-type]
    np.testing.assert_allclose([hit.value for hit in texts], expected, atol=1e-3)
    (tmp_path / "lines.txt").write_text("a red ring\n\na blue bar\na red ring\n")
    lines = text_index(model, tmp_path / "lines.txt")
    found = find(lines, Request([Part(image=picture)], kind="texts"), lambda: model)
    assert {hit.caption for hit in found} == {"a red ring", "a blue bar"}
    by_graph = text_index(model, tmp_path / "lines.txt", method="exact")
    assert find(by_graph, Request([Part(image=picture)], kind="texts"), lambda: model) == found
    if index_faiss.available():
        by_graph = text_index(model, tmp_path / "lines.txt", method="faiss")
        more = find(by_graph, Request([Part(image=picture)], kind="texts"), lambda: model)
        assert [hit.caption for hit in more] == [hit.caption for hit in found]
    with pytest.raises(DataError, match="--image nowhere.png: "):
        find(index, Request([Part(image=Path("nowhere.png"))]), lambda: model)


def test_sums_and_removals_are_arithmetic_of_unit_embeddings(
    model: DualEncoderModel, indexed: Path, pairs: Path
) -> None:
    picture, index = pairs.parent / "red_ring.png", Index.open(indexed)
    parts = [Part(image=picture), Part("a blue bar", weight=0.5), Part("pink", weight=-2)]
    found = query(ModelEncoder(model), parts)
    image, texts = model.encode_image([picture])[0], model.encode_text(["a blue bar", "pink"])
    total = image + 0.5 * texts[0] - 2 * texts[1]
    np.testing.assert_allclose(found.embedding, total / np.linalg.norm(total), atol=1e-5)
    hits = find(index, Request(parts, count=48), lambda: model)
    rows = model.encode_image([hit.path for hit in hits])  # type: ignore[misc]
    np.testing.assert_allclose([hit.value for hit in hits], rows @ found.embedding, atol=1e-5)

    without = query(ModelEncoder(model), [Part("a red ring")], ["red", "a red", "red"])
    q = model.encode_text(["a red ring"])[0].astype(np.float64)
    concepts = model.encode_text(["red", "a red"]).T.astype(np.float64)
    rest = q - concepts @ np.linalg.lstsq(concepts, q, rcond=None)[0]  # what they do not explain
    np.testing.assert_allclose(without.embedding, rest / np.linalg.norm(rest), atol=1e-4)
    # The same order as with the concepts taken out of the pictures.
    cut = rows - (concepts @ np.linalg.lstsq(concepts, rows.T, rcond=None)[0]).T
    np.testing.assert_allclose(rows @ without.embedding, cut @ without.embedding, atol=1e-4)
    assert without.side == "mixed"
    with pytest.raises(ConfigError, match="leaves nothing"):
        removed(texts[0], [texts[0]])
    with pytest.raises(ConfigError, match="cancel"):
        combined([texts[0], 3 * texts[0]], [1, -1])
    with pytest.raises(ConfigError, match="needs a query"):
        query(ModelEncoder(model), [])


def snapshot(folder: Path) -> dict[str, list[float]]:
    index = Index.open(folder)
    rows = range(index.count())
    return {index.hit(row).id: index.embedding(row).tolist() for row in rows}


def test_only_what_is_new_is_encoded(model: DualEncoderModel, tmp_path: Path) -> None:
    pictures, folder = tmp_path / "pictures", tmp_path / "index"
    pictures.mkdir()
    for colour in ("red", "blue", "green"):
        draw("ring", colour).save(pictures / f"{colour}.png")
    (pictures / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    data = DataConfig(source=str(pictures))
    built = build_index(model, data, folder)
    assert (built.rows, built.encoded, built.removed) == ({"images": 3}, 3, 0)
    assert [id for id, _ in built.skipped] == ["torn.jpg"]
    files = {path: path.stat().st_mtime_ns for path in folder.glob("images-*")}
    again = build_index(model, data, folder)
    assert again == replace(built, encoded=0)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("images-*")} == files

    draw("bar", "pink", size=40).save(pictures / "blue.png")  # another picture of the same name
    draw("bar", "black").save(pictures / "a new one.png")
    draw("cross", "black").save(pictures / "torn.jpg")
    (pictures / "red.png").unlink()
    built = build_index(model, data, folder)
    assert built == Built({"images": 4}, encoded=3, removed=2, skipped=[])
    assert len(list(folder.glob("images-*"))) == 2  # the one before is gone
    build_index(model, data, tmp_path / "fresh")
    assert snapshot(folder) == snapshot(tmp_path / "fresh")


def test_large_photographs_can_be_decoded_smaller(
    model: DualEncoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    for shape in SHAPES[:3]:
        draw(shape, "red", size=640).save(tmp_path / "pictures" / f"{shape}.jpg", quality=95)
    data, sizes = DataConfig(source=str(tmp_path / "pictures")), set()
    resize = encoding.resize_and_crop
    monkeypatch.setattr(
        encoding,
        "resize_and_crop",
        lambda image, *more: sizes.add(image.size) or resize(image, *more),
    )
    build_index(model, data, tmp_path / "fast", Options(fast=True))
    assert sizes == {(80, 80)}  # an eighth, the smallest that a decoder of JPEG makes
    build_index(model, data, tmp_path / "whole")
    fast, whole = Index.open(tmp_path / "fast"), Index.open(tmp_path / "whole")
    for row in range(3):
        assert fast.embedding(row) @ whole.embedding(row) > 0.99
    with pytest.raises(ConfigError, match="fast: True there, False now"):
        build_index(model, data, tmp_path / "fast")


def test_a_build_cut_short_goes_on_where_it_was(
    model: DualEncoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, folder = tmp_path / "pictures", tmp_path / "index"
    pictures.mkdir()
    for number, shape in enumerate(SHAPES):
        draw(shape, "red").save(pictures / f"{number}.png")
    data = DataConfig(source=str(pictures))
    monkeypatch.setattr(index_build, "PART", 2)

    def stop(done: int, total: int) -> None:
        assert total == 6
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(model, data, folder, progress=stop)
    with pytest.raises(DataError, match="holds no index"):
        Index.open(folder)
    first = sorted((folder / "parts").iterdir())[0]
    first.write_bytes(first.read_bytes()[:-20])  # damaged parts are encoded again
    (folder / "parts" / f"{'0' * 32}.parquet").write_bytes(b"PAR1")
    assert build_index(model, data, folder).encoded == 4
    assert list((folder / "parts").iterdir()) == []
    build_index(model, data, tmp_path / "fresh")
    assert snapshot(folder) == snapshot(tmp_path / "fresh")


def test_what_an_index_is_not_of_is_refused(
    model: DualEncoderModel, indexed: Path, pairs: Path, tmp_path: Path
) -> None:
    data = DataConfig(source=str(pairs))
    other = DualEncoderModel(
        model.config, model.model, model.params, model.model_state, model.tokenizer
    )
    bias = model.params["critic"]["score_bias"] + 1
    other.params = {**model.params, "critic": {**model.params["critic"], "score_bias": bias}}
    message = (
        r"made with .*finished_run0 \(weights \w{12}, step 4\), not with /.*/my/run \(weights "
    )
    with pytest.raises(ConfigError, match=message):
        build_index(other, data, indexed, Options("both"), "my/run")
    with pytest.raises(ConfigError, match="what: 'both' there, 'image' now"):
        build_index(model, data, indexed)
    elsewhere = replace(data, source=str(pairs.parent))
    with pytest.raises(ConfigError, match="source: '.*pairs.csv' there, '.*pairs0' now"):
        build_index(model, replace(elsewhere, format="pictures"), indexed, Options("both"))
    index = Index.open(indexed)
    with pytest.raises(ConfigError, match="16 numbers here"):
        index.search(np.zeros(3, np.float32))
    with pytest.raises(ConfigError, match="--count 0"):
        index.search(np.ones(16, np.float32), count=0)
    with pytest.raises(ConfigError, match="--method magic: choose from auto, exact, faiss"):
        Index.open(indexed, "magic")
    with pytest.raises(ConfigError, match="'sounds': choose from images, texts"):
        index.search(np.ones(16, np.float32), kind="sounds")


def test_a_graph_finds_what_comparing_all_finds(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(index_module, "FAISS_ABOVE", 40)
    there = sorted(indexed.iterdir())
    exact, auto = Index.open(indexed, "exact"), Index.open(indexed)
    asked = Query(exact.embedding(7), "text")
    assert "no graph" in auto.slow()
    assert auto.search(asked) == exact.search(asked)
    assert auto.prepare()
    assert auto.slow() == ""
    found, expected = auto.search(asked, 10), exact.search(asked, 10)
    assert ids(found) == ids(expected)
    np.testing.assert_allclose([h.value for h in found], [h.value for h in expected], rtol=1e-5)
    assert sorted(indexed.iterdir()) == there  # it is in the cache, not in the index
    (kept,) = (tmp_path / "cache" / "faiss").iterdir()
    before = kept.with_name(f"{kept.name.partition('-')[0]}-{'0' * 32}.hnsw")
    kept.rename(before)  # of an index that has changed since
    assert Index.open(indexed, "faiss").search(asked, 10) == found
    assert list((tmp_path / "cache" / "faiss").iterdir()) == [kept]
    monkeypatch.setattr(index_faiss, "available", lambda: False)
    assert "clip_lite_jax[faiss]" in Index.open(indexed).slow()
    assert Index.open(indexed).search(asked) == exact.search(asked)


def test_a_graph_that_cannot_be_used_is_made_again_or_done_without(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faiss = pytest.importorskip("faiss")
    asked, expected = Query(Index.open(indexed).embedding(7), "text"), Index.open(indexed, "exact")
    truth = ids(expected.search(asked, 5))
    assert ids(Index.open(indexed, "faiss").search(asked, 5)) == truth
    (file,) = (tmp_path / "cache" / "faiss").iterdir()
    whole = file.read_bytes()
    of_others = faiss.IndexHNSWFlat(16, 32, faiss.METRIC_INNER_PRODUCT)
    of_others.add(np.eye(16, dtype=np.float32)[:3])
    faiss.write_index(of_others, str(tmp_path / "others"))
    for content in (b"", b"x" * 100, whole[: len(whole) // 2], (tmp_path / "others").read_bytes()):
        file.write_bytes(content)
        assert ids(Index.open(indexed, "faiss").search(asked, 5)) == truth
        assert f"{file} cannot be used" in caplog.text
        assert file.read_bytes() == whole
        caplog.clear()
    file.write_bytes(b"x")
    monkeypatch.setattr(index_module, "FAISS_ABOVE", 40)
    assert ids(Index.open(indexed).search(asked, 5)) == truth  # by comparing all
    assert not file.exists()
    monkeypatch.setenv("CLIP_LITE_CACHE", str(tmp_path / "others"))  # a file: nothing goes below
    assert ids(Index.open(indexed, "faiss").search(asked, 5)) == truth
    assert "cannot be kept" in caplog.text


def test_a_search_sees_one_index_while_another_is_made(
    model: DualEncoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, folder = tmp_path / "pictures", tmp_path / "index"
    pictures.mkdir()
    draw("ring", "red").save(pictures / "a.png")
    data, read = DataConfig(source=str(pictures)), index_files.read_manifest
    build_index(model, data, folder)
    draw("ring", "blue").save(pictures / "b.png")

    def read_before_a_build(folder: Path) -> index_files.Manifest:
        manifest = read(folder)
        monkeypatch.setattr(index_files, "read_manifest", read)
        build_index(model, data, folder)
        return manifest

    monkeypatch.setattr(index_files, "read_manifest", read_before_a_build)
    assert Index.open(folder).count() == 2


def test_a_forged_root_gives_pictures_alone(indexed: Path, tmp_path: Path) -> None:
    folder, secrets = tmp_path / "index", tmp_path / "secrets"
    shutil.copytree(indexed, folder)
    secrets.mkdir()
    (secrets / "passwd").write_text("root:x:0:0")
    (secrets / "key.png").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    draw("ring", "red").save(secrets / "bare", "PNG")
    draw("ring", "red").save(secrets / "a.PNG")
    manifest = replace(index_files.read_manifest(folder), root=str(tmp_path))
    index_files.write_manifest(folder, manifest)
    generation = manifest.sets["images"].generation
    _, table = index_files.paths(folder, "images", generation)
    rows = index_files.read_table(table, index_files.COLUMNS["images"])
    names = [f"secrets/{name}" for name in ("passwd", "key.png", "bare", "a.PNG")]
    forged = pa.array([*names, *rows["path"].to_pylist()[4:]], pa.large_string())
    index_files.write_table(table, rows.set_column(3, "path", forged))
    index = Index.open(folder)
    found = [index.picture(index.hit(row)) for row in range(5)]
    assert found == [None, None, None, (secrets / "a.PNG").read_bytes(), None]


def test_an_index_of_strangers_opens_nothing_else(indexed: Path, tmp_path: Path) -> None:
    def changed(text: str, change: tuple[str, str]) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for path in indexed.glob("*-*"):
            (folder / path.name).write_bytes(path.read_bytes())
        assert change[0] in text
        (folder / "index.json").write_text(text.replace(*change))
        return folder

    text = (indexed / "index.json").read_text()
    known = json.loads(text)
    generation = known["sets"]["images"]["generation"]
    for change, message in (
        ((generation, "../" + "0" * 29), "generation"),
        ((generation, "0" * 32), "make the index anew"),
        (('"width": 16', '"width": 8'), "make the index anew"),
        (('"count": 48', '"count": 47'), "make the index anew"),
        (('"format": 1', '"format": 2'), "has format 2"),
        (('"images"', '"films"'), "films"),
        (('"skipped"', '"run": "rm -r", "skipped"'), "run: Unexpected"),
        ((text, "[" * 100_000), "is damaged"),
    ):
        with pytest.raises(DataError, match=message):
            Index.open(changed(text, change))
    folder = changed(text, ("", ""))
    np.save(folder / f"images-{generation}.npy", np.full((48, 16), None), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects in dtype"):
        Index.open(folder)
    (tmp_path / "secret.png").write_bytes(b"secret")
    root = Path(known["root"])
    outside = [root / "../../etc/passwd", Path("/etc/passwd"), tmp_path / "secret.png"]
    index = Index.open(indexed)
    assert [index.picture(Hit(0, "x", 0.0, path)) for path in outside] == [None] * 3


@pytest.mark.parametrize("critic", ["bilinear", "separable"])
def test_critics_whose_scores_depend_on_lengths(
    model: DualEncoderModel, pairs: Path, tmp_path: Path, critic: str
) -> None:
    options = {"width": 16} if critic == "bilinear" else {"width": 16, "hidden": 16}
    known = replace(model.config.model, critic=CriticConfig(name=critic, options=options))
    config = tiny_config(pairs, model=known)
    data, size = config.data, model.tokenizer.vocab_size
    built = build_model(known, data.image_size, size, data.max_tokens, config.objective)
    params, state = jax.jit(built.init)(jax.random.key(0))
    one = DualEncoderModel(config, built, params, state, model.tokenizer, 16)
    identity = identity_of(one)
    assert identity.affine
    assert not identity.unit
    build_index(one, DataConfig(source=str(pairs)), tmp_path / "index")
    index, picture = Index.open(tmp_path / "index"), pairs.parent / "red_ring.png"
    hits = find(index, Request([Part("a red bar")], count=48), lambda: one)
    files = [hit.path for hit in hits]
    expected = one.score(files, ["a red bar"] * 48)  # type: ignore[arg-type]
    np.testing.assert_allclose([hit.value for hit in hits], expected, atol=1e-4)
    assert [hit.value for hit in hits] == sorted([hit.value for hit in hits], reverse=True)
    lengths = np.linalg.norm(one.project_image(files), axis=1)  # type: ignore[arg-type]
    assert lengths.std() > 0
    alike = find(index, Request([Part(image=picture)], count=48), lambda: one)
    assert alike[0].id == "red_ring.png"
    rows = one.encode_image([hit.path for hit in alike])  # type: ignore[misc]
    np.testing.assert_allclose([hit.value for hit in alike], rows @ rows[0], atol=1e-4)
    if index_faiss.available():
        with pytest.raises(ConfigError, match=f"a {critic} critic does not"):
            Index.open(tmp_path / "index", "faiss").search(np.ones(identity.width, np.float32))


def test_long_files_of_texts_are_read_line_by_line(
    model: DualEncoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\ufeffa red ring\n\n" + "a blue bar\r\n" * 100_000, encoding="utf-8")
    assert file.stat().st_size > 1_000_000
    index = text_index(model, file)
    assert [index.hit(n, "texts").caption for n in range(2)] == ["a red ring", "a blue bar"]
    assert index.count("texts") == 2
    for content, message in ((b"a\n" + b"x" * 1_000_001, "line 2 has over"), (b"\xff", "utf-8")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            text_index(model, file)


def test_critics_without_an_inner_product_score_every_row(
    model: DualEncoderModel, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"hidden": 16, "layers": 2}
    config = replace(
        tiny_config(pairs),
        model=replace(model.config.model, critic=CriticConfig(name="concat", options=options)),
    )
    data = config.data
    built = build_model(
        config.model, data.image_size, model.tokenizer.vocab_size, data.max_tokens, config.objective
    )
    params, state = jax.jit(built.init)(jax.random.key(0))
    concat = DualEncoderModel(config, built, params, state, model.tokenizer, 16)
    assert not identity_of(concat).affine
    build_index(concat, DataConfig(source=str(pairs)), tmp_path / "index")
    index, request = Index.open(tmp_path / "index"), Request([Part("a red bar")], count=48)
    monkeypatch.setattr(index_module, "_BLOCK", 20)
    hits = find(index, request, lambda: concat)
    expected = concat.score([hit.path for hit in hits], ["a red bar"] * 48)  # type: ignore[misc]
    np.testing.assert_allclose([hit.value for hit in hits], expected, atol=1e-4)
    assert [hit.value for hit in hits] == sorted([hit.value for hit in hits], reverse=True)
    picture = pairs.parent / "red_ring.png"
    with pytest.raises(ConfigError, match="a concat critic compares a text with pictures"):
        find(index, Request([Part(image=picture)]), lambda: concat)
    with pytest.raises(ConfigError, match="projections of a concat critic are not"):
        find(index, Request([Part("red")], without=["bar"]), lambda: concat)


def test_three_commands(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures, index = tmp_path / "pictures", tmp_path / "index"
    pictures.mkdir()
    for colour in ("red", "blue"):
        draw("circle", colour).save(pictures / f"{colour}.png")
    (pictures / "broken.png").write_bytes(b"x")
    make = ["index", "--model", str(finished_run), "--images", str(pictures), "--out", str(index)]
    assert cli.main(make) == 0
    printed = capsys.readouterr()
    assert "2 images; 2 encoded, 0 removed" in printed.out
    assert "skipped broken.png: cannot be decoded" in printed.err
    search = ["search", "--index", str(index)]
    assert cli.main([*search, "a circle", "--count", "1"]) == 0
    value, path = capsys.readouterr().out.split()
    assert float(value)
    assert path in {str(pictures / "red.png"), str(pictures / "blue.png")}
    mixed = ["--image", str(pictures / "red.png"), "--text", "at night", "--weights=1,-0.5"]
    assert cli.main([*search, *mixed, "--json", "--without", "red"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {hit["id"] for hit in found} == {"red.png", "blue.png"}
    for wrong, message in (
        (["a", "--weights=1,2"], "--weights=1,2: give a number for each of the 1 texts"),
        (["a", "--find", "texts"], "holds no texts"),
        ([], "needs a query"),
        (["a", "--method", "faiss ", "--count", "1"], "--method faiss : choose from"),
    ):
        assert cli.main([*search, *wrong]) == 2
        assert message in capsys.readouterr().err
    for wrong, message in (
        (["--out=gs://bucket/index"], "--out gs:/bucket/index: write to a folder"),
        (["--config.steps=1"], "only fields of data count here"),
    ):
        assert cli.main([*make, *wrong]) == 2
        assert message in capsys.readouterr().err
    for where in (["--images", str(pictures)], ["--texts", str(index / "index.json")]):
        wrong = ["search", "--model", str(finished_run), *where, "a", "--method", "exakt"]
        with monkeypatch.context() as patch:
            patch.setattr("clip_lite_jax.inference.load", no_model)
            assert cli.main(wrong) == 2
        assert "--method exakt: choose from auto, exact, faiss" in capsys.readouterr().err
    text = (index / "index.json").read_text()
    there = json.dumps(str(finished_run))
    (index / "index.json").write_text(text.replace(there, '"http://127.0.0.1:9/run"'))
    assert cli.main([*search, "a circle"]) == 2
    assert "give it as --model" in capsys.readouterr().err
    (index / "index.json").write_text(text.replace(there, '"/no/such/run"'))
    assert cli.main([*search, "a circle"]) == 2
    assert "was made with /no/such/run (weights " in (printed := capsys.readouterr().err)
    assert "give --model" in printed
