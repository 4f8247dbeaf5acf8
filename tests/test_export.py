"""Models as folders for others: what is written reads back, and what differs is refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from conftest import draw, tiny_config
from tokenizers import models, normalizers, pre_tokenizers, processors

import clip_lite_jax
from clip_lite_jax import cli
from clip_lite_jax.apps import export as exporting
from clip_lite_jax.apps import export_towers
from clip_lite_jax.apps.export import export
from clip_lite_jax.config import EncoderConfig, ModelConfig, Options
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.models import build_model
from clip_lite_jax.pretrained.files import read_weights, write_safetensors
from clip_lite_jax.pretrained.own import OWN_FILE, WEIGHTS_FILE
from clip_lite_jax.pretrained.towers import load_towers, resolve

RESNET: Options = {"layers": [1, 1, 1, 1], "width": 8}
BERT: Options = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "positions": 40}
VIT: Options = {"patch": 8, "width": 16, "layers": 2, "heads": 2}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "photo", "of", "two", "x")
MPNET_WORDS = ("<s>", "<pad>", "</s>", "<unk>", *WORDS[4:])


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "whole"
    export(finished_run, out)
    return out


def word_piece(words: tuple[str, ...]) -> bytes:
    """A ``tokenizer.json`` of BERT's kind."""
    vocabulary = {word: number for number, word in enumerate(words)}
    unknown = "[UNK]" if "[UNK]" in vocabulary else "<unk>"
    first, last = ("[CLS]", "[SEP]") if "[CLS]" in vocabulary else ("<s>", "</s>")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        (last, vocabulary[last]), (first, vocabulary[first])
    )
    return tokenizer.to_str().encode()


def untrained(
    image: EncoderConfig, text: EncoderConfig, tokenizer: bytes, size: int = 16
) -> DualEncoderModel:
    """A tiny model with weights off their starting values, statistics included."""
    config = tiny_config(Path("nowhere"))
    parts = ModelConfig(image=image, text=text, critic=config.model.critic)
    config = replace(config, model=parts, data=replace(config.data, image_size=size))
    vocabulary = Tokenizer(tokenizer, config.data.max_tokens)
    model = build_model(parts, size, vocabulary.vocab_size, config.data.max_tokens)
    params, state = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(1)

    def moved(start: Any) -> np.ndarray:
        return np.asarray(start + rng.uniform(0, 0.1, start.shape), start.dtype)

    params, state = jax.tree.map(moved, (params, state))
    return DualEncoderModel(config, model, params, state, vocabulary)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[DualEncoderModel], None]:
    """Makes `export` find a model that was never trained."""

    def use(model: DualEncoderModel) -> None:
        load = exporting.load

        def known(path: Path) -> DualEncoderModel:
            return load(path) if (path / OWN_FILE).is_file() else model

        monkeypatch.setattr(exporting, "load", known)

    return use


def resnet_and_bert() -> DualEncoderModel:
    return untrained(
        EncoderConfig(name="resnet50", options=RESNET),
        EncoderConfig(name="bert", options=BERT),
        word_piece(WORDS),
        32,
    )


def vit_and_mpnet() -> DualEncoderModel:
    return untrained(
        EncoderConfig(name="vit_ti16", options=VIT),
        EncoderConfig(name="mpnet", options={**BERT, "scan": True}),
        word_piece(MPNET_WORDS),
    )


def snippets(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def test_the_whole_model_reads_back(finished_run: Path, folder: Path) -> None:
    live, read = clip_lite_jax.load(finished_run), clip_lite_jax.load(folder)
    texts, pictures = ["a red circle", "bar in blue"], [draw("bar", "red"), draw("ring", "blue")]
    np.testing.assert_array_equal(live.encode_text(texts), read.encode_text(texts))
    np.testing.assert_array_equal(live.score(pictures, texts), read.score(pictures, texts))
    assert read.data_fingerprint == live.data_fingerprint != ""
    names = {OWN_FILE, WEIGHTS_FILE, "README.md", "tokenizer.model"}
    assert {path.name for path in folder.iterdir()} == names
    weights = read_weights(folder)
    assert {name.split("/")[0] for name in weights} == {"image_encoder", "text_encoder", "critic"}


def test_equal_models_make_equal_bytes(finished_run: Path, folder: Path, tmp_path: Path) -> None:
    export(finished_run, tmp_path / "whole")
    for file in folder.iterdir():
        assert (tmp_path / "whole" / file.name).read_bytes() == file.read_bytes(), file.name
    # What was exported can be exported again.
    export(folder, tmp_path / "again")
    for name in (OWN_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_starts_from_an_exported_folder(folder: Path, pairs: Path) -> None:
    base = tiny_config(pairs)
    towers = {
        "image": EncoderConfig(name="convnet", init_from=str(folder)),
        "text": EncoderConfig(name="transformer", init_from=str(folder)),
    }
    config = resolve(replace(base, model=replace(base.model, **towers)))
    assert config.model.image.options["widths"] == [8, 16]
    assert config.data.tokenizer == str(folder / "tokenizer.model")
    read = clip_lite_jax.load(folder)
    found = load_towers(read.model, config.model)
    for tower in ("image_encoder", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, found[tower]["params"], read.params[tower])
    wrong = EncoderConfig(name="resnet18", init_from=str(folder))
    with pytest.raises(ConfigError, match=r"'resnet18', but .* holds 'convnet'"):
        resolve(replace(base, model=replace(base.model, image=wrong)))


def test_word_vectors_start_from_a_folder(
    use: Callable[[DualEncoderModel], None], tmp_path: Path
) -> None:
    text = EncoderConfig(name="word_vectors", options={"width": 8})
    image = EncoderConfig(name="vit_ti16", options=VIT)
    model = untrained(image, text, word_piece(WORDS))
    use(model)
    export(tmp_path / "none", tmp_path / "out")
    start = replace(text, init_from=str(tmp_path / "out"))
    found = load_towers(model.model, replace(model.config.model, text=start))
    assert found["text_encoder"]["params"].keys() == model.params["text_encoder"].keys()


@pytest.mark.parametrize("build", [resnet_and_bert, vit_and_mpnet])
@pytest.mark.parametrize("format_name", ["safetensors", "torchvision", "hf", "stablehlo"])
def test_foreign_encoders_agree(
    build: Callable[[], DualEncoderModel],
    format_name: str,
    use: Callable[[DualEncoderModel], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if format_name == "stablehlo":
        pytest.importorskip("flatbuffers")
    use(build())
    agreements = export(tmp_path / "none", tmp_path / "out", format_name)
    assert agreements
    assert all(found.relative < 1e-5 and found.cosine > 0.999999 for found in agreements)
    if format_name == "torchvision":
        stated = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
        assert stated["names"] == "torchvision"
        (snippet,) = snippets(tmp_path / "out" / "README.md")
        monkeypatch.chdir(tmp_path)
        exec(snippet, made := {})
        assert made["weights"].keys() == read_weights(tmp_path / "out" / "model.pth").keys()
    if format_name == "hf":
        mpnet = build is vit_and_mpnet
        stated = json.loads((tmp_path / "out" / "config.json").read_text())
        assert stated["architectures"] == ["MPNetModel" if mpnet else "BertModel"]
        assert (tmp_path / "out" / "modules.json").exists() == mpnet  # its pooling is the mean


def test_detectron2_gets_its_settings(
    use: Callable[[DualEncoderModel], None], tmp_path: Path
) -> None:
    use(resnet_and_bert())
    export(tmp_path / "none", tmp_path / "out", "detectron2")
    assert "stem.conv1.weight" in read_weights(tmp_path / "out" / "model.pkl")
    settings = json.loads((tmp_path / "out" / "preprocessing.json").read_text())["settings"]
    assert settings["MODEL.PIXEL_MEAN"] == [127.5, 127.5, 127.5]


@pytest.mark.parametrize("format_name", ["torchvision", "detectron2", "hf", "onnx"])
def test_what_a_model_cannot_be_is_told(
    format_name: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--model", str(finished_run), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--format", format_name]) == 2
    assert "safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["vit_ti16", "siglip_vit_b16"])
def test_vision_transformers_that_torchvision_lacks_go_to_timm(
    name: str, use: Callable[[DualEncoderModel], None], tmp_path: Path
) -> None:
    image = EncoderConfig(name=name, options={**VIT, "activation": "gelu_tanh"})
    text = EncoderConfig(name="word_vectors", options={"width": 8})
    use(untrained(image, text, word_piece(WORDS)))
    export(tmp_path / "none", tmp_path / "out", "torchvision")
    stated = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert (stated["names"], stated["image_encoder"]["activation"]) == ("timm", "gelu_tanh")


def test_an_export_that_differs_leaves_nothing(
    use: Callable[[DualEncoderModel], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(path: Path, weights: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        changed = weights | {"conv1.weight": weights["conv1.weight"] * np.float32(1.01)}
        write_safetensors(path, changed, metadata)

    use(resnet_and_bert())
    monkeypatch.setattr(export_towers, "write_safetensors", careless)
    with pytest.raises(CheckpointError, match=r"image_features of model.safetensors differs"):
        export(tmp_path / "none", tmp_path / "out", "torchvision")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_diverged_is_not_written(
    use: Callable[[DualEncoderModel], None], tmp_path: Path
) -> None:
    model = resnet_and_bert()
    model.params["critic"]["score_bias"] = np.float32(np.nan)
    use(model)
    with pytest.raises(CheckpointError, match="not finite"):
        export(tmp_path / "none", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_in_use_are_left_alone(folder: Path, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty: choose another folder, or give --force"):
        export(folder, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="torchvision and timm have no equal"):
        export(folder, out, "torchvision", force=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    export(folder, out, force=True)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ConfigError, match="is or holds the model itself"):
        export(finished_run, finished_run, force=True)
    with pytest.raises(ConfigError, match="is or holds the model itself"):
        export(finished_run, finished_run.parent, force=True)
    with pytest.raises(ConfigError, match="is or holds the current folder"):
        export(folder, Path(), force=True)
    with pytest.raises(ConfigError, match="is a file"):
        export(folder, out / OWN_FILE)


def test_the_card_tells_of_the_run_and_its_snippet_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (folder / "README.md").read_text()
    for told in (
        "train: ",
        "R@10",
        "chance",
        "Apache License 2.0",
        "centre of 16 x 16",
        "steps: 4",
    ):
        assert told in card, told
    assert str(folder.parent) not in card
    monkeypatch.chdir(folder.parent)
    draw("circle", "red").save("picture.png")
    (snippet,) = snippets(folder / "README.md")
    made: dict[str, Any] = {}
    exec(snippet, made)
    assert made["pictures"].shape == made["texts"].shape == (1, 16)


def test_programs_run_without_the_package(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flatbuffers")
    out = tmp_path / "programs"
    arguments = ["export", "--model", str(finished_run), "--out", str(out)]
    assert cli.main([*arguments, "--format", "stablehlo"]) == 0
    printed = capsys.readouterr().out
    assert "batch of 4, scores: largest error" in printed
    assert "batch of 1, image: largest error" in printed
    for file in out.glob("*.stablehlo"):
        assert str(Path(exporting.__file__).parents[1]).encode() not in file.read_bytes()
    (snippet,) = snippets(out / "README.md")
    blocked = "import sys; sys.modules['clip_lite_jax'] = None\n"
    shown = "\nprint(pictures.shape, texts.shape, scores.shape)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", blocked + snippet + shown],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "(2, 16) (2, 16) (2,)\n", done.stderr
