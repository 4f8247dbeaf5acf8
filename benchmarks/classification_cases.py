"""Inputs that `classification_references` gives to other projects, and the tests to ours."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ZeroShotCase:
    names: list[str]
    templates: list[str]
    texts: dict[str, np.ndarray]
    """An embedding for each prompt, of any length."""
    images: np.ndarray
    labels: np.ndarray


def zero_shot(classes: int = 12, images: int = 97, width: int = 8) -> ZeroShotCase:
    """Noisy pictures of unbalanced classes, a class without any among them."""
    rng = np.random.default_rng(0)
    names = [f"thing {number}" for number in range(classes)]
    templates = ["a photo of a {}.", "art of the {}.", "itap of a {}."]
    centres = rng.normal(size=(classes, width))
    texts = {
        template.replace("{}", name): (
            rng.uniform(0.5, 3) * (centre + 0.7 * rng.normal(size=width))
        ).astype(np.float32)
        for name, centre in zip(names, centres, strict=True)
        for template in templates
    }
    labels = rng.choice(classes - 1, size=images, p=rng.dirichlet(np.ones(classes - 1) * 3))
    found = centres[labels] + 1.5 * rng.normal(size=(images, width))
    return ZeroShotCase(names, templates, texts, found.astype(np.float32), labels)


@dataclass(frozen=True)
class SVMCase:
    train: np.ndarray
    known: np.ndarray
    """int ``[N, C]``: 1 present, 0 absent, -1 difficult."""
    test: np.ndarray
    truth: np.ndarray


def svm(classes: int = 4, train: int = 90, test: int = 70, width: int = 128) -> SVMCase:
    rng = np.random.default_rng(1)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        marks = rng.choice([0, 0, 0, 1, 1, -1], size=(count, classes))
        found = rng.normal(size=(count, width)) + (marks != 0) @ directions
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        return unit.astype(np.float32), marks.astype(np.int32)

    directions = 1.2 * rng.normal(size=(classes, width)) / 4
    return SVMCase(*draw(train), *draw(test))


@dataclass(frozen=True)
class ProbeCase:
    train: np.ndarray
    codes: np.ndarray
    test: np.ndarray
    classes: int = 5
    batch_size: int = 16
    epochs: int = 7
    seed: int = 3


def probe(train: int = 53, width: int = 6) -> ProbeCase:
    """A number that no batch divides."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 5, train)
    features = rng.normal(size=(train, width)) + codes[:, None] * rng.normal(size=width)
    return ProbeCase(
        features.astype(np.float32), codes, rng.normal(size=(9, width)).astype(np.float32)
    )
