"""What other projects' evaluations give: ``python -m benchmarks.classification_references``.

Runs in an environment with torch, scikit-learn and clip-benchmark (``pip install --no-deps
clip-benchmark``), and with a clone of github.com/kdexd/virtex:

    git clone https://github.com/kdexd/virtex
    python -m benchmarks.classification_references virtex

Writes ``tests/data/classification.npz``, which ``tests/test_classification.py`` compares with ours.
Inputs come from `cases`, so that the file holds outputs only.
"""

import argparse
import ast
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from clip_benchmark.metrics import zeroshot_classification
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from benchmarks import classification_cases as cases

# NumPy 2.4 no longer makes a number of an array of one, as clip-benchmark 1.6.2 asks of it.
zeroshot_classification.float = lambda value: np.asarray(value).item()

OUT = Path(__file__).parent.parent / "tests" / "data" / "classification.npz"


def definitions(path: Path, names: tuple[str, ...], **known: Any) -> dict[str, Any]:
    """Runs the functions and classes of a file that are called so, and nothing else of it."""
    tree = ast.parse(path.read_text())
    kept = [node for node in tree.body if getattr(node, "name", None) in names]
    space: dict[str, Any] = dict(known)
    exec(compile(ast.Module(kept, []), str(path), "exec"), space)
    return space


def zero_shot() -> dict[str, Any]:
    """clip-benchmark on `cases.zero_shot`."""
    case = cases.zero_shot()
    texts = {text: torch.from_numpy(row) for text, row in case.texts.items()}
    model = SimpleNamespace(
        encode_text=lambda rows: torch.stack([texts[text] for text in rows.items]),
        encode_image=lambda images: images,
    )

    class Tokens:
        def __init__(self, items: list[str]) -> None:
            self.items = items

        def to(self, device: str) -> "Tokens":
            del device
            return self

    images, labels = torch.from_numpy(case.images), torch.from_numpy(case.labels)

    class Loader(list[Any]):
        dataset = SimpleNamespace(classes=case.names)

    found = zeroshot_classification.evaluate(
        model,
        Loader([(images[:50], labels[:50]), (images[50:], labels[50:])]),
        Tokens,
        case.names,
        [template.replace("{}", "{c}") for template in case.templates],
        "cpu",
        amp=False,
    )
    return {name: np.float64(found[name]) for name in ("acc1", "acc5", "mean_per_class_recall")}


def svm(virtex: Path) -> dict[str, Any]:
    """VirTex's function on each class of `cases.svm`."""
    logger = SimpleNamespace(info=lambda *_: None)
    function = definitions(
        virtex / "scripts" / "clf_voc07.py",
        ("train_test_single_svm",),
        np=np,
        LinearSVC=LinearSVC,
        cross_val_score=cross_val_score,
        average_precision_score=average_precision_score,
        logger=logger,
    )["train_test_single_svm"]
    case = cases.svm()
    found = [
        function((case.train, case.known[:, c], case.test, case.truth[:, c], str(c)))
        for c in range(case.known.shape[1])
    ]
    return {"voc_average_precision": np.array(found)}


def sgd(virtex: Path) -> dict[str, Any]:
    """torch's SGD with VirTex's schedule on `cases.probe`, from our initial weights and order."""
    schedule = definitions(
        virtex / "virtex" / "optim" / "lr_scheduler.py",
        ("LinearWarmupCosineAnnealingLR",),
        LambdaLR=torch.optim.lr_scheduler.LambdaLR,
        Optimizer=torch.optim.Optimizer,
        math=math,
        List=list,
    )["LinearWarmupCosineAnnealingLR"]
    case = cases.probe()
    x, y = torch.from_numpy(case.train), torch.from_numpy(case.codes)
    model = torch.nn.Linear(x.shape[1], case.classes)
    start = 0.01 * np.random.default_rng(case.seed).standard_normal((x.shape[1], case.classes))
    model.weight.data = torch.from_numpy(start.T.astype(np.float32).copy())
    model.bias.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.0)
    steps = -(-len(x) // case.batch_size) * case.epochs
    scheduler = schedule(optimizer, total_steps=steps, warmup_steps=0)
    for epoch in range(case.epochs):
        order = np.random.default_rng((case.seed, epoch)).permutation(len(x))
        for first in range(0, len(x), case.batch_size):
            rows = torch.from_numpy(order[first : first + case.batch_size])
            optimizer.zero_grad()
            torch.nn.CrossEntropyLoss()(model(x[rows]), y[rows]).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        return {"probe_logits": model(torch.from_numpy(case.test)).numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("virtex", type=Path, help="a clone of github.com/kdexd/virtex")
    virtex = parser.parse_args().virtex
    found: dict[str, Any] = zero_shot() | svm(virtex) | sgd(virtex)
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    main()
