"""What a compiled program spends its time on, from a trace of `jax.profiler`."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clip_lite_jax.hlo import Computation, parse

KINDS = (
    "convolutions",
    "matrix products",
    "attention",
    "reductions",
    "pooling's gradient",
    "scatters",
    "elementwise",
    "data movement",
    "other",
)
LISTED = 25
"""Single kernels that are listed."""

# Of what a fusion does, the first of these counts.
_OPERATIONS = {
    "convolutions": {"convolution"},
    "matrix products": {"dot"},
    "pooling's gradient": {"select-and-scatter"},
    "scatters": {"scatter"},
    "reductions": {"reduce", "reduce-window"},
}
_MOVEMENT = {"copy", "transpose", "bitcast", "concatenate", "slice", "pad", "reshape", "parameter"}
_QUIET = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "broadcast", "convert"}
# Kernels of libraries, whose names are no instruction's.
_LIBRARIES = (
    (r"fmha|flash|sdpa", "attention"),
    (r"fprop|dgrad|wgrad|conv|nchwToNhwc|nhwcToNchw", "convolutions"),
    (r"gemm|nvjet|cublas|splitKreduce|cutlass", "matrix products"),
    (r"memcpy|memset", "data movement"),
)


def costs(file: Path, program: str, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel and by layer, and the longest single kernels.

    Args:
      file: the ``.xplane.pb`` of the trace, under which the program ran `steps` times.
      program: the text of its compiled HLO.
    """
    import jax

    data = jax.profiler.ProfileData.from_file(str(file))
    kernels: list[tuple[str, float]] = []
    for plane in data.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                kernels += [(_operation(event), event.duration_ns / 1e6) for event in line.events]
    return sums(kernels, program, steps)


def _operation(event: Any) -> str:
    """The instruction that a kernel belongs to where the trace states it, or the kernel's name."""
    stated = {name: value for name, value in event.stats if name == "hlo_op"}
    return str(stated.get("hlo_op", event.name))


def sums(kernels: Iterable[tuple[str, float]], program: str, steps: int) -> dict[str, Any]:
    """As `costs`, of (instruction or kernel, milliseconds)."""
    computations = parse(program)
    known = {
        _plain(name): (instruction, computation)
        for computation in computations.values()
        for name, instruction in computation.instructions.items()
    }
    kinds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    layers: dict[str, float] = defaultdict(float)
    single: dict[str, float] = defaultdict(float)
    for name, milliseconds in kernels:
        found = known.get(_plain(name))
        if found is None:
            kind, path = _of_library(name), ""
        else:
            kind, path = kind_of(found[0], computations), layer_of(found[0].text)
        kinds[kind] += milliseconds / steps
        layers[f"{path or 'other'}: {kind}"] += milliseconds / steps
        single[f"{name} ({path})"[:160]] += milliseconds / steps
    return {
        "total": sum(kinds.values()),
        "kinds": {k: v for k, v in kinds.items() if v},
        "layers": dict(sorted(layers.items(), key=lambda item: -item[1])[:LISTED]),
        "kernels": dict(sorted(single.items(), key=lambda item: -item[1])[:LISTED]),
    }


def _plain(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def _of_library(name: str) -> str:
    for pattern, kind in _LIBRARIES:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def kind_of(instruction: Any, computations: dict[str, Computation]) -> str:
    """One of `KINDS`, by what is computed."""
    library = re.search(r'custom_call_target="(\w*)\$?(\w*)', instruction.text)
    if library:
        return _of_library(library[1] + library[2])
    called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
    inner = computations.get(called[1]) if called else None
    operations = (
        {i.operation for i in inner.instructions.values()} if inner else {instruction.operation}
    )
    for kind, wanted in _OPERATIONS.items():
        if operations & wanted:
            return kind
    return "data movement" if operations - _QUIET <= _MOVEMENT else "elementwise"


LAYERS = (
    (r"(bn\d|downsample_bn|BatchNorm)", "batch normalisation"),
    (r"(conv\d|downsample_conv|patches)", "convolution"),
    (r"(fmha|attention|dot_product)", "attention"),
    (r"norm", "layer normalisation"),
    (r"(qkv|out|fc1|fc2|Dense|projection)/", "dense layers"),
    (r"(words|Embed)", "embedding of tokens"),
    (r"pool|reduce_window|select_and_scatter", "pooling"),
    (r"image_encoder", "image encoder, other"),
    (r"text_encoder", "text encoder, other"),
    (r"critic", "critic and loss"),
)


def layer_of(text: str) -> str:
    """What of the model an instruction's metadata says that it comes from; "" for none."""
    stated = re.search(r'op_name="([^"]*)"', text)
    if stated is None:
        return ""
    for pattern, layer in LAYERS:
        if re.search(pattern, stated[1]):
            return layer
    return "optimizer and the rest"
