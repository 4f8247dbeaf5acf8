"""Exact gradients of the published CLIP-Lite: ``python -m benchmarks.clip_lite_references``.

Runs in the environment of `image_encoder_references`, with transformers besides, and writes
``tests/data/clip_lite/rn50_bert2_dot_float64.npz``.  The norms in ``rn50_bert2_dot.npz`` are of a
float32 run; rounding moves some of them by a per cent (PyTorch's own, on another machine, too).
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# First: torchvision and transformers need what it does to torch.
from benchmarks import torch_operators  # noqa: F401
from benchmarks.generated import generated

# isort: split
import torchvision
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent.parent / "tests" / "data" / "clip_lite"


class Projection(nn.Module):
    def __init__(self, features: int, units: int = 2048) -> None:
        super().__init__()
        self.feature_nonlinear = nn.Sequential(
            nn.Linear(features, units, bias=False),
            nn.BatchNorm1d(units),
            nn.ReLU(),
            nn.Linear(units, units),
        )
        self.feature_shortcut = nn.Linear(features, units)
        self.feature_block_ln = nn.LayerNorm(units)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.feature_block_ln(self.feature_nonlinear(x) + self.feature_shortcut(x))
        return functional.normalize(y, dim=-1)


class Critic(nn.Module):
    def __init__(self, image: int, text: int) -> None:
        super().__init__()
        self.img_block, self.text_block = Projection(image), Projection(text)
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        cosine = (self.img_block(image) * self.text_block(text)).sum(1)
        return cosine * self.temperature.exp()


def build(layers: int) -> Any:
    """ResNet-50 and BERT under the published names."""
    model = nn.Module()
    model.image_encoder, model.text_encoder, model.loss = nn.Module(), nn.Module(), nn.Module()
    model.image_encoder.img_encoder = torchvision.models.resnet50()
    model.image_encoder.img_encoder.fc = nn.Identity()
    config = BertConfig(
        num_hidden_layers=layers, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )
    model.text_encoder.strans = BertModel(config)
    model.loss.global_d = Critic(2048, 768)
    return model


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As the published numbers were made: one rounding more, and the norms are others."""
    if name.endswith("temperature"):
        return np.asarray(np.log(1 / 0.07), np.float32)
    if len(shape) < 2:
        return generated(name, shape)
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "embeddings" in name:
        return np.float32(0.05) * x
    return (x / np.sqrt(np.prod(shape[1:]), dtype=np.float64)).astype(np.float32)


def main() -> None:
    with np.load(FOLDER / "rn50_bert2_dot.npz") as stored:
        data = dict(stored)
    model = build(layers=2)
    spec = json.loads(str(data["spec"]))
    weights = {name: torch.from_numpy(weight(name, tuple(shape))) for name, shape in spec}
    model.load_state_dict(weights, strict=False)
    model.double().train()
    image = model.image_encoder.img_encoder(torch.from_numpy(data["image"]).double())
    text = model.text_encoder.strans(
        input_ids=torch.from_numpy(data["input_ids"]).long(),
        attention_mask=torch.from_numpy(data["attention_mask"]),
    ).pooler_output
    critic = model.loss.global_d
    negative = critic(image, torch.roll(text, -1, 0))
    loss = 0.9 * (functional.softplus(-critic(image, text)) + functional.softplus(negative)).mean()
    loss.backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    names = data["grad_names"].tolist()
    np.savez_compressed(
        FOLDER / "rn50_bert2_dot_float64.npz",
        grad_names=np.array(names),
        grad_norms=np.array([norms[name] for name in names]),
        loss=loss.item(),
    )
    print(loss.item(), "published", data["train_losses"][0])


if __name__ == "__main__":
    main()
