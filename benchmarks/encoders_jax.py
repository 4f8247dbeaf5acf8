"""Steps of our encoders, for `encoders`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.generated import generated
from benchmarks.step_worker import LEARNING_RATE, Step, serve
from clip_lite_jax.models.image_encoders import IMAGE_ENCODERS
from clip_lite_jax.models.text_encoders import TEXT_ENCODERS
from clip_lite_jax.pretrained.names import read, write
from clip_lite_jax.pretrained.towers import NAMINGS

PROJECTS = ("torchvision", "timm", "efficientnet-lite-pytorch", "Hugging Face BERT")
"""Whose names give the weights."""


def build(name: str, size: int, batch: int, train: bool) -> Step:
    """One step of an encoder, the value is the loss: mean squares of features along a direction.

    In training: forward, backward and an update by SGD with momentum.  `size` is the side of the
    images in pixels, or the number of tokens.
    """
    rng = np.random.default_rng(0)
    module: Any
    if name in TEXT_ENCODERS:
        module = TEXT_ENCODERS[name](vocab_size=30522, max_tokens=size, pooling="mean")
        ids = rng.integers(1, 30000, (batch, size))
        x: tuple[Any, ...] = ids.astype(np.int32), np.ones((batch, size), bool)
    else:
        module = IMAGE_ENCODERS[name]()
        x = (rng.standard_normal((batch, size, size, 3)).astype(np.float32),)
    like = jax.eval_shape(module.init, jax.random.key(0), *x)
    naming = next(n for n in NAMINGS[type(module)](module) if n.name in PROJECTS)
    blank = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like)
    weights = {key: generated(key, value.shape) for key, value in write(naming, blank).items()}
    variables = jax.tree.map(jnp.asarray, read([naming], weights, like, "generated"))
    x = jax.device_put(x)
    params, statistics = variables.pop("params"), variables
    features = jax.eval_shape(module.apply, like, *x)
    direction = jnp.asarray(generated("direction", (1, features.shape[1]))[0])

    def loss(params: Any, statistics: Any) -> tuple[jax.Array, Any]:
        found, new = module.apply(
            {"params": params, **statistics}, *x, train=train, mutable=list(statistics)
        )
        return jnp.mean(jnp.square(found @ direction)), new

    if not train:
        value = jax.jit(loss)
        return lambda: float(value(params, statistics)[0])
    optimizer = optax.sgd(LEARNING_RATE, momentum=0.9)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params: Any, statistics: Any, state: Any) -> Any:
        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params, statistics)
        updates, state = optimizer.update(gradient, state)
        return value, (optax.apply_updates(params, updates), statistics, state)

    current = params, statistics, optimizer.init(params)

    def step() -> float:
        nonlocal current
        value, current = update(*current)
        jax.block_until_ready(current)
        return float(value)

    return step


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    serve(build)
