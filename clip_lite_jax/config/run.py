"""One run: all sections, and the rules between their fields."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from clip_lite_jax.config.data import DataConfig
from clip_lite_jax.config.learning import NegativesConfig, ObjectiveConfig, OptimConfig
from clip_lite_jax.config.model import ModelConfig
from clip_lite_jax.config.types import (
    STRICT,
    GalleryCaptions,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from clip_lite_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RetrievalConfig:
    """One retrieval gallery, with a split to watch in training and one reported once at the end."""

    name: str
    validation: str
    """Split of the source that is evaluated during training."""
    test: str
    """Split that is evaluated once, after training."""
    one_per_group: bool = False
    """Keep one image of every group (chosen by a hash of its id, not by its place)."""
    captions: GalleryCaptions = "all"
    """``first`` or ``joined``: one caption per image; ``all``: any counts for image → text;
    ``averaged``: T is the mean over all captions of an image, as CLIP averages the embeddings of
    its prompts (arXiv 2103.00020, section 3.1.4)."""
    max_images: PositiveInt | None = None


TaskName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""Files are called by it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """One of `evaluators.registry.TASKS`, on data of its own or those of the run."""

    task: str
    source: str = ""
    """As `data.source`; empty: the run's own splits."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of `data` that this source needs otherwise: ``{"class_caption": "a {}"}``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task; `clip-lite eval --tasks` lists them."""
    while_training: bool = False
    """At every evaluation during training, too, not only once at the end."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    every: PositiveInt = 500
    """Steps between evaluations; the last step is always evaluated."""
    retrieval: tuple[RetrievalConfig, ...] = (
        RetrievalConfig(name="held_out", validation="validation", test="test", max_images=1000),
    )
    batch_size: PositiveInt = 256
    information_split: str = "validation"
    """Split whose held-out pairs give the mutual-information read-offs while training."""
    information_test_split: str = "test"
    max_information_pairs: PositiveInt = 1024
    tasks: dict[TaskName, TaskConfig] = Field(default_factory=dict)
    """More of what is measured, by names of your own, of letters, digits, "_", "." and "-"."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    every: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    minutes: PositiveFloat | None = None
    """Minutes after which one is saved in between."""
    keep: PositiveInt = 2
    """The newest ones, that stay."""
    keep_every: PositiveInt | None = None
    """Those whose step is a multiple of this stay as well."""
    best: str | None = None
    """A number of the evaluation as ``metrics.jsonl`` has it, such as
    ``retrieval/held_out/image_to_text_r10``: the checkpoint where it is best stays as well.  Only
    steps that are evaluated and saved take part."""
    best_is: Literal["highest", "lowest"] = "highest"
    stop_after_minutes: PositiveFloat | None = None
    """Saves and ends with status 75 after so long; the same command goes on from there."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """How the model is spread over devices; changes what fits and how fast, and no result."""

    replica: PositiveInt = 1
    """Slices of accelerators, between which the network is slow: each holds the whole model."""
    fsdp: PositiveInt | Literal["all"] = 1
    """Devices over which parameters and optimizer state are split; ``all`` of a slice."""
    rules: dict[str, NonNegativeInt | None] = Field(default_factory=dict)
    """Dimension that is split by a parameter's path, first match wins, or None to keep it whole:
    ``{"^text_encoder/words": 0}``; the rest is split along the longest that divides."""
    min_size: NonNegativeInt = 4096
    """Parameters of fewer numbers stay whole: to split them costs more than it saves."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    every: PositiveInt = 1
    """Steps between lines of ``metrics.jsonl``."""
    profile: tuple[NonNegativeInt, PositiveInt] | None = None
    """Steps from the first up to the second are traced into ``profile/``."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Weights & Biases project; needs the extra ``wandb``."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One run.  Equal configurations on equal data give equal runs."""

    name: str = "clip-lite"
    seed: NonNegativeInt = 0
    steps: PositiveInt
    batch_size: PositiveInt
    """Pairs per step over all devices and processes."""
    accumulate: PositiveInt = 1
    """Parts of a batch that go through the encoders one after another, to save memory.  Negatives
    are drawn within a part where `negatives.name` allows it (`combinations.draws_within_parts`);
    otherwise every part is encoded twice (GradCache)."""
    resume_from: str | None = None
    """Workdir of another run whose newest checkpoint this one goes on from, with its optimizer and
    at its step.  What --workdir itself holds comes first."""
    init_from: str | None = None
    """Workdir of another run whose weights this one begins with, at step 0; both encoders and the
    critic.  ``model.image.init_from`` and ``model.text.init_from`` are for encoders alone."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    negatives: NegativesConfig = NegativesConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


def validate(config: Config) -> None:
    """Rules between fields; raises `ConfigError`."""
    low, high = config.data.augment.crop_scale
    if low > high or high > 1:
        raise ConfigError(f"data.augment.crop_scale={(low, high)}: needs 0 < low <= high <= 1")
    if config.optim.warmup_steps >= config.steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is not below steps={config.steps}: "
            "give fewer of them (--config.optim.warmup_steps=), or more steps (--config.steps=)"
        )
    if config.resume_from is not None and config.init_from is not None:
        raise ConfigError(
            f"resume_from={config.resume_from!r} and init_from={config.init_from!r}: one of them; "
            "the second begins anew with the weights of another run"
        )
    if config.log.profile is not None and config.log.profile[0] >= config.log.profile[1]:
        raise ConfigError(f"log.profile={config.log.profile}: the first step is below the second")
    if config.data.held_out > 0.45:
        raise ConfigError(f"data.held_out={config.data.held_out} leaves too little to train on")
