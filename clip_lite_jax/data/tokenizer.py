"""Tokenization of captions: SentencePiece, Hugging Face's `tokenizers` files, and plain words."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.caption_ops import NORMALIZATIONS
from clip_lite_jax.data.glove import read_glove
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.files import read_json

MAX_CAPTION_BYTES = 4096
"""Longer captions are left out of tokenizer training (SentencePiece drops them as well)."""
WORDS = b"#words\n"
"""First line of a list of words, one on each line after it."""


class Vocabulary(Protocol):
    """One kind of tokenizer."""

    @property
    def size(self) -> int: ...

    def encode(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]: ...


class Tokenizer:
    """Captions → fixed-length ids and mask."""

    def __init__(self, model: bytes, max_tokens: int, normalization: str = "none") -> None:
        """`model` is the content of a SentencePiece model, a ``tokenizer.json`` or a word list.

        `normalization` is one of `caption_ops.NORMALIZATIONS`.  Raises ``ValueError`` for content
        that is none of these.
        """
        self.model, self.max_tokens, self.normalization = model, max_tokens, normalization
        self._normalize = NORMALIZATIONS[normalization]
        self._vocabulary = _vocabulary(model)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, int, str]]:
        return Tokenizer, (self.model, self.max_tokens, self.normalization)

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def file_name(self) -> str:
        """What the file of such a model is usually called."""
        return "tokenizer.json" if self.model.lstrip()[:1] == b"{" else "tokenizer.model"

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """``N`` captions → int32 ids ``[N, max_tokens]`` and their bool mask; the rest is cut."""
        tokens = np.zeros((len(captions), self.max_tokens), np.int32)
        mask = np.zeros((len(captions), self.max_tokens), bool)
        normalized = [self._normalize(caption) for caption in captions]
        for row, ids in enumerate(self._vocabulary.encode(normalized, self.max_tokens)):
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask


class SentencePieces:
    """Lower-cases and normalises by Unicode NFKC, if trained here.  Source: arXiv 1808.06226."""

    def __init__(self, model: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error
        self.size = self._processor.get_piece_size()

    def encode(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        return [ids[:max_tokens] for ids in self._processor.encode(list(captions))]


class HuggingFace:
    """A ``tokenizer.json``: WordPiece of BERT, byte pairs of CLIP and others.

    A caption that is too long loses its end, but not the token that closes every caption.
    """

    def __init__(self, model: bytes) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self.size = self._tokenizer.get_vocab_size()
        self._limit = 0

    def encode(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        if self._limit != max_tokens:
            self._tokenizer.enable_truncation(max_tokens)
            self._limit = max_tokens
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]


class Words:
    """Whole words, lower-cased, punctuation split off; words that are not listed are left out."""

    def __init__(self, model: bytes) -> None:
        words = model.removeprefix(WORDS).decode().split("\n")
        self._index = {word: number for number, word in enumerate(words)}
        self.size = len(words)
        self._split = pre_tokenizers.BertPreTokenizer()

    def encode(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        result = []
        for caption in captions:
            words = (word for word, _ in self._split.pre_tokenize_str(caption.lower()))
            result.append([self._index[w] for w in words if w in self._index][:max_tokens])
        return result


def _vocabulary(model: bytes) -> Vocabulary:
    if model.startswith(WORDS):
        return Words(model)
    return HuggingFace(model) if model.lstrip()[:1] == b"{" else SentencePieces(model)


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> bytes:
    """A unigram SentencePiece model of up to `vocab_size` pieces; equal captions, equal bytes.

    Source: arXiv 1808.06226; unigram segmentation, arXiv 1804.10959.

    Raises:
      DataError: no caption to train on, or more characters than `vocab_size`.
    """
    usable = [c for c in captions if c.strip() and len(c.encode()) <= MAX_CAPTION_BYTES]
    if not usable:
        raise DataError("no caption to train a tokenizer on")
    model = io.BytesIO()
    try:
        _train(usable, model, vocab_size)
    except RuntimeError as error:
        characters = len(set("".join(usable)))
        raise DataError(
            f"data.vocab_size={vocab_size} is too small for captions with {characters} different "
            f"characters, each of which is a piece: raise it, to {4 * characters} say ({error})"
        ) from error
    return model.getvalue()


def _train(captions: Iterable[str], model: io.BytesIO, vocab_size: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # few captions make fewer pieces, which is not an error
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        character_coverage=1.0,
        input_sentence_size=2_000_000,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,  # the result depends on the number of threads
        minloglevel=2,
    )


def load_or_train_tokenizer(captions: Iterable[str], config: DataConfig) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, or one trained on `captions`."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, config)
    model = train_tokenizer(captions, config.vocab_size)
    return Tokenizer(model, config.max_tokens, config.caption_normalization)


def load_tokenizer(path: str | Path, config: DataConfig) -> Tokenizer:
    """The tokenizer in a file or in a folder of Hugging Face's, or the words of a GloVe file.

    Raises:
      CheckpointError, ConfigError: there is none, or it cannot be read.
    """
    try:
        model = _stored_model(Path(path))
        return Tokenizer(model, config.max_tokens, config.caption_normalization)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={path}: {error}") from error


def _stored_model(path: Path) -> bytes:
    if path.suffix == ".txt":
        return WORDS + "\n".join(read_glove(path)[0]).encode()
    return _folder_model(path) if path.is_dir() else path.read_bytes()


def _folder_model(folder: Path) -> bytes:
    """A ``tokenizer.json``, or one made of the older files of BERT or of CLIP."""
    if (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json").read_bytes()
    if (folder / "vocab.txt").is_file():
        return _word_piece(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _clip_bpe(folder)
    if (folder / "tokenizer.model").is_file():
        return (folder / "tokenizer.model").read_bytes()
    raise ValueError(
        "no tokenizer.json, vocab.txt, vocab.json with merges.txt, or tokenizer.model in it"
    )


def _word_piece(folder: Path) -> bytes:
    """BERT's tokenizer, of its ``vocab.txt`` and ``tokenizer_config.json``."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {word: number for number, word in enumerate(words)}
    settings = folder / "tokenizer_config.json"
    lower = read_json(settings).get("do_lower_case", True) if settings.is_file() else True
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, last = (_required(vocabulary, token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    return tokenizer.to_str().encode()


def _clip_bpe(folder: Path) -> bytes:
    """CLIP's tokenizer, of its ``vocab.json`` and ``merges.txt``."""
    vocabulary = read_json(folder / "vocab.json")
    if not isinstance(vocabulary, dict) or not all(type(n) is int for n in vocabulary.values()):
        raise ValueError("vocab.json is not a table of words and their numbers")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = []
    for line in lines:
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            if not {left, right, left + right} <= vocabulary.keys():
                raise ValueError(f"merges.txt has {line!r}, which vocab.json does not: renew both")
            merges.append((left, right))
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=end)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, _required(vocabulary, end)),
        (start, _required(vocabulary, start)),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return tokenizer.to_str().encode()


def _required(vocabulary: dict[str, int], token: str) -> int:
    if token not in vocabulary:
        raise ValueError(f"the vocabulary lacks {token}")
    return vocabulary[token]
