"""SentencePiece tokenization of captions."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from clip_lite_jax.errors import ConfigError, DataError

MAX_CAPTION_BYTES = 4096
"""Longer captions are left out of tokenizer training (SentencePiece drops them as well)."""


class Tokenizer:
    """Captions → fixed-length ids and mask.  Lower-cases and normalises by Unicode NFKC."""

    def __init__(self, model: bytes, max_tokens: int) -> None:
        """`model` is the content of a SentencePiece model file; else raises ``ValueError``."""
        self.model = model
        self.max_tokens = max_tokens
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, int]]:
        return Tokenizer, (self.model, self.max_tokens)

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """``N`` captions → int32 ids ``[N, max_tokens]`` and their bool mask; the rest is cut."""
        tokens = np.zeros((len(captions), self.max_tokens), np.int32)
        mask = np.zeros((len(captions), self.max_tokens), bool)
        for row, pieces in enumerate(self._processor.encode(list(captions))):
            ids = pieces[: self.max_tokens]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask


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


def load_or_train_tokenizer(
    path: str | None, captions: Iterable[str], vocab_size: int, max_tokens: int
) -> Tokenizer:
    """The tokenizer in the file `path`, or one trained on `captions` where `path` is None."""
    if path is None:
        return Tokenizer(train_tokenizer(captions, vocab_size), max_tokens)
    try:
        return Tokenizer(Path(path).read_bytes(), max_tokens)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={path}: {error}") from error
