"""Retrieval by a linear map between frozen features: ``python -m benchmarks.frozen_linear``.

Ridge regression from standardised image features to text features of unit length, fitted on the
training pairs.  Its penalty is chosen on the validation galleries; each test gallery is then ranked
once.  Far above chance means that the features are what they should be.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.frozen_features import FEATURES_FILE, Features, load_features
from benchmarks.frozen_pairs import GALLERIES
from benchmarks.pages import table
from clip_lite_jax.evaluators.retrieval import retrieval_metrics

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Relative to the mean variance of a standardised image feature."""


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of ``[N, D]`` at unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def standardised(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Image ``[N, 1280]`` and text features ``[N, 384]`` by the statistics of training."""
    train = features.rows("train")
    mean, deviation = features.image[train].mean(0), features.image[train].std(0)
    text = unit(features.joined)
    return (features.image - mean) / (deviation + 1e-6), text - text[train].mean(0)


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """The map ``[F, D]`` that minimises ``|x w - y|² / N + penalty |w|²``."""
    gram = x.T @ x / len(x) + penalty * np.eye(x.shape[1], dtype=x.dtype)
    return np.linalg.solve(gram, x.T @ y / len(x))


def evaluate(
    features: Features, image: np.ndarray, text: np.ndarray, stage: str
) -> dict[str, dict[str, float]]:
    """Retrieval metrics of cosine similarity on every gallery of a stage, and their mean."""
    results = {}
    for gallery in GALLERIES:
        rows = features.gallery(f"{stage}/{gallery}")
        scores = unit(image[rows]) @ unit(text[rows]).T
        results[gallery] = retrieval_metrics(scores, np.arange(len(rows)))
    keys = results[GALLERIES[0]]
    results["mean"] = {key: float(np.mean([r[key] for r in results.values()])) for key in keys}
    return results


def fit(features: Features) -> tuple[float, dict[str, dict[str, dict[str, float]]]]:
    """The penalty with the best mean validation R@1, and its results by stage and gallery."""
    image, text = standardised(features)
    train = features.rows("train")
    maps = {penalty: ridge(image[train], text[train], penalty) for penalty in PENALTIES}

    def validation(penalty: float) -> float:
        mean = evaluate(features, image @ maps[penalty], text, "validation")["mean"]
        return mean["text_to_image_r1"] + mean["image_to_text_r1"]

    best = max(PENALTIES, key=validation)
    mapped = image @ maps[best]
    return best, {s: evaluate(features, mapped, text, s) for s in ("validation", "test")}


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """R@1 and R@10 of both directions with chance, a line for each stage and gallery."""
    keys = ("text_to_image_r1", "image_to_text_r1", "text_to_image_r10", "image_to_text_r10")
    columns = [*keys, "text_to_image_r1_chance", "text_to_image_r10_chance"]
    heads = [c.replace("_to_", " → ").replace("_r", " R@").replace("_", " ") for c in columns]
    lines = [["gallery", "images", *heads], ["---"] * (len(columns) + 2)]
    for stage, galleries in results.items():
        for name, metrics in galleries.items():
            cells = [f"{metrics[column]:.3f}" for column in columns]
            lines.append([f"{stage}/{name}", f"{metrics['images']:.0f}", *cells])
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", type=Path, default=FEATURES_FILE)
    penalty, results = fit(load_features(parser.parse_args().features))
    print(f"ridge, penalty {penalty} of {PENALTIES} chosen on validation\n\n{markdown(results)}")


if __name__ == "__main__":
    main()
