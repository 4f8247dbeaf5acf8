"""Makes tests/data/torch_files with torch 2.13: ``python benchmarks/torch_file_samples.py``.

`tests/test_weight_files.py` reads them without torch, and says what they must hold.
"""

from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).parent.parent / "tests" / "data" / "torch_files"
COUNT = torch.arange(24, dtype=torch.float32).reshape(4, 6)


class Scaled(torch.nn.Module):
    """A module with a submodule, a parameter, a buffer, and attributes that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("seen", torch.tensor(5))
        self.sizes = [1, 2, 3]
        self.name = "scaled"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def tensors() -> OrderedDict[str, torch.Tensor]:
    """Types, views of one storage, a parameter, a scalar, an empty one."""
    types = ("float16", "bfloat16", "float64", "int64", "uint8", "complex64")
    return OrderedDict(
        whole=COUNT,
        turned=COUNT.T,
        part=COUNT[1:3, 2:5],
        stepped=COUNT[::2, ::3],
        parameter=torch.nn.Parameter(COUNT[0].clone()),
        scalar=torch.tensor(3),
        empty=torch.zeros(0, 3),
        flags=torch.tensor([True, False, True]),
        **{name: COUNT[0].to(getattr(torch, name)) for name in types},
    )


def main() -> None:
    module = Scaled()
    with torch.no_grad():
        module.inner.weight.copy_(COUNT[:2, :3])
        module.inner.bias.copy_(COUNT[3, :2])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # makes the momentum
    state = module.state_dict()
    checkpoint = {"epoch": 3, "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(tensors(), HERE / "zip.pth")
    torch.save(tensors(), HERE / "stream.pth", _use_new_zipfile_serialization=False)
    torch.save({"small": COUNT[0].to(torch.uint16)}, HERE / "typed.pth")
    torch.save(checkpoint, HERE / "checkpoint.pth")
    torch.save(module, HERE / "whole_model.pth")
    torch.jit.script(module).save(HERE / "script.pt")
    torch.serialization.set_crc32_options(False)
    torch.save(state, HERE / "no_crc.pth")


if __name__ == "__main__":
    main()
