"""Parts of a training step in several formulations: ``python -m benchmarks.gpu_parts``.

What `docs/benchmarks.md` says of GPUs was chosen by these.  Sizes are those of a batch of 256 for a
ResNet-50 at 224 pixels and for CLIP's text transformer, in bfloat16.  Runs on the device that is
here; on a CPU with ``--quick`` only to see that it runs.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.pages import places, write_tables
from benchmarks.train_step import DOCS, QUICK_RESULTS, RESULTS, surroundings
from benchmarks.train_step_cases import captions, on_gpu
from benchmarks.train_step_tables import tables
from clip_lite_jax.models.convolution import _general, _max_pool_gradient, _pooled
from clip_lite_jax.models.layers import _explicit_attention
from clip_lite_jax.models.normalization import BatchNorm

REPEATS, CALLS = 3, 20
BF16 = jnp.bfloat16


@dataclass(frozen=True)
class Part:
    name: str
    versions: dict[str, Callable[..., Any]]
    inputs: tuple[Any, ...]


def random(*shape: int) -> Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape, BF16)


def with_gradient(name: str, versions: Mapping[str, Callable[[Array], Array]], x: Array) -> Part:
    """Of functions of one array: their gradient, for a random gradient of their value."""
    g = random(*jax.eval_shape(next(iter(versions.values())), x).shape)

    def gradient(function: Callable[[Array], Array]) -> Callable[..., Any]:
        return lambda x, g: jax.vjp(function, x)[1](g)

    return Part(name, {label: gradient(f) for label, f in versions.items()}, (x, g))


def batch_norm(batch: int, side: int, channels: int) -> Part:
    x = random(batch, side, side, channels)
    norm = BatchNorm(dtype=BF16)
    variables = norm.init(jax.random.key(0), x)
    valid = jnp.ones(batch, bool)

    def one_pass(x: Array) -> Array:
        return nn.relu(norm.apply(variables, x, True, valid, mutable=["batch_stats"])[0])

    def two_passes(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide, axis=(0, 1, 2))
        var = jnp.mean((wide - mean) ** 2, axis=(0, 1, 2))
        return nn.relu(((wide - mean) * lax.rsqrt(var + norm.epsilon)).astype(BF16))

    versions = {"two passes": two_passes, "one pass (here)": one_pass}
    return with_gradient(f"batch norm and ReLU with gradient, {side}² × {channels}", versions, x)


def pooling(batch: int, side: int) -> Part:
    x = random(batch, side, side, 64)
    y = _pooled(x)
    g = random(*y.shape)
    versions: dict[str, Callable[..., Any]] = {
        "XLA": lambda x, y, g: jax.vjp(_pooled, x)[1](g)[0],
        "formula (here)": _max_pool_gradient,
    }
    return Part(f"gradient of max pooling, {side}² × 64", versions, (x, y, g))


def embedding(batch: int) -> Part:
    case = on_gpu(batch)
    tokens = jnp.asarray(captions(case, 0))
    table = random(case.vocabulary, case.text_width).astype(jnp.float32)

    def narrow(table: Array) -> Array:
        return jnp.take(table.astype(BF16), tokens, axis=0)

    def wide(table: Array) -> Array:
        return jnp.take(table, tokens, axis=0).astype(BF16)

    versions = {"summed in bfloat16": narrow, "in float32 (here)": wide}
    return with_gradient(f"embedding of {case.tokens} tokens with gradient", versions, table)


def attention(batch: int, tokens: int) -> Part:
    projected = random(batch, tokens, 3, 8, 64)

    def library(qkv: Array) -> Array:
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def explicit(qkv: Array) -> Array:
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        return _explicit_attention(q, k, v, None, None, causal=True)

    versions = {"jax.nn (here)": library, "explicit": explicit}
    name = f"causal attention with gradient, {tokens} tokens, 8 × 64"
    return with_gradient(name, versions, projected)


def stem(batch: int, side: int) -> Part:
    """The gradient of the kernel; an image has none."""
    images, kernel = random(batch, side, side, 3), random(7, 7, 3, 64)
    g = random(batch, side // 2, side // 2, 64)

    def plain(images: Array, kernel: Array) -> Array:
        return _general((2, 2), ((3, 3), (3, 3)), 1, images, kernel)

    def blocks(images: Array, kernel: Array) -> Array:
        """Blocks of 2 × 2 pixels become channels."""
        kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, 3, 64)
        kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 12, 64)
        x = images.reshape(batch, side // 2, 2, side // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, side // 2, side // 2, 12)
        return _general((1, 1), ((2, 1), (2, 1)), 1, x, kernel)

    def of_kernel(function: Callable[..., Array]) -> Callable[..., Any]:
        return lambda images, kernel, g: jax.vjp(lambda k: function(images, k), kernel)[1](g)

    versions = {"7 × 7 (here)": of_kernel(plain), "4 × 4 over blocks": of_kernel(blocks)}
    return Part("gradient of the first kernel of a ResNet", versions, (images, kernel, g))


def parts(batch: int, scale: int = 1) -> list[Part]:
    """All, with images smaller by `scale`."""
    return [
        embedding(batch),
        *(batch_norm(batch, side // scale, width) for side, width in ((112, 64), (56, 256))),
        batch_norm(batch, 14, 1024),
        pooling(batch, 112 // scale),
        attention(batch, 77),
        stem(batch, 224 // scale),
    ]


def milliseconds(function: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """Of one call of many that run one after another on the device; the best of several."""
    compiled = jax.jit(function)
    found = jax.block_until_ready(compiled(*inputs))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            found = compiled(*inputs)
        jax.block_until_ready(found)
        times.append((time.perf_counter() - start) / CALLS)
    return 1000 * float(np.min(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"small, into {QUICK_RESULTS}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    quick = QUICK_RESULTS if given.quick else None
    out, docs = places(given.out, given.docs, (RESULTS, DOCS), quick)
    facts = surroundings()
    chosen = parts(2, 4) if given.quick else parts(256)
    found = {}
    for part in chosen:
        found[part.name] = {k: milliseconds(f, part.inputs) for k, f in part.versions.items()}
        print(part.name, found[part.name], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}
    results["parts gpu"] = {"parts": found, "provenance": facts}
    out.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(docs, tables(results))
    print(f"written to {out} and {docs}")


if __name__ == "__main__":
    main()
