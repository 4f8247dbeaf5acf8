"""What a Hugging Face folder states about its text encoder."""

from pathlib import Path
from typing import Any

from clip_lite_jax.config import Options
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.files import read_json

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""Their names of activations → ours."""

BERT_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "positions",
    "layer_norm_eps": "epsilon",
}
NAMES = {"bert": ("bert", "minilm"), "mpnet": ("mpnet",)}
"""Their ``model_type`` → the presets of ours that it can be."""


def hf_text_options(folder: Path) -> tuple[tuple[str, ...], Options]:
    """The presets that a folder's text encoder can be, and the options it states.

    Reads ``config.json`` and, of sentence-transformers, ``1_Pooling/config.json``.

    Raises:
      CheckpointError: another kind of model, or one with a part that ours lacks.
    """
    file = folder / "config.json"
    stated = read_json(file)
    kind = stated.get("model_type")
    if kind not in NAMES:
        raise CheckpointError(
            f"{file}: model_type={kind!r} is none that can be read: {', '.join(sorted(NAMES))}"
        )
    if (position := stated.get("position_embedding_type", "absolute")) != "absolute":
        raise CheckpointError(f"{file}: position_embedding_type={position!r}: absolute is read")
    options: Options = {ours: stated[key] for key, ours in BERT_FIELDS.items() if key in stated}
    activation = stated.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{file}: hidden_act={activation!r} is none of {', '.join(sorted(ACTIVATIONS))}"
        )
    options["activation"] = ACTIVATIONS[activation]
    if kind == "bert":
        options["type_vocab"] = stated.get("type_vocab_size", 2)
    else:
        options["relative_buckets"] = stated.get("relative_attention_num_buckets", 32)
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        options["pooling"] = _pooling(pooling, read_json(pooling))
    return NAMES[kind], options


def _pooling(file: Path, stated: dict[str, Any]) -> str:
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in modes:
        raise CheckpointError(
            f"{file}: {', '.join(on) or 'no mode'} is on; one of mean, cls is read"
        )
    return modes[on[0]]
