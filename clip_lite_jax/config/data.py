"""Where pairs come from, and what becomes of them."""

from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from clip_lite_jax.config.types import (
    STRICT,
    Captions,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig:
    """Random changes to a training image and its caption; `data.image_ops`, `data.caption_ops`."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)
    """Share of the image's area that a random crop keeps, (low, high)."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Width over height of the crop, (low, high)."""
    resampling: Literal["antialiased", "bilinear"] = "antialiased"
    """How a crop becomes `image_size` pixels wide.  ``bilinear`` asks the four pixels next to each,
    which is faster and needs OpenCV (the extra ``opencv``); reductions to less than a half are
    averaged first."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip; captions then swap "left" and "right"."""
    jitter: Fraction = 0.8
    """Probability that brightness, contrast, saturation and hue change at all."""
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: Fraction = 0.0
    """Largest turn of the hue either way, as a share of the colour circle: 0.5 reaches them all."""
    tag_dropout: Fraction = 0.0
    """Probability that a tag goes from a caption that lists tags ("card, game, wildcard")."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShapesConfig:
    """The built-in source ``shapes``, whose mutual information is known; `data.shapes`."""

    examples: PositiveInt = 50_000
    """Training pairs."""
    held_out: PositiveInt = 2_000
    """Validation pairs, and as many test pairs."""
    seed: NonNegativeInt = 0
    """Other numbers give other pairs of the same distribution."""
    named: dict[str, Fraction] = Field(
        default_factory=lambda: {"size": 0.5, "colour": 1.0, "shape": 1.0, "position": 0.5}
    )
    """Probability that a caption names a factor; 0 for a factor that is not listed."""
    error: Fraction = 0.1
    """Probability that what it names is wrong: one of the factor's other values, evenly."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PartConfig:
    """One of the sources of a mixture."""

    source: str
    """As `data.source`."""
    weight: PositiveFloat | None = None
    """How much of the examples of training it gives, beside the weights of the other parts."""
    epochs: PositiveFloat | None = None
    """In place of weights: how often each of its examples is seen while one of a part with
    ``epochs=1`` is seen once."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of `data` that this source needs otherwise: ``{"caption_columns": ["title"]}``."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Where the pairs come from and what becomes of them before they reach the accelerator."""

    source: str = "emoji"
    """``emoji`` or ``shapes`` (built in), ``tfds:NAME``, or the path of a table (``.csv``,
    ``.tsv``, ``.jsonl``, ``.parquet``), of COCO's or Karpathy's ``.json``, of Flickr30k's
    ``.token``, of shards (``.tar``, ``.arrayrecord``) or of a folder, or the URL of one; see
    docs/data.md."""
    format: str | None = None
    """What `source` is, where its name does not say so; see `data.sources.FORMATS`."""
    shapes: ShapesConfig = ShapesConfig()
    splits: dict[str, str] = Field(default_factory=dict)
    """Files of their own for other splits, ``{"validation": "val.csv"}``; `source` is then all for
    training."""
    allow_leaks: bool = False
    """Train on pictures that are in another file's split or another part's, too."""
    mixture: dict[str, PartConfig] = Field(default_factory=dict)
    """Several sources in place of `source`, by names of your own."""
    mixture_temperature: PositiveFloat = 1.0
    """A part without weight or epochs gives examples in proportion to its size to the power of
    1 / temperature: 1 for sizes as they are, above it small sources gain."""
    image_folder: str | None = None
    """Folder that image paths are relative to; None: that of the source, or where its publishers
    put it."""
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption",)
    """Columns of a table that hold captions, each cell one caption."""
    class_caption: str = "a photo of a {}."
    """What becomes of the name of a class in a source that has classes in place of captions."""
    group_column: str | None = None
    """Rows that share this value depict the same thing and are never each other's negative."""
    split_column: str | None = None
    """Column with ``train``, ``validation`` or ``test``; without it rows are split by hash."""
    held_out: Fraction = 0.1
    """Share of images for validation, and again for test, where there is no split column."""
    train_share: PositiveFraction = 1.0
    """Share of the groups of training images to train on, chosen by a hash of the group: a smaller
    share is a part of any larger one.  Other splits stay whole."""
    image_size: PositiveInt = 64
    """Height and width in pixels of what the image encoder sees."""
    resize: PositiveInt | None = None
    """Evaluation scales the shorter side of an image to this and cuts the centre out; None is
    `image_size`, which keeps the most of it."""
    augment: AugmentConfig = AugmentConfig()
    captions: Captions = "random"
    """Which caption of an image a training step sees: any of them, the first, or all of them joined
    to one list of tags (`caption_ops.join`; goes well with `augment.tag_dropout`).  ``averaged``:
    the mean of the features of all of them, each scaled to length 1; needs `model.text.cache`."""
    tokenizer: str | None = None
    """A SentencePiece model, a ``tokenizer.json`` of Hugging Face's, a folder with one, or nothing:
    what `model.text.init_from` brings, or else one trained on the training captions."""
    caption_normalization: Literal["none", "published"] = "none"
    """What happens to a caption before its tokenizer sees it; see `caption_ops.NORMALIZATIONS`."""
    vocab_size: PositiveInt = 2000
    """Upper limit on the pieces of a tokenizer trained here."""
    max_tokens: PositiveInt = 24
    """Captions are cut or padded to this many tokens."""
    threads: NonNegativeInt = 2
    """Threads that decode and augment; 0 works in the training loop's own thread."""
    workers: NonNegativeInt = 0
    """Processes that decode and augment, each with as many `threads`: for machines of many cores,
    where the threads of one process wait for each other.  0: none but the trainer."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead of the step."""
    feature_cache: str | None = None
    """Folder of the features that `model.image.cache` and `model.text.cache` keep; None is
    ``features`` in the workdir.  Runs may share it: what was computed from other weights or other
    data lies in another folder below."""
    cached_views: NonNegativeInt = 0
    """Random views of an image whose features are kept; a step reads one of them.  0: the view of
    evaluation alone."""
    max_bad_share: Fraction = 0.2
    """The run stops when more than this share of a source's examples cannot be used."""
    strict: bool = False
    """Stop at the first example that cannot be used."""

    @property
    def sources(self) -> tuple[str, ...]:
        """`source`, or those of a mixture's parts."""
        return tuple(part.source for part in self.mixture.values()) or (self.source,)
