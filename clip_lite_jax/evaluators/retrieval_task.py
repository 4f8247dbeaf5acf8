"""Retrieval as the literature reports it: Karpathy's splits of COCO and Flickr30k, or any source.

The protocol is that of VSE++ (arXiv 1707.05612), section 4, and all after it: five captions of an
image, each of which is a right answer to it; one right image for each caption; COCO's 1k numbers
are the mean over five folds of its 5k test images, in their order.
"""

import numpy as np
from pydantic.dataclasses import dataclass

from clip_lite_jax.config import RetrievalConfig
from clip_lite_jax.config.types import STRICT, PositiveInt
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.encoding import encode_captions, encode_usable
from clip_lite_jax.evaluators.ranking import Counts, count
from clip_lite_jax.evaluators.reranking import reranked
from clip_lite_jax.evaluators.retrieval import metrics_of, retrieval_intervals, select
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
            f"split {options.split}, {len(self.chosen)} of {len(self.source)} images"
            + (", one of each group" if options.one_per_group else "")
            + f"; {'all' if kept is None else f'the first {kept}'} captions of an image, any of "
            "which is right; one right image for a caption; ties count as wrong; "
            + (f"mean over {options.folds} folds; " if options.folds > 1 else "")
            + (f"the best {options.rerank} by a low rank scored; " if options.rerank else "")
            + "intervals by resampling groups"
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        data, options = self.data, self.options
        kept, images = encode_usable(
            fns.image, data.inputs.image, self.source, self.chosen, data.batch_size, data.bad
        )
        if len(kept) < options.folds:
            raise DataError(
                f"split {options.split!r}: {len(kept)} of {len(self.chosen)} pictures can be used, "
                f"and retrieval.folds={options.folds} needs one for each"
            )
        examples = [self.source.metadata(index) for index in np.array(self.chosen)[kept].tolist()]
        captions = [e.captions[: options.captions_per_image] for e in examples]
        owner = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        texts = encode_captions(
            fns, data.inputs.text, [text for own in captions for text in own], data.batch_size
        )
        folds: list[Counts] = []
        every: list[dict[str, float]] = []
        for rows in np.array_split(np.arange(len(images)), options.folds):
            own = np.isin(owner, rows)
            gallery = images[rows], texts[own], owner[own] - rows[0]
            folds.append(
                count(fns, *gallery)
                if options.rerank is None
                else reranked(fns, *gallery, options.rerank)
            )
            every.append(metrics_of(folds[-1], gallery[2]))
        metrics = {name: float(np.mean([m[name] for m in every])) for name in every[0]}
        metrics |= {"images": len(images), "captions": len(owner)}
        # Every query in its own gallery; galleries stay as they are.
        counts = Counts(
            np.concatenate([fold.images for fold in folds]),
            np.concatenate([fold.captions for fold in folds]),
        )
        _, groups = np.unique([example.group for example in examples], return_inverse=True)
        return Outcome(metrics | retrieval_intervals(counts, owner, groups))
