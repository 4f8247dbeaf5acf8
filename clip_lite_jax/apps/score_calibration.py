"""The probability that a pair is real, and when T alone does not say it."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clip_lite_jax.config import Config, DataConfig, to_dict
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.record_files import TFDS
from clip_lite_jax.data.sources import Source, build_sources, fingerprint
from clip_lite_jax.errors import DataError, UserError
from clip_lite_jax.evaluators.calibration import (
    Calibration,
    CalibrationOptions,
    CalibrationTask,
)
from clip_lite_jax.evaluators.tasks import Outcome, TaskData
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.negatives import uses_memory
from clip_lite_jax.objectives import OPTIMAL_CRITIC

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What was fitted, on what, and how well it does."""

    calibration: Calibration
    fitted_on: str
    pairs: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of one half of the groups after a fit to the other."""
    points: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of a reliability plot, ``uncalibrated`` and ``calibrated``, on the same half."""


def why_not_log_r(config: Config) -> list[str]:
    """Reasons for which this model's T is no estimate of log p(x, y) / p(x) p(y)."""
    reasons = []
    objective, negatives = config.objective.name, config.negatives
    if OPTIMAL_CRITIC[objective] != "log r":
        reasons.append(
            f"objective.name={objective}: its best critic is {OPTIMAL_CRITIC[objective]}, so that "
            "T is shifted"
        )
    if negatives.name == "hard":
        reasons.append(
            f"negatives.name=hard: training drew negatives in proportion to exp({negatives.beta:g} "
            "T), so that T is stretched and shifted, (log r + log Z(x)) / (1 + β) at best"
        )
    if negatives.name == "importance" and negatives.proposal == "exp":
        reasons.append(
            "negatives.proposal=exp: log r in expectation, but learned from few negatives with "
            "large weights"
        )
    if uses_memory(negatives):
        reasons.append(
            "negatives of earlier steps (queue, memory): T was learned beside embeddings that "
            "other weights had made"
        )
    return reasons


def fit(model: DualEncoderModel, data: DataConfig, split: str | None, name: str) -> Fitted:
    """Scale and shift for a model, from real pairs of a source and derangements of them.

    `split` None takes ``validation``, or the only one there is.

    Raises:
      DataError: no such split, or too few pairs.
    """
    sources = build_sources(data, BadExamples(), training=False)
    return fit_on(model, sources, split, name)


def fit_on(
    model: DualEncoderModel, sources: Mapping[str, Source], split: str | None, name: str
) -> Fitted:
    """`fit` on splits that are open."""
    if split is None:
        split = next(iter(sources)) if len(sources) == 1 else "validation"
    inputs = TowerInputs(model.pixels, model.tokenizer)
    data = TaskData(sources, inputs, model.batch_size, BadExamples())
    task = CalibrationTask(data, CalibrationOptions(fit=split, read=split))
    scores = {split: task.galleries[split].scores(model.fns)}
    everything = task.of(split, scores)
    try:
        outcome = task.judged(*task.halves(scores))
    except DataError:  # enough to fit on, too few to tell how well that went
        outcome = Outcome({})
    return Fitted(
        everything.fit(),
        f"{name}, split {split}",
        len(everything.real),
        outcome.metrics,
        {kind.removeprefix("reliability_"): rows for kind, rows in outcome.tables.items()},
    )


def own_calibration(model: DualEncoderModel) -> Fitted | None:
    """From the validation pairs of the model's own run; None, with the reason logged, if they are
    not on this machine as they were.

    A model may come from a stranger: no host is asked for anything because its settings name it.
    """
    if named := list(_elsewhere(to_dict(model.config)["data"])):
        log.warning(
            "not calibrated on what the model was validated on, %r: nothing is fetched from where "
            "a model says; if you trust it, --calibrate %r reads it",
            named[0],
            named[0],
        )
        return None
    data = replace(model.config.data, max_bad_share=1.0, strict=False)
    split = model.config.eval.information_split
    try:
        sources = build_sources(data, BadExamples(), training=False)
        if model.data_fingerprint and fingerprint(sources) != model.data_fingerprint:
            raise DataError("it has changed since")
        return fit_on(model, sources, split, f"the model's own data ({data.source or 'mixture'})")
    except UserError as error:
        log.warning(
            "not calibrated on what the model was validated on, %s: %s; --calibrate SOURCE fits "
            "scale and shift on other pairs",
            data.source or "a mixture",
            error,
        )
        return None


def _elsewhere(settings: Any) -> Iterator[str]:
    """All texts that name what is not on this machine: of sources, parts, splits and folders.

    Those are URLs, also inside others ("simplecache::http://"), and data sets that TFDS would look
    for on its servers or those of others ("tfds:huggingface:").
    """
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for value in settings:
            yield from _elsewhere(value)
    elif isinstance(settings, str):
        of_tfds = settings.startswith(TFDS) and not Path(settings.removeprefix(TFDS)).is_dir()
        if of_tfds or "://" in settings:
            yield settings
