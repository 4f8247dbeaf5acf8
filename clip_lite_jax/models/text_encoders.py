"""The text encoders that `model.text.name` can be."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn

from clip_lite_jax.models.bert import Bert
from clip_lite_jax.models.transformer import ClipText, Transformer
from clip_lite_jax.models.word_vectors import WordVectors

TEXT_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "bert": Bert,
    # Source: MiniLM (arXiv 2002.10957), and the sentence encoders made of it.
    "minilm": partial(Bert, width=384, layers=6, mlp_width=1536, pooling="mean"),
    # Source: MPNet (arXiv 2004.09297), and the sentence encoders made of it.
    "mpnet": partial(
        Bert,
        positions=514,
        first_position=2,
        type_vocab=0,
        relative_buckets=32,
        epsilon=1e-5,
        pooling="mean",
    ),
    # Source: CLIP (arXiv 2103.00020), tables 19 and 20.
    "clip_text": ClipText,
    "clip_text_l": partial(ClipText, width=768, heads=12, head_width=768),
    "transformer": Transformer,
    "word_vectors": WordVectors,
}
"""Preset name → a module of it; `model.text.options` overrides its fields."""
