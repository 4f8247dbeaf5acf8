"""Pages beside the results of tasks that are better looked at than read."""

from collections.abc import Callable
from typing import Any

from clip_lite_jax.apps import grounding_page
from clip_lite_jax.apps.confusion_page import confusion_page
from clip_lite_jax.evaluators.tasks import Outcome, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns


def _confusions(evaluator: TaskEvaluator, fns: EncodeFns, outcome: Outcome) -> str:
    del fns
    return confusion_page(outcome.tables["confusion"], "Confusions", evaluator.protocol)


PAGES: dict[str, Callable[[Any, EncodeFns, Outcome], str]] = {
    "grounding": grounding_page.page,
    "knn": _confusions,
    "linear_probe": _confusions,
    "zero_shot": _confusions,
}
"""By the name of a task: HTML of its evaluator and what that found."""
