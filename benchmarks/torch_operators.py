"""Operators that the CPU build of torch lacks and without which torchvision does not import.

Import this before torchvision, timm, open_clip or transformers.
"""

import torch

library = torch.library.Library("torchvision", "DEF")
for op in ("nms", "qnms"):
    library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
