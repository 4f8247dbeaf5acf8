"""One run of `wrong_captions`: a critic between frozen towers, and its scores of held-out pairs.

Critics, negatives and objectives are the library's; one compiled program makes a whole run
(`one_negative_train`), so that many seeds are cheap.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.frozen_linear import unit
from benchmarks.one_negative_methods import Recipe
from benchmarks.one_negative_train import Setting, Task, Trainer, TrainSet, rotation
from clip_lite_jax.config import NegativesConfig, load_config
from clip_lite_jax.data.inputs import TowerInputs
from clip_lite_jax.data.sources import Source
from clip_lite_jax.files import replacing
from clip_lite_jax.pretrained.towers import load_towers
from clip_lite_jax.run import build_run

GALLERIES = {
    "unseen concepts": {"validation": "validation", "test": "test"},
    "unseen artist": {"validation": "artist_validation", "test": "artist_test"},
}
"""Splits of the built-in pairs, by what is held out and by stage."""


def _both_sides(name: str, **options: Any) -> NegativesConfig:
    return NegativesConfig(name=name, sides="both", lanes=1, chunk=2048, **options)


METHODS = {
    "jsd": Recipe("JSD, one random negative", "jsd", _both_sides("shuffle")),
    "infonce": Recipe("InfoNCE, all negatives", "infonce", _both_sides("all")),
    "sigmoid": Recipe("sigmoid, all negatives", "sigmoid", _both_sides("all"), log_bias=True),
    "jsd_hard": Recipe("JSD, one hard negative", "jsd", _both_sides("hard", pool="block")),
    "jsd_importance": Recipe(
        "JSD, one negative by importance", "jsd", _both_sides("importance", pool="block")
    ),
}


@dataclass(frozen=True)
class Gallery:
    """Held-out pairs: N images with M captions in all, as the critics take them."""

    image: np.ndarray  # [N, components]
    caption: np.ndarray  # [M, components]
    groups: np.ndarray  # [N] text
    captions: np.ndarray  # [M] text
    owner: np.ndarray  # [M] the image of each caption, ascending


@dataclass(frozen=True)
class Pairs:
    """The training pairs and the held-out ones by split."""

    train: TrainSet
    galleries: dict[str, Gallery]


def load_pairs(features: str, workdir: Path, components: int) -> Pairs:
    """The built-in pairs through the towers of ``configs/warm_start.py``, rotated as by training.

    `features` is the folder of a feature cache; what it lacks is computed.
    """
    config = load_config("configs/warm_start.py", {"data.feature_cache": features})
    run = build_run(config, workdir)
    state, _ = run.init_state(load_towers(run.model, run.config.model))
    inputs = run.inputs(state.params, state.model_state)
    raw = {split: _features(source, inputs) for split, source in run.sources.items()}
    train = raw["train"]
    rotate_image = rotation(train.image, components)
    rotate_text = rotation(unit(train.caption), components)
    _, group = np.unique(train.groups, return_inverse=True)
    data = TrainSet(
        image=jnp.asarray(rotate_image(train.image)),
        caption=jnp.asarray(rotate_text(unit(train.caption))),
        first=np.searchsorted(train.owner, np.arange(len(train.image))),
        count=np.bincount(train.owner),
        group=jnp.asarray(group.astype(np.int32)),
    )
    galleries = {
        split: Gallery(
            rotate_image(g.image), rotate_text(unit(g.caption)), g.groups, g.captions, g.owner
        )
        for split, g in raw.items()
        if split != "train"
    }
    return Pairs(data, galleries)


def _features(source: Source, inputs: TowerInputs) -> Gallery:
    examples = [source.metadata(index) for index in range(len(source))]
    views = [inputs.image.view(inputs.image.open(source, i)) for i in range(len(source))]
    captions = [text for example in examples for text in example.captions]
    return Gallery(
        np.stack(views),
        inputs.text(captions)[0],
        np.array([example.group for example in examples]),
        np.array(captions),
        np.repeat(np.arange(len(examples)), [len(example.captions) for example in examples]),
    )


class MethodRuns:
    """All runs of one method; compiled when the first is needed, kept when they are done."""

    def __init__(self, name: str, setting: Setting, batch: int, pairs: Pairs, kept: Path) -> None:
        self.name, self.setting, self.pairs, self.kept = name, setting, pairs, kept
        self.trainer = Trainer(setting, METHODS[name], batch, Task(pairs.train, {}))
        self._train: Any = None

    def scores(self, rate: float, seed: int) -> dict[str, np.ndarray]:
        """T of all images with all captions, float32 ``[N, M]`` for each split."""
        path = self.kept / f"{self.name}-{self.trainer.batch}-{rate:.6g}-{seed}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._train is None:
                self._train = self.trainer.compile()
            params, seconds = self._train(seed, rate)
            found: dict[str, Any] = {"seconds": np.array(seconds)}
            for split, gallery in self.pairs.galleries.items():
                found[split] = self._matrix(params, gallery)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **found)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def _matrix(self, params: Any, gallery: Gallery) -> np.ndarray:
        apply = partial(self.trainer.module.apply, {"params": params})
        images = apply(gallery.image, method="project_image")
        texts = apply(gallery.caption, method="project_text")
        return np.asarray(apply(images, texts, method="matrix"), np.float32)
