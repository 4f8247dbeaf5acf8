"""Grad-CAM on the critic's score: which places of an image speak for a text."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.models.dual_encoder import DualEncoder, Model
from clip_lite_jax.models.layers import PLACES


def heat_maps(
    model: Model, params: Any, model_state: Any, images: Array, tokens: Array, mask: Array
) -> Array:
    """How much each place of image i raises its score T with text i.

    The score is differentiated by the last activations that know of places ``A [h, w, C]``; with
    ``a [C]`` the mean over places of the gradient, the map is ``relu(sum_c a_c A_c)``.  Those are
    what the pooling of a convolutional encoder reads, and the patches that enter the last block of
    a transformer.  Scales of two maps do not compare: the slope of T depends on the image.

    Source: Grad-CAM (arXiv 1610.02391), eq. 1 and 2.

    Args:
      images: ``[B, H, W, 3]`` uint8.
      tokens, mask: ``[B, L]``.

    Returns:
      float32 ``[B, h, w]``, none below 0; all 0 where nothing speaks for the text.

    Raises:
      ConfigError: features in place of images, or an encoder that marks no places.
    """
    if images.ndim != 4:
        raise ConfigError(
            f"heat maps need images [B, H, W, 3], not features of shape {list(images.shape)}: "
            "evaluate the exported model, or with model.image.cache=False"
        )
    module, params = _layer_by_layer(model.module.clone(frozen=()), params)
    variables = {"params": params, **model_state}
    text = module.apply(variables, tokens, mask, method="encode_text")

    def score(added: Array | None, images: Array) -> tuple[Array, Any]:
        more = {} if added is None else {"perturbations": {"image_encoder": {PLACES: added}}}
        image, seen = module.apply(
            variables | more, images, method="encode_image", mutable=["intermediates"]
        )
        pairs = model.critic(params).pairs(image, text)  # each of one row alone
        return jnp.sum(pairs), seen.get("intermediates", {})

    _, seen = jax.eval_shape(lambda images: score(None, images), images)
    if "image_encoder" not in seen:
        raise ConfigError("this image encoder has no map of places: a transformer without blocks?")
    like = seen["image_encoder"][PLACES][0]
    gradient, seen = jax.grad(score, has_aux=True)(jnp.zeros(like.shape, like.dtype), images)
    places = seen["image_encoder"][PLACES][0].astype(jnp.float32)
    weights = jnp.mean(gradient.astype(jnp.float32), axis=(1, 2), keepdims=True)
    return nn.relu(jnp.sum(weights * places, axis=-1))


def _layer_by_layer(module: DualEncoder, params: Any) -> tuple[DualEncoder, Any]:
    """With the blocks of a scanned image encoder one by one: only so can the last one be told."""
    encoder: Any = module.image_encoder
    if not getattr(encoder, "scan", False):
        return module, params
    own = dict(params["image_encoder"])
    stacked = own.pop("blocks", {})
    for number in range(encoder.layers):
        own[f"blocks_{number}"] = jax.tree.map(lambda leaf, n=number: leaf[n], stacked)
    plain = module.clone(image_encoder=encoder.clone(scan=False))
    return plain, {**params, "image_encoder": own}
