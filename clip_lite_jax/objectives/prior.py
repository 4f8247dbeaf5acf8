"""Prior matching: features of an encoder are pushed towards a uniform distribution on [0, 1]."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from clip_lite_jax.objectives.scores import Totals

Discriminator = Callable[[Any, Array], Array]
"""``(params, features [B, F]) -> logits [B]`` that features were drawn from the prior."""


def prior_matching(
    discriminator: Discriminator,
    params: Any,
    features: Array,
    valid: Array,
    key: Array,
    mode: Literal["adversarial", "published"] = "adversarial",
    totals: Totals | None = None,
) -> Array:
    """The loss [] of an encoder's features ``[B, F]`` and of the discriminator of them, in nats.

    With u uniform on [0, 1] the discriminator D minimises ``sp(-D(u)) + sp(D(f))``, features
    detached, and the encoder ``sp(-D(f))``, discriminator detached: it tries to pass for the prior.
    Value and gradients are those of the sum.

    ``published`` is the published code's single term ``sp(-D(u)) + sp(D(f))`` with nothing
    detached: its gradient drives the encoder to be told apart.  It is for parity only.

    Source: Deep InfoMax (arXiv 1808.06670), eq. 8, with the non-saturating encoder's loss of
    Goodfellow et al. (arXiv 1406.2661), section 3.
    """
    drawn = jax.random.uniform(key, features.shape, features.dtype)
    count = jnp.maximum(jnp.sum(valid) if totals is None else totals.pairs, 1)

    def mean(values: Array) -> Array:
        return jnp.sum(jnp.where(valid, values, 0.0)) / count

    real = mean(jax.nn.softplus(-discriminator(params, drawn)))
    if mode == "published":
        return real + mean(jax.nn.softplus(discriminator(params, features)))
    made = mean(jax.nn.softplus(discriminator(params, lax.stop_gradient(features))))
    passing = mean(jax.nn.softplus(-discriminator(lax.stop_gradient(params), features)))
    return real + made + passing
