"""Pages beside the results of tasks that are better looked at than read."""

from collections.abc import Callable
from typing import Any

from clip_lite_jax.apps import grounding_page
from clip_lite_jax.evaluators.tasks import Outcome
from clip_lite_jax.train_step import EncodeFns

PAGES: dict[str, Callable[[Any, EncodeFns, Outcome], str]] = {
    "grounding": grounding_page.page,
}
"""By the name of a task: HTML of its evaluator and what that found."""
