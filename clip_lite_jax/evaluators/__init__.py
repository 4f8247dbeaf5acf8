"""Evaluators: each a class with ``run(fns) -> dict[str, float]`` over encoded held-out data."""

from typing import Protocol

from clip_lite_jax.train_step import EncodeFns


class Evaluator(Protocol):
    def run(self, fns: EncodeFns) -> dict[str, float]:
        """Metrics by name, without the evaluator's own name."""
        ...
