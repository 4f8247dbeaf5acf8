"""What is maximised, over which negatives, and how the weights follow."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from clip_lite_jax.config.model import CriticConfig
from clip_lite_jax.config.types import (
    STRICT,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
)


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
    frozen: dict[str, tuple[NonNegativeInt, PositiveInt | None]] = Field(default_factory=dict)
    """Parameters that rest from one step up to another, by path: ``{"^image_encoder/": (0, None)}``
    never trains the image encoder (LiT, arXiv 2111.07991); with ``(0, 1000)`` it is trained from
    step 1000 on, with ``(1000, None)`` until then.  A tower that is never trained runs as in
    evaluation."""
    clip_norm: PositiveFloat | None = 1.0
    """Limit on the global norm of the gradient."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is not finite: end the run, or change nothing and be
    counted."""
    max_skipped: PositiveInt = 100
    """``skip``: steps after which it ends all the same."""
    lookahead_steps: NonNegativeInt = 0
    """Lookahead (arXiv 1907.08610): steps between synchronisations; 0 is off."""
    lookahead_alpha: Fraction = 0.5
    ema_decay: Fraction = 0.0
    """Exponential moving average of the parameters, used by evaluation and `load`; 0 is off."""
