"""Tokenizers of other projects against their own, awkward captions, and files that are wrong.

``data/text_encoders.npz`` and ``data/clip_bpe`` (what seven sentences need of CLIP's vocabulary,
github.com/openai/CLIP, MIT) were written by ``benchmarks/text_encoder_references.py``.
"""

import gzip
import itertools
import json
import pickle
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from test_text_encoders import REFERENCE, SENTENCES, minilm

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.caption_ops import normalize_as_published
from clip_lite_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from clip_lite_jax.errors import ConfigError, UserError

CLIP_BPE = Path(__file__).parent / "data" / "clip_bpe"

AWKWARD = (
    "",
    " \t\n ",
    "a\x00b \x07 \u200b",
    "ﬁne CAFÉ naïve Ångström",
    "猫 🐈‍⬛ 👍🏽",
    "x" * 500,
    "word " * 3000,
    "!!! ... ??? --- ___",
    "\ufeffmark \u202eturned",
)


def clip(max_tokens: int = 40) -> Tokenizer:
    return load_tokenizer(CLIP_BPE, DataConfig(max_tokens=max_tokens))


def pieces() -> bytes:
    return train_tokenizer(["a red cat", "a blue dog", "two naïve cats"] * 5, 60)


def every_kind(tmp_path: Path) -> dict[str, Tokenizer]:
    (tmp_path / "vectors.txt").write_text("cat 1 2\ndog 3 4\n")
    (tmp_path / "model").write_bytes(pieces())
    config = DataConfig(max_tokens=12)
    paths = (minilm(), CLIP_BPE, tmp_path / "vectors.txt", tmp_path / "model")
    return {path.name: load_tokenizer(path, config) for path in paths}


def test_word_pieces_of_a_vocabulary_are_those_of_berts_tokenizer(tmp_path: Path) -> None:
    shutil.copy(minilm() / "vocab.txt", tmp_path)
    ids, mask = load_tokenizer(tmp_path, DataConfig(max_tokens=64))(SENTENCES)
    np.testing.assert_array_equal(ids, REFERENCE["minilm/ids"])
    np.testing.assert_array_equal(mask, ids != 0)
    config = DataConfig(max_tokens=16)
    ours, whole = load_tokenizer(tmp_path, config), load_tokenizer(minilm(), config)
    np.testing.assert_array_equal(ours(AWKWARD)[0], whole(AWKWARD)[0])


def test_a_vocabulary_can_keep_the_case(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nCat\ncat\n##s\n")
    config = DataConfig(max_tokens=8)
    assert load_tokenizer(tmp_path, config)(["Cats"])[0][0].tolist() == [2, 5, 6, 3, 0, 0, 0, 0]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path, config)(["Cats"])[0][0].tolist() == [2, 4, 6, 3, 0, 0, 0, 0]


def test_byte_pairs_are_those_of_clip() -> None:
    ids, mask = clip()(SENTENCES)
    np.testing.assert_array_equal(ids, REFERENCE["open_clip/ids"])
    np.testing.assert_array_equal(mask.sum(axis=1), np.argmax(ids, axis=1) + 1)


def test_byte_pairs_by_hand() -> None:
    """The pair of lowest rank is merged, again and again."""
    vocabulary = json.loads((CLIP_BPE / "vocab.json").read_text())
    lines = (CLIP_BPE / "merges.txt").read_text().splitlines()[1:]
    rank = {tuple(line.split(" ")): n for n, line in enumerate(lines)}

    def by_hand(word: str) -> list[int]:
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in rank]:
            best = min(pairs, key=rank.__getitem__)
            at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[at : at + 2] = ["".join(best)]
        return [vocabulary[part] for part in parts]

    words = ["the", "photo", "beach", "dogs", "quickest", "brownfox", "catthe", "ontheplay", "x"]
    expected = [id for word in words for id in by_hand(word)]
    found = clip(77)([" ".join(words)])[0][0]
    assert found[: len(expected) + 2].tolist() == [49406, *expected, 49407]


def test_packed_merges_are_the_same_tokenizer(tmp_path: Path) -> None:
    """With other numbers here, as the merges are few.

    With CLIP's own ``bpe_simple_vocab_16e6.txt.gz``, which is too large to keep here, the ids are
    ``open_clip/ids`` too, and words are 49408 (open_clip_torch 3.3.0, 2026-11-25).
    """
    packed = tmp_path / "bpe.txt.gz"
    packed.write_bytes(gzip.compress((CLIP_BPE / "merges.txt").read_bytes()))
    found, expected = (load_tokenizer(file, DataConfig()) for file in (packed, CLIP_BPE))
    for sentence in SENTENCES:
        assert words(found, sentence) == words(expected, sentence)


def words(tokenizer: Tokenizer, caption: str) -> list[str]:
    numbers = json.loads(tokenizer.model)["model"]["vocab"]
    by_number = {number: word for word, number in numbers.items()}
    ids, mask = tokenizer([caption])
    return [by_number[id] for id in ids[mask].tolist()]


def test_packed_merges_are_no_bomb(tmp_path: Path) -> None:
    packed = tmp_path / "bpe.txt.gz"
    for content, message in (
        (gzip.compress(b"a b\n" * 5_000_000), "bpe.txt.gz has more than 16777216 bytes"),
        (gzip.compress(b"a b\n" * 100)[:20], "bpe.txt.gz is not packed text"),
        (b"a b\n", "bpe.txt.gz is not packed text"),
        (gzip.compress(b"\xff\xfe"), "bpe.txt.gz is not packed text"),
        (gzip.compress(b"#version\na b c\n"), "bpe.txt.gz, line 2: 'a b c' is not a pair"),
    ):
        packed.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(packed, DataConfig())


def test_halves_of_characters_are_repaired(tmp_path: Path) -> None:
    """As JSON can leave them behind: both halves of a cat, and one that stands alone."""
    for tokenizer in every_kind(tmp_path).values():
        found = tokenizer(["a \ud83d\udc08", "a \ud83d cat"])[0]
        np.testing.assert_array_equal(found, tokenizer(["a 🐈", "a \ufffd cat"])[0])


def test_ids_are_below_the_number_of_words() -> None:
    """Of a vocabulary with gaps too, or an embedding table would be too small."""
    assert clip().vocab_size == 49408


def test_room_for_words_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"data.max_tokens=2 must be 3 or more"):
        clip(2)


def test_awkward_captions_become_rows(tmp_path: Path) -> None:
    for name, tokenizer in every_kind(tmp_path).items():
        ids, mask = tokenizer(AWKWARD)
        assert ids.shape == mask.shape == (len(AWKWARD), 12), name
        assert ids.min() >= 0, name
        assert not np.any(ids[~mask]), name
        lengths = mask.sum(axis=1)
        assert all(row[:n].all() for row, n in zip(mask, lengths, strict=True)), name
        again = pickle.loads(pickle.dumps(tokenizer))  # as a worker gets it
        np.testing.assert_array_equal(again(AWKWARD)[0], ids)
        # A batch is its captions.
        for row, caption in zip(ids, AWKWARD, strict=True):
            np.testing.assert_array_equal(tokenizer([caption])[0][0], row)


def test_long_captions_keep_the_token_that_ends_them() -> None:
    for tokenizer, last in (
        (load_tokenizer(minilm(), DataConfig(max_tokens=5)), 102),
        (clip(5), 49407),
    ):
        ids, mask = tokenizer(["cat " * 50])
        assert mask.all()
        assert ids[0, -1] == last


def test_sentence_pieces_are_those_of_the_library() -> None:
    model = pieces()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for caption in AWKWARD:
        expected = processor.encode(caption)[:20]
        ids, mask = Tokenizer(model, 20)([caption])
        assert ids[0][mask[0]].tolist() == expected


def by_the_published_steps(caption: str) -> str:
    """github.com/4m4n5/CLIP-Lite, data/transforms.py, step by step."""
    caption = "".join(c for c in caption.lower() if c not in ",.'!?\"()*#:;~")
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    caption = re.sub(r"\s\s+", " ", caption).rstrip("\n").strip(" ")
    caption = " ".join(caption.split(" ")[:30])
    return "".join(
        c for c in unicodedata.normalize("NFKD", caption) if not unicodedata.combining(c)
    )


@pytest.mark.parametrize("caption", [*SENTENCES, *AWKWARD, "A <PERSON>'s bag -- 2/3  (full)"])
def test_the_published_normalisation(caption: str) -> None:
    assert normalize_as_published(caption) == by_the_published_steps(caption)
    normalized = load_tokenizer(minilm(), DataConfig(caption_normalization="published"))
    plain = load_tokenizer(minilm(), DataConfig())
    expected = plain([by_the_published_steps(caption)])[0]
    np.testing.assert_array_equal(normalized([caption])[0], expected)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    def refused(files: dict[str, bytes], message: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"/{folder.name}\b.*{message}"):
            load_tokenizer(folder, DataConfig())

    vocabulary = (CLIP_BPE / "vocab.json").read_bytes()
    merges = (CLIP_BPE / "merges.txt").read_bytes()
    refused({}, "no tokenizer.json, vocab.txt, vocab.json with merges.txt")
    refused({"merges.txt": merges}, "no tokenizer.json, vocab.txt")
    refused({"vocab.txt": b"cat\ndog\n"}, r"the vocabulary lacks \[")
    refused({"vocab.txt": b"\xff\xfe[CLS]"}, "utf-8")
    refused({"tokenizer.json": b'{"model": 3}'}, "not a tokenizer.json")
    refused({"tokenizer.model": b"nothing"}, "not a SentencePiece model")
    refused({"vocab.json": b"{", "merges.txt": merges}, "vocab.json")
    refused({"vocab.json": b"[1, 2]", "merges.txt": merges}, "vocab.json")
    refused({"vocab.json": vocabulary, "merges.txt": b"a b c\n"}, "merges.txt.*'a b c'")
    refused({"vocab.json": vocabulary, "merges.txt": b"nope never\n"}, "merges.txt")
    with pytest.raises(ConfigError, match="data.tokenizer=.*nowhere"):
        load_tokenizer(tmp_path / "nowhere", DataConfig())
    with pytest.raises(ConfigError, match="give the folder that it is in"):
        load_tokenizer(CLIP_BPE / "merges.txt", DataConfig())
