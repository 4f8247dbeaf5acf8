"""Tokenization of captions: SentencePiece, Hugging Face's `tokenizers` files, and plain words."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.caption_ops import NORMALIZATIONS
from clip_lite_jax.data.tokenizer_files import WORDS, read_tokenizer
from clip_lite_jax.errors import ConfigError, DataError

LONGEST = 512
"""Tokens of a caption are counted up to this, where nothing is cut."""
MAX_CAPTION_BYTES = 4096
"""Longer captions are left out of tokenizer training (SentencePiece drops them as well)."""


class Vocabulary(Protocol):
    """One kind of tokenizer."""

    @property
    def size(self) -> int: ...

    @property
    def unknown(self) -> int | None: ...

    def encode(self, captions: Sequence[str]) -> list[list[int]]: ...


class Tokenizer:
    """Captions → fixed-length ids and mask."""

    def __init__(self, model: bytes, max_tokens: int, normalization: str = "none") -> None:
        """`model` is the content of a SentencePiece model, a ``tokenizer.json`` or a word list.

        `normalization` is one of `caption_ops.NORMALIZATIONS`.  Raises ``ValueError`` for content
        that is none of these, and for a `max_tokens` that leaves no room for words.
        """
        self.model, self.max_tokens, self.normalization = model, max_tokens, normalization
        self._normalize = NORMALIZATIONS[normalization]
        self._vocabulary = _vocabulary(model, max_tokens)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, int, str]]:
        return Tokenizer, (self.model, self.max_tokens, self.normalization)

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self._vocabulary.size

    @property
    def unknown(self) -> int | None:
        """The id of what the vocabulary does not have; None where there is none such."""
        return self._vocabulary.unknown

    @property
    def file_name(self) -> str:
        """What the file of such a model is usually called."""
        return "tokenizer.json" if self.model.lstrip()[:1] == b"{" else "tokenizer.model"

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """``N`` captions → int32 ids ``[N, max_tokens]`` and their bool mask; the rest is cut.

        Where the mask is False the id is 0, whatever the tokenizer calls padding.
        """
        tokens = np.zeros((len(captions), self.max_tokens), np.int32)
        mask = np.zeros((len(captions), self.max_tokens), bool)
        normalized = [self._normalize(_repaired(caption)) for caption in captions]
        for row, ids in enumerate(self._vocabulary.encode(normalized)):
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask


def _repaired(caption: str) -> str:
    """Pairs of surrogates, which JSON can leave behind, become the character they stand for."""
    return caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SentencePieces:
    """Lower-cases and normalises by Unicode NFKC, if trained here.  Source: arXiv 1808.06226."""

    def __init__(self, model: bytes, max_tokens: int) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error
        self.size = self._processor.get_piece_size()
        unknown = self._processor.unk_id()
        self.unknown = unknown if unknown >= 0 else None
        self._limit = max_tokens

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        return [ids[: self._limit] for ids in self._processor.encode(list(captions))]


class HuggingFace:
    """A ``tokenizer.json``: WordPiece of BERT, byte pairs of CLIP and others.

    A caption that is too long loses its end, but not the token that closes every caption.
    """

    def __init__(self, model: bytes, max_tokens: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        added = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_tokens <= added:
            raise ValueError(
                f"it adds {added} tokens to every caption, which leaves no room for words: "
                f"data.max_tokens={max_tokens} must be {added + 1} or more"
            )
        self._tokenizer.no_padding()
        # Here, as threads that encode may not change a tokenizer that they share.
        self._tokenizer.enable_truncation(max_tokens)
        self.size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown = self._tokenizer.token_to_id(unknown) if unknown else None

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]


class Words:
    """Whole words, lower-cased, punctuation split off; words that are not listed are left out."""

    def __init__(self, model: bytes, max_tokens: int) -> None:
        words = model.removeprefix(WORDS).decode().split("\n")
        self._index = {word: number for number, word in enumerate(words)}
        self.size, self.unknown = len(words), None
        self._split = pre_tokenizers.BertPreTokenizer()
        self._limit = max_tokens

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        result = []
        for caption in captions:
            words = (word for word, _ in self._split.pre_tokenize_str(caption.lower()))
            result.append([self._index[w] for w in words if w in self._index][: self._limit])
        return result


def _vocabulary(model: bytes, max_tokens: int) -> Vocabulary:
    if not model:
        raise ValueError("the file is empty")
    if model.startswith(WORDS):
        return Words(model, max_tokens)
    kind = HuggingFace if model.lstrip()[:1] == b"{" else SentencePieces
    return kind(model, max_tokens)


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
    """The tokenizer in a file or folder, see `read_tokenizer`.

    Raises:
      CheckpointError, ConfigError: there is none, or it cannot be read.
    """
    try:
        model = read_tokenizer(Path(path))
        return Tokenizer(model, config.max_tokens, config.caption_normalization)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={path}: {error}") from error
