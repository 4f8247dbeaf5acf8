"""One encoder in a format of another project, and that format's reader."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import tokenizers

from clip_lite_jax.apps.export_probe import Outputs, Probe, outputs
from clip_lite_jax.data.tokenizer import load_tokenizer
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.files import read_json, write_atomic
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.models.bert import Bert
from clip_lite_jax.models.resnet import ResNet
from clip_lite_jax.models.text_encoders import TEXT_ENCODERS
from clip_lite_jax.models.vit import ViT
from clip_lite_jax.pretrained.files import read_weights, write_safetensors
from clip_lite_jax.pretrained.hf_config import ACTIVATIONS, BERT_FIELDS, hf_text_options
from clip_lite_jax.pretrained.names import Naming, write
from clip_lite_jax.pretrained.own import facts, preprocessing
from clip_lite_jax.pretrained.torch_writer import write_detectron2, write_torch
from clip_lite_jax.pretrained.towers import NAMINGS, read_tower

PREPROCESSING_FILE = "preprocessing.json"
TRANSFORMER, POOLING = "sentence_transformers.models.Transformer", "1_Pooling"


def torchvision_naming(model: DualEncoderModel) -> Naming | None:
    """torchvision's names of the image encoder; of a vision transformer timm's, if it has none."""
    module = model.model.module.image_encoder
    if not isinstance(module, (ResNet, ViT)):
        return None
    namings = {naming.name: naming for naming in NAMINGS[type(module)](module)}
    if isinstance(module, ViT) and (module.activation, module.layer_norm_epsilon) != ("gelu", 1e-6):
        namings.pop("torchvision", None)  # has no option for these, as timm has
    return namings.get("torchvision", namings.get("timm"))


def lacks_torchvision(model: DualEncoderModel) -> str:
    name = type(model.model.module.image_encoder).__name__
    return "" if torchvision_naming(model) else f"torchvision and timm have no equal of this {name}"


def write_torchvision(model: DualEncoderModel, folder: Path) -> None:
    naming = torchvision_naming(model)
    assert naming is not None
    weights = write(naming, variables(model, "image_encoder"))
    write_torch(folder / "model.pth", weights)
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    _write_preprocessing(model, folder, {"names": naming.name})


def read_torchvision(
    model: DualEncoderModel, folder: Path, probe: Probe
) -> Iterator[tuple[str, Outputs]]:
    for name in ("model.pth", "model.safetensors"):
        yield name, _image_outputs(model, folder / name, probe)


def lacks_detectron2(model: DualEncoderModel) -> str:
    module = model.model.module.image_encoder
    return (
        ""
        if isinstance(module, ResNet)
        else f"Detectron2's backbones are ResNets, this is a {type(module).__name__}"
    )


def write_detectron(model: DualEncoderModel, folder: Path) -> None:
    module = model.model.module.image_encoder
    naming = next(n for n in NAMINGS[ResNet](module) if n.name == "detectron2")
    write_detectron2(folder / "model.pkl", write(naming, variables(model, "image_encoder")))
    _write_preprocessing(
        model, folder, {"names": naming.name, "settings": detectron2_settings(model)}
    )


def detectron2_settings(model: DualEncoderModel) -> dict[str, Any]:
    """What Detectron2's configuration must say, whose defaults are for other weights."""
    pixels = preprocessing(model.config)
    return {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * value, 6) for value in pixels["mean"]],
        "MODEL.PIXEL_STD": [round(255 * value, 6) for value in pixels["std"]],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }


def read_detectron(
    model: DualEncoderModel, folder: Path, probe: Probe
) -> Iterator[tuple[str, Outputs]]:
    yield "model.pkl", _image_outputs(model, folder / "model.pkl", probe)


def lacks_hf(model: DualEncoderModel) -> str:
    """What Hugging Face's BERT and MPNet cannot express."""
    text = model.model.module.text_encoder
    if not isinstance(text, Bert):
        return f"transformers' BertModel and MPNetModel are no {type(text).__name__}"
    if not model.has_tokenizer or model.tokenizer.file_name != "tokenizer.json":
        return "transformers needs a tokenizer.json, and this model's tokenizer is another kind"
    mpnet = bool(text.relative_buckets)
    expected = (2, False) if mpnet else (0, True)
    if (text.first_position, bool(text.type_vocab)) != expected:
        return "transformers has no such mix of BERT and MPNet"
    pad = _special_tokens(model).get("pad_token")
    if pad is None:
        return "the tokenizer has no token that pads"
    if mpnet and _token_id(model, pad) != 1:
        return f"MPNetModel counts positions by padding of id 1, and {pad!r} is another id"
    return ""


def write_hf(model: DualEncoderModel, folder: Path) -> None:
    """A folder of transformers; of sentence-transformers, too, where the pooling is one of its."""
    text = _bert(model)
    weights = write(NAMINGS[Bert](text)[0], variables(model, "text_encoder"))
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    write_atomic(folder / "tokenizer.json", model.tokenizer.model)
    special = _special_tokens(model)
    stated = {
        "architectures": ["MPNetModel" if text.relative_buckets else "BertModel"],
        "model_type": "mpnet" if text.relative_buckets else "bert",
        **{theirs: getattr(text, ours) for theirs, ours in BERT_FIELDS.items()},
        "hidden_act": next(k for k, ours in ACTIVATIONS.items() if ours == text.activation),
        "hidden_dropout_prob": text.dropout,
        "vocab_size": text.vocab_size,
        "pad_token_id": _token_id(model, special["pad_token"]),
        "dtype": "float32",
    }
    if text.relative_buckets:
        stated["relative_attention_num_buckets"] = text.relative_buckets
    else:
        stated["type_vocab_size"] = text.type_vocab
    length = model.config.data.max_tokens
    _write_json(folder / "config.json", stated)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "model_input_names": ["input_ids", "attention_mask"],
            **special,
        },
    )
    if text.pooling != "pooler":
        _write_sentence_transformers(folder, text, length)


def _write_sentence_transformers(folder: Path, text: Bert, length: int) -> None:
    modules = (("", TRANSFORMER), (POOLING, "sentence_transformers.models.Pooling"))
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(modules)
    ]
    _write_json(folder / "modules.json", listed)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False}
    )
    (folder / POOLING).mkdir()
    _write_json(
        folder / POOLING / "config.json",
        {
            "word_embedding_dimension": text.width,
            "pooling_mode_cls_token": text.pooling == "cls",
            "pooling_mode_mean_tokens": text.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )


def read_hf(model: DualEncoderModel, folder: Path, probe: Probe) -> Iterator[tuple[str, Outputs]]:
    """With the architecture, pooling and tokenizer that the folder states."""
    live = _bert(model)
    names, options = hf_text_options(folder)
    fixed: dict[str, Any] = {"vocab_size": live.vocab_size, "max_tokens": live.max_tokens}
    types: dict[str, Any] = {"dtype": live.dtype, "param_dtype": live.param_dtype}
    stated: dict[str, Any] = {"pooling": "pooler", "scan": live.scan, **options}
    module = TEXT_ENCODERS[names[0]](**fixed, **types).clone(**stated)
    tokens, mask = load_tokenizer(folder, model.config.data)(probe.captions)
    tower = read_tower(module, read_weights(folder), variables(model, "text_encoder"), str(folder))
    read = _with_tower(model, "text_encoder", module, tower)
    found = outputs(read, replace(probe, tokens=tokens, mask=mask))
    yield "model.safetensors", {"text_features": found["text_features"]}


def _bert(model: DualEncoderModel) -> Bert:
    text = model.model.module.text_encoder
    assert isinstance(text, Bert)  # `lacks_hf` said so
    return text


def variables(model: DualEncoderModel, tower: str) -> dict[str, Any]:
    """Of one tower, by collection."""
    collections = {"params": model.params, **model.model_state}
    return {name: tree[tower] for name, tree in collections.items() if tower in tree}


def _image_outputs(model: DualEncoderModel, file: Path, probe: Probe) -> Outputs:
    """With the normalisation that the folder states."""
    module = model.model.module.image_encoder
    tower = read_tower(module, read_weights(file), variables(model, "image_encoder"), str(file))
    pixels = read_json(file.parent / PREPROCESSING_FILE)
    stated = {f"pixel_{key}": tuple(pixels[key]) for key in ("mean", "std")}
    read = _with_tower(model, "image_encoder", module, tower, **stated)
    return {"image_features": outputs(read, probe)["image_features"]}


def _with_tower(
    model: DualEncoderModel, name: str, module: nn.Module, tower: Any, **pixels: Any
) -> DualEncoderModel:
    """The model with one tower read anew: the same program, so nothing is rounded otherwise."""
    changed: dict[str, Any] = {name: module, **pixels}
    whole = replace(model.model, module=model.model.module.clone(**changed))
    state = {
        key: tree | {name: tower[key]} for key, tree in model.model_state.items() if name in tree
    }
    return DualEncoderModel(
        model.config,
        whole,
        model.params | {name: tower["params"]},
        model.model_state | state,
        model.tokenizer if model.has_tokenizer else None,
    )


def _write_preprocessing(model: DualEncoderModel, folder: Path, more: dict[str, Any]) -> None:
    tokenizer = model.tokenizer if model.has_tokenizer else None
    image = facts(model.config, model.model, tokenizer)["image"]
    stated = {**preprocessing(model.config), "image_encoder": image, **more}
    _write_json(folder / PREPROCESSING_FILE, stated)


def _special_tokens(model: DualEncoderModel) -> dict[str, str]:
    """What BERT's or MPNet's special tokens are called here, as far as they are there."""
    known = {
        "pad_token": ("[PAD]", "<pad>"),
        "cls_token": ("[CLS]", "<s>"),
        "sep_token": ("[SEP]", "</s>"),
        "unk_token": ("[UNK]", "<unk>"),
        "mask_token": ("[MASK]", "<mask>"),
    }
    found = tokenizers.Tokenizer.from_str(model.tokenizer.model.decode())
    return {
        role: name
        for role, names in known.items()
        for name in names[::-1]
        if found.token_to_id(name) is not None
    }


def _token_id(model: DualEncoderModel, token: str) -> int:
    found = tokenizers.Tokenizer.from_str(model.tokenizer.model.decode()).token_to_id(token)
    if found is None:
        raise CheckpointError(f"the tokenizer has no token {token!r}")
    return int(found)


def _write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=2) + "\n")
