"""The published recipes of CLIP-Lite on COCO Captions: ``--config configs/paper.py:VARIANT``.

Facts from github.com/4m4n5/CLIP-Lite (commit a6825d0): the files under ``configs/done`` over the
defaults of ``config.py``, and what the code makes of them.  docs/paper.md says where each setting
comes from, which variants were published and which are ours, and everything that differs.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from clip_lite_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    NegativesConfig,
    ObjectiveConfig,
    OptimConfig,
    RetrievalConfig,
)
from clip_lite_jax.errors import ConfigError

GPUS = 8
"""Of the published command.  Batch statistics and negatives stay within what one of them held."""

DOT = CriticConfig(
    name="dot",
    options={
        "width": 2048,
        "hidden": 2048,
        "norm": "batch",
        "noisy_identity": True,
        "temperature": 0.07,
        "temperature_range": [1e-4, 1e4],  # the published one has no limits
    },
)
CONCAT = CriticConfig(name="concat", options={"hidden": 512, "layers": 2})

PRIORS = ObjectiveConfig(prior_weight=0.1, prior_of=("image", "text"), prior="published")
self_supervised = partial(replace, PRIORS, visual_weight=1.0, textual_weight=1.0)
"""The mixed critics differ from the plain ones in these terms alone."""

Frozen = Mapping[str, tuple[int, int | None]]
NO_BIAS: Frozen = {r"critic/score_bias$": (0, None)}
"""The published dot critic has no bias: ours rests at 0."""
UNFROZEN: Frozen = {}


def bert(layers: int, init_from: str | None = None) -> EncoderConfig:
    return EncoderConfig(name="bert", options={"layers": layers}, init_from=init_from)


# As the code builds one that is not pretrained: the library's default configuration.
MPNET = EncoderConfig(name="mpnet", options={"layers": 12, "positions": 512, "epsilon": 1e-12})
FOLDERS = {"bert": "bert-base-uncased", "mpnet": "paraphrase-mpnet-base-v2"}
"""Folders of these models from the Hugging Face hub; docs/paper.md has the commands."""


def recipe(
    *,
    batch: int = 1024,
    steps: int = 250_000,
    warmup: int = 10_000,
    flip: float = 0.0,
    share: float = 1.0,
    image: str = "resnet50",
    text: EncoderConfig = MPNET,
    critic: CriticConfig = DOT,
    objective: ObjectiveConfig = PRIORS,
    negatives: NegativesConfig | None = None,
    frozen: Frozen = NO_BIAS,
) -> Config:
    """The published training with these changes; without any it is the main run."""
    return Config(
        steps=steps,
        batch_size=batch,
        data=DataConfig(
            source="annotations/captions_train2017.json",
            splits={"validation": "annotations/captions_val2017.json"},
            train_share=share,
            image_size=224,
            augment=AugmentConfig(crop_ratio=(0.75, 1.333), flip=flip, hue=0.1),
            tokenizer=FOLDERS[text.name],
            caption_normalization="published",
            max_tokens=30,
            threads=16,
        ),
        model=ModelConfig(
            image=EncoderConfig(
                name=image, options={"batch_norm": "grouped", "batch_groups": GPUS}
            ),
            text=text,
            critic=critic,
            pixel_mean=(0.485, 0.456, 0.406),
            pixel_std=(0.229, 0.224, 0.225),
            dtype="bfloat16",
        ),
        objective=objective,
        # The next caption of those on the same GPU.
        negatives=negatives or NegativesConfig(name="roll", sides="text", block=batch // GPUS),
        optim=OptimConfig(
            name="sgd",
            learning_rate=0.001,
            multipliers={"^image_encoder/": 200.0},  # 0.2
            warmup_steps=warmup,
            momentum=0.9,
            weight_decay=1e-4,
            no_decay="^$",  # everything decays: the published pattern matches no name of this model
            frozen=dict(frozen),
            clip_norm=10.0,
            lookahead_steps=5,
            lookahead_alpha=0.5,
        ),
        eval=EvalConfig(
            every=10_000,
            # COCO has no third split with captions: val2017 is watched and reported.
            retrieval=(
                RetrievalConfig(name="val2017", validation="validation", test="validation"),
            ),
            information_test_split="validation",
        ),
        checkpoint=CheckpointConfig(every=10_000),
        log=LogConfig(every=100),
    )


ablation = partial(recipe, batch=512, steps=200_000, flip=0.5, text=bert(2))
"""Batch sizes and image encoders."""
pretrained = partial(recipe, text=bert(12, init_from=FOLDERS["bert"]))
"""Shares of the data."""
ours = partial(recipe, objective=ObjectiveConfig())
"""Other objectives and negatives at the budget of the main run, without prior matching."""

VARIANTS: dict[str, Config] = {
    "main": recipe(),
    "batch_64": ablation(batch=64),
    "batch_128": ablation(batch=128),
    "batch_256": ablation(batch=256),
    "batch_512": ablation(batch=512),
    "batch_1024": ablation(batch=1024),
    "resnet18": ablation(image="resnet18"),
    "resnet50": ablation(image="resnet50"),
    "resnet101": ablation(image="resnet101"),
    "resnet152": ablation(image="resnet152"),
    "bert_2": recipe(text=bert(2)),
    "bert_4": recipe(text=bert(4)),
    "bert_6": recipe(text=bert(6)),
    "bert_12": recipe(text=bert(12)),
    "data_10": pretrained(share=0.10, steps=20_000, warmup=1_000),
    "data_25": pretrained(share=0.25, steps=62_500, warmup=2_500),
    "data_50": pretrained(share=0.50, steps=125_000, warmup=5_000),
    "data_75": pretrained(share=0.75, steps=187_500, warmup=7_500),
    "data_100": pretrained(),
    "dot": recipe(),
    "concat": recipe(critic=CONCAT, frozen=UNFROZEN),
    "condot": recipe(
        critic=replace(CONCAT, name="condot"), objective=self_supervised(self_critic=DOT)
    ),
    "dotcon": recipe(
        critic=replace(DOT, name="dotcon"), objective=self_supervised(self_critic=CONCAT)
    ),
    "bilinear": recipe(critic=CriticConfig(name="bilinear"), frozen=UNFROZEN),
    "separable": recipe(critic=CriticConfig(name="separable"), frozen=UNFROZEN),
    "hard": ours(negatives=NegativesConfig(name="hard", sides="text")),
    "infonce": ours(
        objective=ObjectiveConfig(name="infonce"),
        negatives=NegativesConfig(name="all", sides="both"),
    ),
    "sigmoid": ours(
        objective=ObjectiveConfig(name="sigmoid"),
        negatives=NegativesConfig(name="all", sides="text"),
        # SigLIP's start (arXiv 2303.15343, section 3.2).
        critic=replace(DOT, options={**DOT.options, "temperature": 0.1, "bias": -10.0}),
        frozen=UNFROZEN,
    ),
}


def get_config(variant: str = "main") -> Config:
    """The configuration of one of `VARIANTS`; raises `ConfigError` for any other name."""
    if variant not in VARIANTS:
        raise ConfigError(f"configs/paper.py:{variant}: choose one of {', '.join(VARIANTS)}")
    return replace(VARIANTS[variant], name=f"paper:{variant}")
