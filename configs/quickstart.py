"""CLIP-Lite on the built-in emoji pairs: minutes on two CPU cores."""

from clip_lite_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    NegativesConfig,
    OptimConfig,
    RetrievalConfig,
)


def get_config() -> Config:
    return Config(
        name="quickstart",
        steps=1500,
        batch_size=64,
        data=DataConfig(
            source="emoji",
            augment=AugmentConfig(
                crop_scale=(0.6, 1.0), brightness=0.2, contrast=0.2, saturation=0.2
            ),
        ),
        negatives=NegativesConfig(name="shuffle"),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, ema_decay=0.999),
        eval=EvalConfig(
            every=500,
            retrieval=(
                RetrievalConfig(
                    name="unseen_concepts",
                    validation="validation",
                    test="test",
                    one_per_group=True,
                    captions="first",
                ),
                RetrievalConfig(
                    name="unseen_artist",
                    validation="artist_validation",
                    test="artist_test",
                    one_per_group=True,
                    captions="first",
                    max_images=400,
                ),
            ),
        ),
    )
