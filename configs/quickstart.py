"""CLIP-Lite on the built-in emoji pairs: minutes on two CPU cores."""

from clip_lite_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    GalleryCaptions,
    ModelConfig,
    NegativesConfig,
    OptimConfig,
    RetrievalConfig,
)


def get_config() -> Config:
    return Config(
        name="quickstart",
        steps=1500,
        batch_size=128,
        data=DataConfig(
            source="emoji",
            image_size=48,
            captions="joined",
            max_tokens=32,
            augment=AugmentConfig(
                crop_scale=(0.5, 1.0),
                brightness=0.2,
                contrast=0.2,
                saturation=0.2,
                tag_dropout=0.5,
            ),
        ),
        model=ModelConfig(
            image=EncoderConfig(name="convnet", options={"widths": [48, 96, 192]}),
            # No attention: five thousand captions are too few to learn the order of words from.
            text=EncoderConfig(name="transformer", options={"layers": 0, "dropout": 0.2}),
        ),
        negatives=NegativesConfig(name="hard", sides="both"),
        optim=OptimConfig(learning_rate=5e-4, weight_decay=0.1, ema_decay=0.998),
        eval=EvalConfig(
            every=500,
            retrieval=(
                gallery("unseen_concepts", "joined", "validation", "test"),
                gallery("unseen_concepts_by_name", "first", "validation", "test"),
                gallery("unseen_artist", "joined", "artist_validation", "artist_test", 400),
            ),
        ),
    )


def gallery(
    name: str,
    captions: GalleryCaptions,
    validation: str,
    test: str,
    max_images: int | None = None,
) -> RetrievalConfig:
    """One image of every concept; of captions all words, the average, or the ``first``, a name."""
    return RetrievalConfig(
        name=name,
        validation=validation,
        test=test,
        one_per_group=True,
        captions=captions,
        max_images=max_images,
    )
