"""ViT-L/14 at a global batch of 32,768 with one negative per pair, for a slice of 256 TPU chips.

Nobody has run it: it is there to be planned.  docs/plan.md says what it would need and cost.
"""

from clip_lite_jax.config import (
    Config,
    CriticConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    NegativesConfig,
    OptimConfig,
    Options,
    RetrievalConfig,
)

DEEP: Options = {"scan": True, "remat": "full"}
"""One block is compiled for all layers, and keeps its input alone for the backward pass."""


def get_config() -> Config:
    return Config(
        name="vit_l14",
        steps=100_000,
        batch_size=32_768,
        data=DataConfig(
            source="pairs.csv",
            image_size=224,
            tokenizer="clip-vit-large-patch14",
            max_tokens=77,
            threads=16,
        ),
        model=ModelConfig(
            image=EncoderConfig(name="vit_l14", options=DEEP),
            text=EncoderConfig(name="clip_text_l", options=DEEP),
            critic=CriticConfig(options={"width": 768, "hidden": 768}),
            # Source: CLIP's (arXiv 2103.00020), as its code has them.
            pixel_mean=(0.48145466, 0.4578275, 0.40821073),
            pixel_std=(0.26862954, 0.26130258, 0.27577711),
            dtype="bfloat16",
        ),
        # Of its device: nothing but gradients crosses the network.
        negatives=NegativesConfig(name="shuffle", block=128, lanes=1),
        # CLIP (arXiv 2103.00020), tables 18 and 20.
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2000, weight_decay=0.2),
        eval=EvalConfig(
            every=5000,
            retrieval=(RetrievalConfig(name="held_out", validation="validation", test="test"),),
        ),
    )
