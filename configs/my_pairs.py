"""Your own pairs: ``--config.data.source=pairs.csv``, a table with columns image and caption."""

from clip_lite_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    NegativesConfig,
    OptimConfig,
)


def get_config() -> Config:
    return Config(
        name="my_pairs",
        steps=3000,
        batch_size=64,
        data=DataConfig(
            source="pairs.csv",
            image_size=64,
            augment=AugmentConfig(crop_scale=(0.4, 1.0)),
        ),
        model=ModelConfig(
            image=EncoderConfig(name="convnet", options={"widths": [64, 128, 256]}),
            text=EncoderConfig(name="transformer", options={"layers": 2, "dropout": 0.1}),
        ),
        negatives=NegativesConfig(name="hard", sides="both"),
        optim=OptimConfig(learning_rate=5e-4, ema_decay=0.998),
        eval=EvalConfig(every=500),
    )
