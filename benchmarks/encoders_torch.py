"""Steps of PyTorch's encoders, for `encoders`; runs in an environment with torch."""

import os
from typing import Any

import numpy as np
import torch

# First: the others need what it does to torch.
from benchmarks import torch_operators  # noqa: F401
from benchmarks.generated import generated
from benchmarks.step_worker import LEARNING_RATE, Step, serve

# isort: split
import timm
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from transformers import BertConfig, BertModel


class Pooled(torch.nn.Module):
    """EfficientNet's features: the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.model = EfficientNet.from_name("efficientnet-lite0")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.extract_features(x).mean((2, 3))


class Sentences(torch.nn.Module):
    """all-MiniLM-L6-v2's architecture: a BERT, and the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BertModel(
            BertConfig(
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
            ),
            add_pooling_layer=False,
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)


def encoder(name: str, size: int) -> Any:
    if name == "vit_s16":
        return timm.create_model("vit_small_patch16_224", img_size=size, num_classes=0)
    if name == "efficientnet_lite0":
        return Pooled()
    if name == "minilm":
        return Sentences()
    model = torchvision.models.get_model(name)
    model.fc = torch.nn.Identity()
    return model


def build(name: str, size: int, batch: int, train: bool, variant: str) -> Step:
    """As `encoders_jax.build`; `variant` is "", "channels_last" or "compile"."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = encoder(name, size)
    state = {
        key: torch.from_numpy(np.asarray(generated(key.removeprefix("model."), value.shape)))
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    }
    model.load_state_dict(state, strict=False)
    rng = np.random.default_rng(0)
    if name == "minilm":
        x = torch.from_numpy(rng.integers(1, 30000, (batch, size)))
    else:
        pixels = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    if variant == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    model.train(train)
    with torch.inference_mode():
        width = model.eval()(x[:1]).shape[1]
    model.train(train)
    direction = torch.from_numpy(generated("direction", (1, width))[0])
    run = torch.compile(model) if variant == "compile" else model

    def loss() -> torch.Tensor:
        return (run(x) @ direction).square().mean()

    if not train:
        return lambda: float(torch.inference_mode()(loss)())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


if __name__ == "__main__":
    serve(build)
