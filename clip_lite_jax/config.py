"""The typed configuration tree: what it holds, how it is loaded, overridden and checked.

A file in ``configs/`` is a short Python file with ``get_config() -> Config``.  Each section checks
its own values when it is built; rules between fields and against the machine belong to `validate`
and to the modules that own them (`negatives.layout_of`, `sharding.build_mesh`).
"""

import difflib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from clip_lite_jax.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scalar = bool | int | float | str
Options = dict[str, Scalar | list[Scalar]]

Captions = Literal["random", "first", "joined"]

STRICT = pydantic.ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig:
    """Random changes to a training image and its caption; `data.image_ops`, `data.caption_ops`."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)
    """Share of the image's area that a random crop keeps, (low, high)."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Width over height of the crop, (low, high)."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip; captions then swap "left" and "right"."""
    jitter: Fraction = 0.8
    """Probability that brightness, contrast and saturation change at all."""
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
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
class DataConfig:
    """Where the pairs come from and what becomes of them before they reach the accelerator."""

    source: str = "emoji"
    """``emoji`` or ``shapes`` (built in), or the path of a ``.csv``/``.tsv`` table of image paths
    and captions."""
    shapes: ShapesConfig = ShapesConfig()
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption",)
    """Columns of a table that hold captions, each cell one caption."""
    group_column: str | None = None
    """Rows that share this value depict the same thing and are never each other's negative."""
    split_column: str | None = None
    """Column with ``train``, ``validation`` or ``test``; without it rows are split by hash."""
    held_out: Fraction = 0.1
    """Share of images for validation, and again for test, where there is no split column."""
    image_size: PositiveInt = 64
    """Height and width in pixels of what the image encoder sees."""
    augment: AugmentConfig = AugmentConfig()
    captions: Captions = "random"
    """Which caption of an image a training step sees: any of them, the first, or all of them joined
    to one list of tags (`caption_ops.join`; goes well with `augment.tag_dropout`)."""
    tokenizer: str | None = None
    """A SentencePiece model file; without it one is trained on the training captions."""
    vocab_size: PositiveInt = 2000
    """Upper limit on the pieces of a tokenizer trained here."""
    max_tokens: PositiveInt = 24
    """Captions are cut or padded to this many tokens."""
    threads: NonNegativeInt = 2
    """Threads that decode and augment; 0 works in the training loop's own thread."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead of the step."""
    max_bad_share: Fraction = 0.2
    """The run stops when more than this share of a source's examples cannot be used."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderConfig:
    """One tower: its name in `models.IMAGE_ENCODERS` or `models.TEXT_ENCODERS` and its fields."""

    name: str
    options: Options = Field(default_factory=dict)
    """Fields of the encoder module that differ from the named preset, e.g. ``{"width": 192}``."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CriticConfig:
    """The critic T(image, text); see `models.critics`."""

    name: str = "dot"
    options: Options = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    image: EncoderConfig = EncoderConfig(name="convnet")
    text: EncoderConfig = EncoderConfig(name="transformer")
    critic: CriticConfig = CriticConfig()
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of activations.  Parameters are float32 (float64 with ``float64``, which needs x64)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectiveConfig:
    """The bound that is maximised, and further terms of the loss; see `objectives`.

    The loss is ``(1 - prior_weight) · (bound + visual_weight · visual + textual_weight · textual) +
    prior_weight · prior``; a term of weight 0 costs nothing.
    """

    name: str = "jsd"
    options: Options = Field(default_factory=dict)
    visual_weight: NonNegativeFloat = 0.0
    """Self-supervision: the bound between an image and a second random view of it."""
    textual_weight: NonNegativeFloat = 0.0
    """Self-supervision: the bound between a caption and another caption of the same image."""
    self_critic: CriticConfig | None = None
    """Critic of both self-supervised terms; None is one like `model.critic`, or the other one of
    the mixes ``condot`` and ``dotcon``."""
    prior_weight: Fraction = 0.0
    """Prior matching: features are pushed towards a uniform distribution on [0, 1]."""
    prior_of: tuple[Literal["image", "text"], ...] = ("image",)
    prior: Literal["adversarial", "published"] = "adversarial"
    """``published`` has the sign of the published code, with which the encoder helps the
    discriminator: for comparison with it only."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NegativesConfig:
    """Which text is the negative of which image, across the whole batch; see `negatives`."""

    name: str = "shuffle"
    sides: Literal["text", "image", "both"] = "text"
    """``text``: another text for each image; ``image``: another image for each text."""
    block: PositiveInt | None = None
    """Rows among which a negative is drawn; None is the whole batch."""
    lanes: PositiveInt | None = None
    """Logical lanes of a block; None is the most of 8, 4, 2 and 1 that the block divides into.
    Results depend on it, and not on the number of devices, which must divide into the lanes."""
    k: PositiveInt = 1
    """``k``, ``hard``: negatives drawn per pair and side, without replacement."""
    pool: Literal["lane", "block", "memory"] = "lane"
    """``k``, ``hard``, ``importance``: the candidates of a pair.  ``lane``: rows that its lane was
    dealt, traffic does not grow with the devices; ``block``: all rows of the block, round a ring of
    devices; ``memory``: those of its lane and `memory` embeddings of earlier steps."""
    beta: NonNegativeFloat = 1.0
    """``hard``: a candidate is drawn with probability proportional to exp(beta · score)."""
    beta_warmup_steps: NonNegativeInt = 0
    """``hard``: beta grows linearly from 0 over this many steps."""
    proposal: Literal["sigma", "exp"] = "sigma"
    """``importance``: a candidate is drawn in proportion to sigmoid(score + `proposal_bias`), or to
    exp(score)."""
    proposal_bias: float = 0.0
    chunk: PositiveInt = 128
    """Candidates scored at a time; bounds memory and changes no result."""
    implementation: Literal["dense", "gather", "ring"] = "dense"
    """``all``: ``dense`` keeps the scores of batch × batch; ``gather`` collects all embeddings on
    every device and keeps its own rows of them; ``ring`` passes them round in chunks, and keeps no
    scores at all."""
    memory: PositiveInt = 1024
    """``queue``, ``memory`` and the pool ``memory``: embeddings of earlier steps that a pair sees;
    each lane keeps so many."""
    reembed: bool = False
    """With the pool ``memory``: earlier steps' embeddings only choose, and what is drawn passes
    through today's encoder again.  The memory then keeps images and captions as well."""
    momentum: Fraction = 0.99
    """``queue``: decay of the momentum encoders per step."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    """Peak of the schedule: linear warm-up, then a cosine down to 0 at the last step."""
    warmup_steps: NonNegativeInt = 100
    b1: Fraction = 0.9
    b2: Fraction = 0.98
    momentum: Fraction = 0.9
    """``sgd`` only."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled for ``adamw``, added to the gradient for ``sgd``."""
    no_decay: str = r"(^|/)(bias|scale|log_temperature|score_bias|embedding|position)$"
    """Parameters whose path this regular expression finds do not decay."""
    multipliers: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Learning-rate factor by path, first match wins, e.g. ``{"^image_encoder/": 0.1}``."""
    clip_norm: PositiveFloat | None = 1.0
    """Limit on the global norm of the gradient."""
    lookahead_steps: NonNegativeInt = 0
    """Lookahead (arXiv 1907.08610): steps between synchronisations; 0 is off."""
    lookahead_alpha: Fraction = 0.5
    ema_decay: Fraction = 0.0
    """Exponential moving average of the parameters, used by evaluation and `load`; 0 is off."""


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
    captions: Literal["first", "joined", "all"] = "all"
    """``first`` or ``joined``: one caption per image; ``all``: any counts for image → text."""
    max_images: PositiveInt | None = None


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    every: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    every: PositiveInt = 1
    """Steps between lines of ``metrics.jsonl``."""
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
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    negatives: NegativesConfig = NegativesConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


def config_path(path: str | Path) -> Path:
    """The file that `path` means: itself, or the one of that name shipped with the package."""
    here = Path(__file__).parent
    name = Path(path).name
    candidates = [Path(path), here / "configs" / name, here.parent / "configs" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(
        {p.name for c in candidates[1:] for p in c.parent.glob("*.py")} - {"__init__.py"}
    )
    raise ConfigError(f"--config {path}: no such file; the package brings {', '.join(known)}")


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Runs ``get_config()`` of a Python file and applies dotted overrides.

    Raises:
      ConfigError: no such file, no ``get_config``, an unknown field or a value of the wrong type.
    """
    file = config_path(path)
    spec = importlib.util.spec_from_file_location(f"clip_lite_jax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: a config is a Python file, .py, that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{file}: a config file defines get_config() -> Config")
        config = module.get_config()
    except pydantic.ValidationError as error:
        raise ConfigError(f"{file}: {_explain(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{file}: get_config() gave {type(config).__name__}, not Config")
    for name, value in (overrides or {}).items():
        config = override(config, name, value)
    validate(config)
    return config


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """``["--config.optim.learning_rate=3e-4"]`` → ``{"optim.learning_rate": "3e-4"}``."""
    overrides, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        if not name.startswith("--config."):
            raise ConfigError(f"unknown argument {flag!r}; fields are set by --config.FIELD=VALUE")
        if not equals:
            if not rest:
                raise ConfigError(f"{flag} needs a value: {flag}=VALUE")
            value = rest.pop(0)
        overrides[name.removeprefix("--config.")] = value
    return overrides


def override(config: Any, name: str, value: str, prefix: str = "") -> Any:
    """A copy of `config` with the dotted field `name` set from text, converted to its type."""
    head, _, tail = name.partition(".")
    known = {field.name for field in fields(config)}
    if head not in known:
        raise ConfigError(_unknown_field(config, prefix + name, prefix, known))
    current = getattr(config, head)
    if tail and is_dataclass(current):
        return replace(config, **{head: override(current, tail, value, f"{prefix}{head}.")})
    if tail and isinstance(current, dict):
        return _replace_field(config, head, [current | {tail: v} for v in _readings(value)], prefix)
    if tail:
        raise ConfigError(f"--config.{prefix}{name}: {prefix}{head} has no fields of its own")
    return _replace_field(config, head, _readings(value), prefix)


def _readings(text: str) -> list[Any]:
    """What a command-line value can mean: JSON where it is JSON, else the text itself."""
    try:
        return [json.loads(text), text]
    except json.JSONDecodeError:
        return [text]


def _replace_field(config: Any, name: str, readings: list[Any], prefix: str) -> Any:
    errors = []
    for reading in readings:
        try:
            return replace(config, **{name: reading})
        except pydantic.ValidationError as error:
            errors.append(error)
    raise ConfigError(f"--config.{prefix}{name}={readings[-1]}: {_explain(errors[0])}")


def _explain(error: pydantic.ValidationError) -> str:
    """Pydantic's findings in one line: field, what is wrong, the value it got."""
    parts = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"])
        parts.append(f"{error.title}.{field}: {item['msg']} (got {item['input']!r})")
    return "; ".join(parts)


def _unknown_field(config: Any, name: str, prefix: str, known: set[str]) -> str:
    last = name.rpartition(".")[2]
    near = [prefix + n for n in difflib.get_close_matches(name.removeprefix(prefix), known)]
    # A right name in the wrong section is the commonest slip: look for it below as well.
    deeper = [
        p
        for p in field_paths(config, prefix)
        if difflib.get_close_matches(last, [p.rpartition(".")[2]])
    ]
    nearest = list(dict.fromkeys(near + deeper))[:4]
    hint = (
        f"did you mean {' or '.join(nearest)}?"
        if nearest
        else f"fields: {', '.join(sorted(known))}"
    )
    return f"--config.{name}: no such field; {hint}"


def field_paths(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves of a configuration."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from field_paths(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def validate(config: Config) -> None:
    """Rules between fields; raises `ConfigError`."""
    low, high = config.data.augment.crop_scale
    if low > high or high > 1:
        raise ConfigError(f"data.augment.crop_scale={(low, high)}: needs 0 < low <= high <= 1")
    if config.optim.warmup_steps >= config.steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is not below steps={config.steps}"
        )
    if config.data.held_out > 0.45:
        raise ConfigError(f"data.held_out={config.data.held_out} leaves too little to train on")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`; unknown or ill-typed fields raise `ConfigError`."""
    try:
        return pydantic.TypeAdapter(Config).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error)) from error


def describe(config: Any, depth: int = 0) -> str:
    """The resolved tree as indented text."""
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            lines += [f"{'  ' * depth}{field.name}:", describe(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{field.name}: {value}")
    return "\n".join(lines)
