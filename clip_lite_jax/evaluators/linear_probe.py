"""Linear probe: how well a linear classifier does on frozen features."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pydantic
from scipy import stats
from sklearn.model_selection import train_test_split

from clip_lite_jax.config.types import (
    STRICT,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from clip_lite_jax.errors import DataError
from clip_lite_jax.evaluators import classification
from clip_lite_jax.evaluators.classification import Predictions
from clip_lite_jax.evaluators.encoding import encode_images
from clip_lite_jax.evaluators.labelled_features import (
    EncodedSet,
    Features,
    check_unseen,
    classes_in,
    drawn_with,
    encoded,
    held_out_split,
    labelled,
    random_view_features,
    unlearnable,
)
from clip_lite_jax.evaluators.linear_classifiers import Classifier, fit_lbfgs, fit_sgd, sweep
from clip_lite_jax.evaluators.prompts import shown
from clip_lite_jax.evaluators.tasks import Outcome, TaskData, TaskEvaluator
from clip_lite_jax.train_step import EncodeFns

ROWS = 4096
"""Pictures whose scores are computed at once."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class LinearProbeOptions:
    method: Literal["sgd", "lbfgs"] = "sgd"
    """``sgd`` as VirTex and CLIP-Lite; ``lbfgs`` as CLIP, which searches C on validation data."""
    train: str = "train"
    split: str = ""
    """To measure on; by default ``test``, or ``validation`` where there is none."""
    features: Features = "features"
    learning_rate: PositiveFloat = 0.3
    momentum: Fraction = 0.9
    batch_size: PositiveInt = 256
    epochs: PositiveInt = 100
    views: NonNegativeInt = 0
    """Random crops of a picture, of which SGD draws one at every epoch; 0 trains on the view of
    evaluation.  VirTex makes a new crop at every epoch."""
    c: PositiveFloat | None = None
    """Of L-BFGS; by default it is searched."""
    max_iter: PositiveInt = 1000
    validation: str = ""
    """The split to search C on; by default ``validation`` unless that is measured on, else
    `held_out` of the training pictures.  The final classifier learns from both."""
    held_out: Fraction = 0.1
    shots: tuple[PositiveInt, ...] = ()
    """Also train on so many pictures of each class, by L-BFGS with `few_shot_c`."""
    few_shot_seeds: PositiveInt = 5
    few_shot_c: PositiveFloat = 0.316
    """As CLIP's README; nothing is searched, for few shots leave no validation data."""
    max_train: NonNegativeInt = 0
    max_images: NonNegativeInt = 0
    seed: NonNegativeInt = 0


class LinearProbe(TaskEvaluator):
    """Sources: VirTex (arXiv 2006.06666), section 4.1; CLIP (arXiv 2103.00020), appendix A.3."""

    def __init__(self, data: TaskData, options: LinearProbeOptions) -> None:
        self.data, self.options = data, options
        self.split = held_out_split(data, options.split)
        splits = [options.train, self.split]
        self.validation = ""
        if options.method == "lbfgs" and options.c is None:
            there = len(data.splits.get("validation", ())) and "validation" not in splits
            self.validation = options.validation or ("validation" if there else "")
            splits += [self.validation] if self.validation else []
        used = {"validation": self.validation} if self.validation else {}
        check_unseen(data, self.split, train=options.train, **used)
        self.classes = classes_in(data, splits)
        self.train = labelled(data, options.train, self.classes, options.max_train, options.seed)
        self.test = labelled(data, self.split, self.classes, options.max_images, options.seed)
        for shots in options.shots:  # before anything is encoded
            check_shots(self.train.codes, shots)
        self.protocol = (
            f"{len(self.test)} pictures of {self.split!r}, trained on {len(self.train)} of "
            f"{options.train!r}, {len(self.classes)} classes; {options.features}; {self._method()}"
            f"{self._few_shots()}; equal scores count as wrong"
            + drawn_with(options.seed, self.train, self.test, also=self._draws())
            + unlearnable(self.train, self.test)
        )

    def _draws(self) -> bool:
        """Whether the seed decides more than the pictures: order, first weights, parts, shots."""
        options = self.options
        held_out = options.c is None and not self.validation
        return options.method == "sgd" or held_out or bool(options.shots)

    def _few_shots(self) -> str:
        options = self.options
        if not options.shots:
            return ""
        shots = ", ".join(map(str, options.shots))
        return (
            f"; {shots} shots: mean of {options.few_shot_seeds} draws, L-BFGS with "
            f"C={options.few_shot_c:g}"
        )

    def _method(self) -> str:
        options = self.options
        if options.method == "sgd":
            crops = (
                f"{options.views} random crops and flips a picture"
                if options.views
                else "no augmentation, where VirTex crops and flips at random"
            )
            return (
                f"SGD, learning rate {options.learning_rate} with cosine decay, momentum "
                f"{options.momentum}, batch {options.batch_size}, {options.epochs} epochs; {crops}"
            )
        if options.c is not None:
            return f"L-BFGS of at most {options.max_iter} iterations, C={options.c:g}"
        on = repr(self.validation) if self.validation else f"{options.held_out:.0%} of the training"
        return (
            f"L-BFGS of at most {options.max_iter} iterations, C from 1e-6 to 1e6 chosen on {on} "
            "pictures, then trained on these, too"
        )

    def outcome(self, fns: EncodeFns) -> Outcome:
        train = encoded(fns, self.data, self.train, self.options.features)
        test = encoded(fns, self.data, self.test, self.options.features)
        more: dict[str, float] = {}
        tables: dict[str, list[dict[str, Any]]] = {}
        if self.options.method == "sgd":
            classify = self._sgd(fns, train)
        else:
            classify, more, tables = self._lbfgs(fns, train)
        found = _predict(classify, test)
        result = classification.outcome(found, test.codes, shown(self.classes))
        metrics = result.metrics | more | self._few_shot(train, test)
        metrics["train_images"] = float(len(train.codes))
        metrics["left_out"] = float(self.train.left_out + self.test.left_out)
        return Outcome(metrics, result.tables | tables)

    def _sgd(self, fns: EncodeFns, train: EncodedSet) -> Classifier:
        options = self.options
        if options.views:
            train = self._random_views(fns)
        return fit_sgd(
            train.features,
            train.codes,
            len(self.classes),
            learning_rate=options.learning_rate,
            momentum=options.momentum,
            batch_size=options.batch_size,
            epochs=options.epochs,
            seed=options.seed,
        )

    def _random_views(self, fns: EncodeFns) -> EncodedSet:
        """Features ``[N, V, F]``."""
        source, places = self.train.source, self.train.places
        parts = []
        for number in range(self.options.views):
            seed = self.options.seed * 1000 + number
            found, kept = random_view_features(fns, self.data, source, places, seed)
            if self.options.features == "embedding":
                found = encode_images(fns, found, self.data.batch_size).astype(np.float32)
            parts.append(found)
        return EncodedSet(np.stack(parts, axis=1), self.train.codes[kept])

    def _lbfgs(self, fns: EncodeFns, train: EncodedSet) -> tuple[Classifier, dict, dict]:
        options = self.options
        unfinished = 0

        def fit(some: EncodedSet, c: float) -> Classifier:
            nonlocal unfinished
            classify, converged = fit_lbfgs(
                some.features, some.codes, len(self.classes), c, options.max_iter
            )
            unfinished += not converged
            return classify

        table = []
        if options.c is not None:
            c, whole = options.c, train
        else:
            learned, held = self._validation(fns, train)
            c, tried = sweep(lambda c: _accuracy(fit(learned, c), held))
            table = [{"c": value, "validation_top1": top1} for value, top1 in tried.items()]
            whole = EncodedSet(
                np.concatenate([learned.features, held.features]),
                np.concatenate([learned.codes, held.codes]),
            )
        classify = fit(whole, c)
        return classify, {"c": c, "fits_not_converged": float(unfinished)}, {"c": table}

    def _validation(self, fns: EncodeFns, train: EncodedSet) -> tuple[EncodedSet, EncodedSet]:
        if self.validation:
            held = labelled(self.data, self.validation, self.classes)
            return train, encoded(fns, self.data, held, self.options.features)
        counts = np.bincount(train.codes)
        alone = counts[counts > 0].min() < 2  # such a class cannot be on both sides
        number = round(self.options.held_out * len(train.codes))
        if not 0 < number < len(train.codes):
            raise DataError(
                f"{len(train.codes)} training pictures and held_out={self.options.held_out} leave "
                "none to choose C on, or none to train on; set c, or validation to a split"
            )
        fits = number >= len(counts[counts > 0])
        learned, held = train_test_split(
            np.arange(len(train.codes)),
            test_size=number,
            random_state=self.options.seed,
            stratify=None if alone or not fits else train.codes,
        )
        return _some(train, learned), _some(train, held)

    def _few_shot(self, train: EncodedSet, test: EncodedSet) -> dict[str, float]:
        found: dict[str, float] = {}
        for shots in self.options.shots:
            top1 = []
            for number in range(self.options.few_shot_seeds):
                some = _some(train, draw_shots(train.codes, shots, self.options.seed + number))
                classify, _ = fit_lbfgs(
                    some.features,
                    some.codes,
                    len(self.classes),
                    self.options.few_shot_c,
                    self.options.max_iter,
                )
                top1.append(_accuracy(classify, test))
            found |= mean_of_seeds(f"shots_{shots}_top1", top1)
        return found


def check_shots(codes: np.ndarray, shots: int) -> None:
    """Raises `DataError` where a class of the training pictures ``[N]`` has fewer than `shots`."""
    counts = np.bincount(codes)
    fewest = int(counts[counts > 0].min())
    if fewest < shots:
        raise DataError(
            f"shots={shots}: a class has only {fewest} training pictures; set shots to {fewest} or "
            "fewer"
        )


def draw_shots(codes: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Places of `shots` examples of each class that occurs.

    Raises:
      DataError: a class has fewer.
    """
    check_shots(codes, shots)
    rng = np.random.default_rng((seed, shots))
    chosen = []
    for code in np.unique(codes):
        own = np.flatnonzero(codes == code)
        chosen.append(rng.permutation(own)[:shots])
    return np.sort(np.concatenate(chosen))


def mean_of_seeds(name: str, values: list[float]) -> dict[str, float]:
    """The mean of independent runs, with Student's interval of 95 %; NaN of one run."""
    mean = float(np.mean(values))
    spread = float("nan")
    if len(values) > 1:
        quantile = float(stats.t.ppf(0.975, len(values) - 1))
        spread = quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return {name: mean, f"{name}_low": mean - spread, f"{name}_high": mean + spread}


def _predict(classify: Classifier, test: EncodedSet) -> Predictions:
    return Predictions.joined(
        [
            classification.predictions(classify(test.features[some]), test.codes[some])
            for start in range(0, len(test.codes), ROWS)
            for some in [slice(start, start + ROWS)]
        ]
    )


def _accuracy(classify: Classifier, test: EncodedSet) -> float:
    return float(np.mean(_predict(classify, test).ranks == 1))


def _some(found: EncodedSet, rows: np.ndarray) -> EncodedSet:
    return replace(found, features=found.features[rows], codes=found.codes[rows])
