"""Files of tokenizers, made into what `data.tokenizer.Tokenizer` reads."""

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from clip_lite_jax.data.glove import read_glove
from clip_lite_jax.errors import DataError, UserError
from clip_lite_jax.files import read_json

WORDS = b"#words\n"
"""First line of a list of words, one on each line after it."""
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2
"""Those that CLIP uses, of the 262,144 in its file."""
MAX_MERGES_BYTES = 16 * 2**20
"""CLIP's file has 3 MB when unpacked."""


def read_tokenizer(path: Path) -> bytes:
    """The content of a model file, or one made of other files.

    These are the folder of a Hugging Face model, CLIP's ``bpe_simple_vocab_16e6.txt.gz``, and a
    GloVe file ``.txt``, whose words are listed.

    Raises:
      DataError, CheckpointError: none of these, or a broken one.
      OSError: it cannot be opened.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.name in ("vocab.txt", "vocab.json", "merges.txt"):
        raise DataError("it is one of the files of a tokenizer: give the folder that it is in")
    if path.suffix == ".gz":
        return _packed_merges(path)
    if path.suffix == ".txt":
        return WORDS + "\n".join(read_glove(path)[0]).encode()
    return path.read_bytes()


def _read_folder(folder: Path) -> bytes:
    for names, make in FILES.items():
        if all((folder / name).is_file() for name in names):
            try:
                return make(folder)
            except UserError:
                raise
            except Exception as error:  # the library raises bare Exception
                raise DataError(f"{' and '.join(names)}: {error}") from error
    known = ", ".join(" with ".join(names) for names in FILES)
    raise DataError(f"it has no {known}")


def _word_piece(folder: Path) -> bytes:
    """BERT's tokenizer, of its ``vocab.txt`` and ``tokenizer_config.json``."""
    vocabulary = {word: number for number, word in enumerate(_lines(folder / "vocab.txt"))}
    settings = folder / "tokenizer_config.json"
    stated = _read_object(settings) if settings.is_file() else {}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=stated.get("do_lower_case", True),
        strip_accents=stated.get("strip_accents"),
        handle_chinese_chars=stated.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _, first, last = (_required(vocabulary, token) for token in ("[UNK]", "[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    tokenizer.add_special_tokens([token for token in BERT_SPECIAL if token in vocabulary])
    return tokenizer.to_str().encode()


def _clip_folder(folder: Path) -> bytes:
    """CLIP's tokenizer, of its ``vocab.json`` and ``merges.txt``."""
    vocabulary = _read_object(folder / "vocab.json")
    if not all(type(number) is int for number in vocabulary.values()):
        raise DataError("vocab.json is not a table of words and their numbers")
    merges = _merges(_lines(folder / "merges.txt"), "merges.txt")
    for left, right in merges:
        if not {left, right, left + right} <= vocabulary.keys():
            line = f"{left} {right}"
            raise DataError(f"merges.txt has {line!r}, which vocab.json does not: renew both")
    return _clip(vocabulary, merges)


def _packed_merges(file: Path) -> bytes:
    """CLIP's tokenizer, of its merges alone: bytes, bytes that end a word, merges, two more.

    Source: github.com/openai/CLIP, clip/simple_tokenizer.py.
    """
    try:
        with gzip.open(file) as opened:
            content = opened.read(MAX_MERGES_BYTES + 1)
        if len(content) > MAX_MERGES_BYTES:
            raise DataError(f"{file.name} has more than {MAX_MERGES_BYTES} bytes when unpacked")
        text = content.decode()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{file.name} is not packed text: {error}") from error
    merges = _merges(text.split("\n")[: 1 + CLIP_MERGES], file.name)
    # A byte that prints stands for itself, the others for characters from 256 on.
    ranges = (range(ord("!"), ord("~") + 1), range(ord("¡"), ord("¬") + 1), range(ord("®"), 256))
    printed = [chr(byte) for some in ranges for byte in some]
    alphabet = printed + [chr(256 + n) for n in range(256 - len(printed))]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += [CLIP_START, CLIP_END]
    return _clip({token: number for number, token in enumerate(tokens)}, merges)


def _clip(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> bytes:
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=CLIP_END)
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
        (CLIP_END, _required(vocabulary, CLIP_END)),
        (CLIP_START, _required(vocabulary, CLIP_START)),
        trim_offsets=False,
        add_prefix_space=False,
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer.to_str().encode()


def _merges(lines: Sequence[str], name: str) -> list[tuple[str, str]]:
    """The pairs, first the one that is merged first; a first line with the version is skipped."""
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and "#version" in line):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise DataError(f"{name}, line {number}: {line[:80]!r} is not a pair")
        merges.append((left, right))
    return merges


def _lines(file: Path) -> list[str]:
    """Not split at the other separators of lines that Unicode has: words contain them."""
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8: {error}") from error


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file.name} is not a table, but a {type(content).__name__}")
    return content


def _required(vocabulary: Mapping[str, int], token: str) -> int:
    if token not in vocabulary:
        raise DataError(f"the vocabulary lacks {token}: only BERT's and CLIP's are read this way")
    return vocabulary[token]


FILES: dict[tuple[str, ...], Callable[[Path], bytes]] = {
    ("tokenizer.json",): lambda folder: (folder / "tokenizer.json").read_bytes(),
    ("vocab.txt",): _word_piece,
    ("vocab.json", "merges.txt"): _clip_folder,
    ("tokenizer.model",): lambda folder: (folder / "tokenizer.model").read_bytes(),
}
"""Files of a folder → what reads them; the first that are there."""
