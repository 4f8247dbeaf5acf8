"""Evaluation tasks by name: what `clip-lite eval` runs, and training with `eval.tasks`."""

from collections.abc import Mapping
from typing import Any

from clip_lite_jax.config import from_dict
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators.bias import BiasOptions, build_bias
from clip_lite_jax.evaluators.calibration import CalibrationOptions, CalibrationTask
from clip_lite_jax.evaluators.grounding import GroundingOptions, build_grounding
from clip_lite_jax.evaluators.information import InformationOptions, InformationTask
from clip_lite_jax.evaluators.knn import KNN, KNNOptions
from clip_lite_jax.evaluators.linear_probe import LinearProbe, LinearProbeOptions
from clip_lite_jax.evaluators.retrieval_task import RetrievalOptions, RetrievalTask
from clip_lite_jax.evaluators.tasks import Task, TaskData, TaskEvaluator
from clip_lite_jax.evaluators.voc_svm import VocSVM, VocSVMOptions
from clip_lite_jax.evaluators.zero_shot import ZeroShot, ZeroShotOptions

TASKS: dict[str, Task] = {
    "retrieval": Task(RetrievalOptions, RetrievalTask, "captions and images find each other"),
    "grounding": Task(GroundingOptions, build_grounding, "heat maps point at what a phrase means"),
    "bias": Task(BiasOptions, build_bias, "associations before and after a concept is removed"),
    "zero_shot": Task(ZeroShotOptions, ZeroShot, "classes by the captions that name them"),
    "knn": Task(KNNOptions, KNN, "classes by the votes of the nearest training pictures"),
    "linear_probe": Task(LinearProbeOptions, LinearProbe, "a linear classifier on features"),
    "voc_svm": Task(VocSVMOptions, VocSVM, "VOC 2007: an SVM for each class, mean AP"),
    "information": Task(InformationOptions, InformationTask, "bounds on mutual information"),
    "calibration": Task(
        CalibrationOptions, CalibrationTask, "whether σ(T) is the probability that a pair is real"
    ),
}


def task_of(name: str) -> Task:
    """Raises `ConfigError`, which lists the tasks, where there is none of that name."""
    if name not in TASKS:
        raise ConfigError(f"no task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name]


def options_of(name: str, options: Mapping[str, Any]) -> Any:
    """The options of a task, those that are not given by default.

    Raises:
      ConfigError: no such task, or no such option of it.
    """
    kind = task_of(name).options
    try:
        return from_dict(kind, options)
    except ConfigError as error:
        raise ConfigError(f"options of the task {name!r}: {error}") from error


def build_task(name: str, data: TaskData, options: Mapping[str, Any]) -> TaskEvaluator:
    """The evaluator of a task.

    Raises:
      ConfigError: no such task, or no such option of it.
      DataError: the source lacks what the task measures.
    """
    chosen = options_of(name, options)
    return task_of(name).build(data, chosen)
