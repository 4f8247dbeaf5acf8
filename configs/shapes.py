"""Drawn scenes whose mutual information is known: estimates against the truth, in minutes."""

from clip_lite_jax.config import (
    AugmentConfig,
    Config,
    CriticConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    NegativesConfig,
    OptimConfig,
    ShapesConfig,
)


def get_config() -> Config:
    return Config(
        name="shapes",
        steps=2000,
        batch_size=128,
        data=DataConfig(
            source="shapes",
            shapes=ShapesConfig(examples=256_000),  # each is seen once: nothing to learn by heart
            image_size=32,
            max_tokens=32,
            # Cropped, mirrored or recoloured, an image would no longer tell its scene.
            augment=AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0),
        ),
        model=ModelConfig(
            image=EncoderConfig(name="convnet", options={"widths": [32, 64, 128]}),
            text=EncoderConfig(
                name="transformer", options={"width": 128, "layers": 0, "dropout": 0.0}
            ),
            critic=CriticConfig(options={"width": 128, "hidden": 256}),
        ),
        negatives=NegativesConfig(name="shuffle", sides="both"),
        optim=OptimConfig(learning_rate=2e-3, weight_decay=0.01, ema_decay=0.995),
        # Independent pairs repeat scenes and captions, so that no search has a single right answer.
        eval=EvalConfig(every=250, retrieval=(), max_information_pairs=2000),
    )
