"""Features of labelled pictures, for evaluators that compare or classify them.

A class is ImageNet's ``wnid`` where a picture has one, for its names are not unique, else its
``label``.  Pictures of several labels, or of none, are left out; `voc_svm` reads those itself.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from clip_lite_jax.data.inputs import Pixels
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source
from clip_lite_jax.errors import ConfigError, DataError
from clip_lite_jax.evaluators.encoding import encode_images, encode_usable
from clip_lite_jax.evaluators.tasks import ALL, TaskData
from clip_lite_jax.train_step import EncodeFns

Features = Literal["features", "embedding"]
"""The image encoder's, pooled, before the critic; or after the critic's projection."""

HELD_OUT = ("test", "validation")
"""Splits to measure on: the first that there is."""


@dataclass(frozen=True)
class LabelledSet:
    """Pictures of one class each."""

    source: Source
    places: np.ndarray
    """int64 ``[N]`` in the source."""
    codes: np.ndarray
    """int64 ``[N]``: places in a list of classes."""
    left_out: int = 0
    """Pictures of the source without exactly one label."""
    drawn: bool = False
    """Whether these are some of more, drawn by a seed."""

    def __len__(self) -> int:
        return len(self.places)

    def take(self, some: np.ndarray) -> "LabelledSet":
        return replace(self, places=self.places[some], codes=self.codes[some])


@dataclass(frozen=True)
class EncodedSet:
    """Features float32 ``[N, F]`` of pictures, and the codes int64 ``[N]`` of their classes."""

    features: np.ndarray
    codes: np.ndarray


def class_of(example: Example) -> str:
    """The class of a picture, or nothing where it has none, or several."""
    return example.attributes.get("wnid") or example.attributes.get("label", "")


def held_out_split(data: TaskData, named: str = "") -> str:
    """The split to measure on: as named, else ``test``, else ``validation``."""
    if named:
        return named
    return next((name for name in HELD_OUT if len(data.splits.get(name, ()))), HELD_OUT[0])


def check_unseen(data: TaskData, measured: str, **used: str) -> None:
    """`used` are the splits that a classifier learns or chooses from, by the option that says so.

    Raises:
      ConfigError: one of them is measured on, or has pictures in common with what is.
    """
    learned = set().union(*(_parts(data, name) for name in used.values()))
    free = [name for name, source in data.splits.items() if len(source) and name not in learned]
    for option, name in used.items():
        if common := _parts(data, measured) & _parts(data, name):
            raise ConfigError(
                f"split={measured!r} would measure on {' and '.join(sorted(common))}, which "
                f"{option}={name!r} learns from: set {option} to another split"
                + (f", or split to {' or '.join(free)}" if free else "")
            )


def _parts(data: TaskData, split: str) -> set[str]:
    """The splits that a name means."""
    everything = split == ALL and ALL not in data.splits
    return {name for name, source in data.splits.items() if len(source)} if everything else {split}


def classes_in(data: TaskData, splits: Iterable[str]) -> tuple[str, ...]:
    """The classes of some splits, in the order of their names.

    Raises:
      DataError: no picture of these splits has a label.
    """
    found: set[str] = set()
    for split in splits:
        source = data.split(split)
        found |= {class_of(source.metadata(index)) for index in range(len(source))}
    if not found - {""}:
        raise DataError(
            f"split {' and '.join(map(repr, splits))}: no picture has exactly one label; a folder "
            "for each class gives them (data.format='image_folder')"
        )
    return tuple(sorted(found - {""}))


def labelled(
    data: TaskData, split: str, classes: Sequence[str], maximum: int = 0, seed: int = 0
) -> LabelledSet:
    """The pictures of a split that have one of `classes`; at most `maximum`, drawn by `seed`.

    Raises:
      DataError: no such split, no such picture in it, or a class that is not among `classes`.
    """
    source = data.split(split)
    code_of = {name: code for code, name in enumerate(classes)}
    places, codes = [], []
    unknown: set[str] = set()
    for place in range(len(source)):
        name = class_of(source.metadata(place))
        if name in code_of:
            places.append(place)
            codes.append(code_of[name])
        elif name:
            unknown.add(name)
    if unknown:
        some = ", ".join(sorted(unknown)[:5])
        raise DataError(f"split {split!r}: {len(unknown)} classes are not listed: {some}")
    if not places:
        raise DataError(f"split {split!r}: no picture has exactly one label")
    found = LabelledSet(source, np.array(places), np.array(codes), len(source) - len(places))
    if maximum and maximum < len(found):
        chosen = np.random.default_rng(seed).permutation(len(found))[:maximum]
        return replace(found.take(np.sort(chosen)), drawn=True)
    return found


def drawn_with(seed: int, *sets: LabelledSet, also: bool = False) -> str:
    """For a protocol: the seed where pictures are drawn, or something `also` is."""
    return f"; drawn with seed {seed}" if also or any(some.drawn for some in sets) else ""


def unlearnable(train: LabelledSet, test: LabelledSet) -> str:
    """For a protocol: how many pictures of `test` have a class without pictures in `train`.

    Raises:
      DataError: all of them.
    """
    count = int(np.sum(~np.isin(test.codes, train.codes)))
    if count == len(test):
        raise DataError(
            "no class to measure on has training pictures; a folder for each class is split by "
            "classes unless they are in folders train and val (train/CLASS/x.jpg, val/CLASS/y.jpg)"
        )
    return f"; {count} pictures of classes without training pictures are wrong" if count else ""


def encoded(
    fns: EncodeFns, data: TaskData, pictures: LabelledSet, kind: Features = "features"
) -> EncodedSet:
    """Encodes pictures; those that cannot be used are listed in `data.bad` and left out.

    Raises:
      DataError: none can be used.
    """
    features, kept = features_of(fns, data, pictures.source, pictures.places)
    if not len(kept):
        raise DataError(f"none of {len(pictures)} pictures can be used; see the list of bad ones")
    if kind == "embedding":
        features = encode_images(fns, features, data.batch_size).astype(np.float32)
    return EncodedSet(features, pictures.codes[kept])


_KNOWN: WeakKeyDictionary[EncodeFns, dict[Any, Any]] = WeakKeyDictionary()


def features_of(
    fns: EncodeFns, data: TaskData, source: Source, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 ``[N, F]`` of the view of evaluation, and which of `places` they are of.

    They are kept for as long as `fns` is, so that several tasks on one source encode once.
    """
    known = _KNOWN.setdefault(fns, {})
    key = (id(source), id(data.inputs.image), places.tobytes())
    if key not in known:
        view = data.inputs.image.view
        found = _encode(fns, data, source, places, lambda opened, _: view(opened))
        known[key] = (source, data.inputs.image, found)  # what is kept keeps its id
    result: tuple[np.ndarray, np.ndarray] = known[key][2]
    return result


def random_view_features(
    fns: EncodeFns, data: TaskData, source: Source, places: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `features_of`, of a random crop of 8 to 100 % of the area, mirrored half of the time.

    Raises:
      ConfigError: the image tower reads features kept on disk, which have no other views.
    """
    inputs = data.inputs.image
    if not isinstance(inputs, Pixels):
        raise ConfigError("views: features that are kept on disk have one view; set views=0")
    augment = replace(inputs.config.augment, crop_scale=(0.08, 1.0), flip=0.5)
    random = Pixels(replace(inputs.config, augment=augment)).random_view

    def view(opened: Any, place: int) -> np.ndarray:
        return random(opened, np.random.default_rng((seed, place)))[0]

    return _encode(fns, data, source, places, view)


def _encode(
    fns: EncodeFns,
    data: TaskData,
    source: Source,
    places: np.ndarray,
    view: Callable[[Any, int], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    kept, features = encode_usable(
        fns.image_features,
        data.inputs.image,
        source,
        places.tolist(),
        data.batch_size,
        data.bad,
        view,
    )
    return features, kept
