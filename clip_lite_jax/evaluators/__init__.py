"""Evaluators: each a class with ``run(fns) -> dict[str, float]`` over encoded held-out data."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # which needs one of these modules
    from clip_lite_jax.train_step import EncodeFns


class Evaluator(Protocol):
    def run(self, fns: "EncodeFns") -> dict[str, float]:
        """Metrics by name, without the evaluator's own name."""
        ...
