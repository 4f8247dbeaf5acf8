"""open_clip's training step, for `train_step`; runs in an environment with torch and open_clip.

As its `train_one_epoch` has it, with automatic mixed precision in bfloat16 where the case asks for
that.  Batches are in the device's memory.
"""

import os
import time
import traceback
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

if torch.version.cuda is None:
    # First: the others need what it does to torch.
    from benchmarks import torch_operators  # noqa: F401

# isort: split
import open_clip
from open_clip.loss import ClipLoss
from open_clip.model import CLIP

from benchmarks.step_worker import serve
from benchmarks.train_step_cases import BATCHES, EMBEDDING, Case, Failed, captions, pixels

MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)


def model_of(case: Case) -> Any:
    vision: dict[str, Any] = {"image_size": case.size}
    if case.image == "vit":
        vision |= {"layers": case.image_layers, "width": case.image_width}
        vision |= {"head_width": 64, "patch_size": 16}
    else:
        vision |= {"timm_model_name": case.image, "timm_pool": "avg", "timm_proj": "linear"}
    text = {
        "context_length": case.tokens,
        "vocab_size": case.vocabulary,
        "width": case.text_width,
        "heads": case.text_heads,
        "layers": case.text_layers,
    }
    return CLIP(EMBEDDING, vision, text, output_dict=True)


def sizes(model: Any) -> dict[str, int]:
    """As `train_step_jax.sizes`."""
    found = {"image": 0, "text": 0, "head": 0}
    for name, value in model.named_parameters():
        head = name.startswith("visual.head") or name in (
            "visual.proj",
            "text_projection",
            "logit_scale",
        )
        part = "head" if head else "image" if name.startswith("visual") else "text"
        found[part] += value.numel()
    return found


def parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Weights decay; gains and biases do not (open_clip_train/main.py)."""
    parts = ("bn", "ln", "bias", "logit_scale")
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or any(part in n for part in parts)]
    decayed = [p for n, p in named if not (p.ndim < 2 or any(part in n for part in parts))]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]


class Training:
    """`case.steps` steps, and to the end of the last; the value is the loss."""

    def __init__(self, case: Case, channels_last: bool, compiled: bool) -> None:
        self.cuda = torch.cuda.is_available()
        device = torch.device("cuda" if self.cuda else "cpu")
        if self.cuda:  # as open_clip sets them
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        else:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.case = case
        self.model = model_of(case).to(device).to(memory_format=layout)
        self.model.train()
        self.parameters = sizes(self.model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True
        )
        self.run = torch.compile(self.model) if compiled else self.model
        self.loss = ClipLoss()
        self.batches = []
        for seed in range(BATCHES):
            images = torch.from_numpy(pixels(case, seed)).permute(0, 3, 1, 2).to(device)
            images = (images.float() / 255 - MEAN.to(device)) / STD.to(device)
            tokens = torch.from_numpy(captions(case, seed).astype(np.int64)).to(device)
            self.batches.append((images.contiguous(memory_format=layout), tokens))
        self.taken = 0
        start = time.perf_counter()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        value: Any = None
        for _ in range(self.case.steps):
            images, tokens = self.batches[self.taken % BATCHES]
            self.taken += 1
            self.optimizer.zero_grad()
            with self._autocast():
                losses = self.loss(**self.run(images, tokens), output_dict=True)
                value = sum(losses.values())
            value.backward()
            self.optimizer.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, np.log(100))
        return float(value.item())

    def _autocast(self) -> Any:
        if self.case.dtype == "float32":
            return nullcontext()
        return torch.autocast("cuda" if self.cuda else "cpu", dtype=torch.bfloat16)


def facts(training: Training | Failed) -> dict[str, Any]:
    if isinstance(training, Failed):
        return {"failed": training.reason}
    peak = torch.cuda.max_memory_allocated() if training.cuda else None
    return {
        "parameters": training.parameters,
        "compile_seconds": training.compile_seconds,
        "bytes": peak,  # since this one was built
        "device": torch.cuda.get_device_name() if training.cuda else "cpu",
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def rest(_: Training | Failed) -> None:
    """Gives memory that is not in use back to the device, for the other process."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build(channels_last: bool, compiled: bool, **options: Any) -> Training | Failed:
    try:
        return Training(Case(**options), channels_last, compiled)
    except Exception as error:
        traceback.print_exc()
        return Failed(error)


if __name__ == "__main__":
    serve(build, {"facts": facts, "rest": rest})
