"""Encoders and critic as StableHLO programs with their weights inside, for any size of batch.

`jax.export` promises to read them for six months, and runs them without this package.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from clip_lite_jax.apps.export_probe import Outputs, Probe
from clip_lite_jax.files import write_atomic
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.pretrained.own import preprocessing

PROGRAMS_FILE = "programs.json"
PLATFORMS = ("cpu", "cuda", "tpu")


def lacks_programs(model: DualEncoderModel) -> str:
    del model
    if find_spec("flatbuffers") is None:
        return "jax.export needs flatbuffers: pip install 'clip-lite-jax[stablehlo]'"
    return ""


def write_programs(model: DualEncoderModel, folder: Path) -> None:
    """``encode_image``, ``encode_text`` and ``score``, a JSON of their inputs and outputs, and the
    tokenizer.
    """
    if model.has_tokenizer:
        write_atomic(folder / model.tokenizer.file_name, model.tokenizer.model)
    told: dict[str, Any] = {}
    for name, (function, inputs) in _functions(model).items():
        exported = _export(function, list(inputs.values()))
        write_atomic(folder / f"{name}.stablehlo", bytes(exported.serialize()))
        told[name] = {
            "file": f"{name}.stablehlo",
            "inputs": {key: _told(value) for key, value in inputs.items()},
            "output": _told(exported.out_avals[0]),
        }
    stated = {
        "platforms": PLATFORMS,
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "preprocessing": preprocessing(model.config),
        "programs": told,
    }
    write_atomic(folder / PROGRAMS_FILE, json.dumps(stated, indent=2) + "\n")


def read_programs(
    model: DualEncoderModel, folder: Path, probe: Probe
) -> Iterator[tuple[str, Outputs]]:
    """At two sizes of batch."""
    del model
    run = {
        name: jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes())).call
        for name in ("encode_image", "encode_text", "score")
    }
    for count in (len(probe.images), 1):
        inputs = probe.first(count)
        image = run["encode_image"](inputs.images)
        text = run["encode_text"](inputs.tokens, inputs.mask)
        found = {"image": image, "text": text, "scores": run["score"](image, text)}
        yield f"batch of {count}", {name: np.asarray(array) for name, array in found.items()}


def _functions(model: DualEncoderModel) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each program with the shapes and types of its inputs."""
    (batch,) = jax.export.symbolic_shape("batch")
    size, length = model.model.image_size, model.model.max_tokens
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, length), jnp.bool_)
    # Not as they lie on the devices of this machine: the program is for one device.
    variables = jax.tree.map(np.asarray, {"params": model.params, **model.model_state})
    apply = partial(model.model.module.apply, variables)
    encode_image = partial(apply, method="encode_image")
    encode_text = partial(apply, method="encode_text")
    return {
        "encode_image": (encode_image, {"images": images}),
        "encode_text": (encode_text, {"tokens": tokens, "mask": mask}),
        "score": (
            partial(apply, method="pairs"),
            {
                "image": jax.eval_shape(encode_image, images),
                "text": jax.eval_shape(encode_text, tokens, mask),
            },
        ),
    }


def _export(function: Callable[..., Any], inputs: list[Any]) -> jax.export.Exported:
    """For all platforms, without the paths of this machine's source files."""
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, ".*")
    try:
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*inputs)
    finally:
        jax.config.update(option, before)


def _told(value: Any) -> dict[str, Any]:
    return {"shape": [str(n) if not isinstance(n, int) else n for n in value.shape]} | {
        "dtype": str(value.dtype)
    }
