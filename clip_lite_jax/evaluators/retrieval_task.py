"""Retrieval as the literature reports it: Karpathy's splits of COCO and Flickr30k, or any source.

The protocol is that of VSE++ (arXiv 1707.05612), section 4, and all after it: five captions of an
image, each of which is a right answer to it; one right image for each caption; COCO's 1k numbers
are the mean over five folds of its 5k test images, in their order.
"""

from collections.abc import Sequence

import numpy as np
from pydantic.dataclasses import dataclass

from clip_lite_jax.config import RetrievalConfig
from clip_lite_jax.config.types import STRICT, PositiveInt
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.bootstrap import with_shared_intervals
from clip_lite_jax.evaluators.encoding import encode_captions, encode_usable
from clip_lite_jax.evaluators.ranking import count
from clip_lite_jax.evaluators.reranking import reranked
from clip_lite_jax.evaluators.retrieval import RECALLS, metrics_of, per_query, select
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RetrievalOptions:
    split: str = "test"
    captions_per_image: PositiveInt | None = 5
    """The first ones count, five by custom: some of COCO's images have more.  None: all."""
    folds: PositiveInt = 1
    """Parts of the gallery, each searched for itself; 5 for COCO's 1k numbers."""
    max_images: PositiveInt | None = None
    one_per_group: bool = False
    """As in `eval.retrieval`."""
    rerank: PositiveInt | None = None
    """Score only so many candidates of each query exactly; see `reranking`.  For critics that no
    inner product ranks as, on galleries where scoring all with all takes too long."""


class RetrievalTask(TaskEvaluator):
    """R@k, ranks and mean average precision in both directions, with intervals over images."""

    def __init__(self, data: TaskData, options: RetrievalOptions) -> None:
        self.data, self.options = data, options
        self.source = data.split(options.split)
        gallery = RetrievalConfig(
            name="",
            validation="",
            test="",
            max_images=options.max_images,
            one_per_group=options.one_per_group,
        )
        self.chosen = select(self.source, gallery)
        if options.folds > len(self.chosen):
            raise ConfigError(
                f"folds={options.folds} of {len(self.chosen)} images: each needs one at least"
            )
        kept = options.captions_per_image
        self.protocol = (
            f"split {options.split}; {'all' if kept is None else f'the first {kept}'} captions of "
            "an image, any of which is right; one right image for a caption; ties count as wrong; "
            + (f"mean over {options.folds} folds; " if options.folds > 1 else "")
            + (f"the best {options.rerank} by a low rank scored; " if options.rerank else "")
            + "intervals by resampling images"
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        data, options = self.data, self.options
        kept, images = encode_usable(
            fns.image, data.inputs.image, self.source, self.chosen, data.batch_size, data.bad
        )
        examples = [self.source.metadata(index) for index in np.array(self.chosen)[kept].tolist()]
        captions = [e.captions[: options.captions_per_image] for e in examples]
        if not captions:
            raise DataError(f"split {options.split!r}: none of its pictures can be used")
        owner = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        texts = encode_captions(
            fns, data.inputs.text, [text for own in captions for text in own], data.batch_size
        )
        folds = [
            _Fold(
                fns, images[rows], texts[np.isin(owner, rows)], owner[np.isin(owner, rows)], options
            )
            for rows in np.array_split(np.arange(len(images)), options.folds)
        ]
        every = [fold.metrics for fold in folds]
        metrics = {name: float(np.mean([m[name] for m in every])) for name in every[0]}
        metrics |= {name: sum(m[name] for m in every) for name in ("images", "captions")}
        return Outcome(metrics | _intervals(folds))


class _Fold:
    """One gallery: its metrics, and what they are means of."""

    def __init__(
        self,
        fns: EncodeFns,
        images: np.ndarray,
        texts: np.ndarray,
        owner: np.ndarray,
        options: RetrievalOptions,
    ) -> None:
        self.owner = owner - owner[0]
        counts = (
            count(fns, images, texts, self.owner)
            if options.rerank is None
            else reranked(fns, images, texts, self.owner, options.rerank)
        )
        self.metrics = metrics_of(counts, self.owner)
        self.queries = per_query(counts, self.owner)


def _intervals(folds: Sequence[_Fold]) -> dict[str, float]:
    """Of recalls and average precisions; the captions of an image are drawn together.

    Galleries stay as they are: how the numbers change with the wrong answers is not in it.
    """
    starts = np.cumsum([0] + [int(fold.owner[-1]) + 1 for fold in folds])
    owner = np.concatenate([s + fold.owner for s, fold in zip(starts, folds, strict=False)])
    parts = []
    for number, clusters in enumerate((owner, np.arange(starts[-1]))):
        name = folds[0].queries[number][0]
        ranks = np.concatenate([fold.queries[number][1] for fold in folds])
        precisions = np.concatenate([fold.queries[number][2] for fold in folds])
        parts.append(
            ({f"{name}_r{k}": ranks <= k for k in RECALLS} | {f"{name}_map": precisions}, clusters)
        )
    found = with_shared_intervals(parts)
    return {key: value for key, value in found.items() if key.endswith(("_low", "_high"))}
