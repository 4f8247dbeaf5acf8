"""What a training run carries from step to step, and how it comes into being on the mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax
from jax import Array
from jax.sharding import Mesh

from clip_lite_jax.models import Model
from clip_lite_jax.sharding import replicated


@flax.struct.dataclass
class TrainState:
    step: Array  # [] int32, steps taken
    params: Any
    model_state: Any  # statistics that are not trained by gradient; {} for the built-in encoders
    opt_state: Any
    ema: Any  # moving average of params, or None

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and to hand out."""
        return self.params if self.ema is None else self.ema


def init_state(
    model: Model,
    optimizer_of: Callable[[Any], optax.GradientTransformation],
    seed: int,
    with_ema: bool,
    mesh: Mesh,
) -> tuple[TrainState, optax.GradientTransformation]:
    """A fresh state, born in its sharding, and the optimizer for it.

    `optimizer_of(params)` builds the optimizer; it sees shapes only.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optimizer_of(shapes[0])

    def init(key: Array) -> TrainState:
        params, model_state = model.init(key)
        return TrainState(
            step=jax.numpy.zeros((), "int32"),
            params=params,
            model_state=model_state,
            opt_state=optimizer.init(params),
            ema=params if with_ema else None,
        )

    return jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(seed)), optimizer


def step_keys(seed: int, step: Array) -> tuple[Array, Array]:
    """The keys of one step for (dropout, negatives): functions of seed and step alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    dropout, negatives = jax.random.split(key)
    return dropout, negatives
