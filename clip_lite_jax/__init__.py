"""CLIP-Lite in JAX: image–text dual encoders from one negative per pair.

`load` opens a trained model.  It is imported when it is first used, so that ``clip-lite --help``
and `clip_lite_jax.config` do not wait for jax.
"""

from typing import TYPE_CHECKING, Any

from clip_lite_jax._version import __version__

if TYPE_CHECKING:
    from clip_lite_jax.inference import DualEncoderModel, load

__all__ = ["DualEncoderModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("DualEncoderModel", "load"):
        from clip_lite_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
