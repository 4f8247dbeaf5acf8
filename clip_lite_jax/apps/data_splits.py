"""``clip-lite data splits``: may a model trained on one source be judged by another?"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.leaks import Leak, keys_of, leak_between
from clip_lite_jax.data.pairs import FileImages, Pairs, RemoteImages
from clip_lite_jax.data.sources import Source, build_sources
from clip_lite_jax.errors import DataError
from clip_lite_jax.files import write_atomic


def compare(
    train: DataConfig, test: DataConfig
) -> tuple[dict[str, Source], dict[str, Source], list[Leak]]:
    """Both sources, and what the training split of the first shares with each split of the second.

    The training split of the second does not count: nothing is measured on it.
    """
    ours, theirs = (build_sources(data, BadExamples(), training=False) for data in (train, test))
    if "train" not in ours:
        raise DataError(f"{train.source} holds nothing to train on: {', '.join(ours)}")
    judged = {split: source for split, source in sorted(theirs.items()) if split != "train"}
    if not judged:
        raise DataError(f"{test.source} holds nothing but a training split")
    found = [
        leak_between(split, source, "train", ours["train"]) for split, source in judged.items()
    ]
    return ours, theirs, [leak for leak in found if leak is not None]


def write_clean(path: Path, ours: Mapping[str, Source], theirs: Mapping[str, Source]) -> str:
    """Writes the training pairs without what leaks as JSON lines; says how to train on them."""
    train = ours["train"]
    if not (isinstance(train, Pairs) and isinstance(train.images, (FileImages, RemoteImages))):
        raise DataError("only sources whose images are files can be written as a table of them")
    judged = [source for split, source in theirs.items() if split != "train"]
    leaking = set().union(*(keys_of(source).to_pylist() for source in judged)) - {None}
    own = keys_of(train).to_pylist()
    kept = [index for index in range(len(train)) if own[index] not in leaking]
    lines = []
    for index in kept:
        example = train.metadata(index)
        place = train.images.paths[train.row(index)].as_py()
        lines.append(json.dumps({"image": place, "caption": list(example.captions)}))
    write_atomic(path, "".join(f"{line}\n" for line in lines))
    return (
        f"{len(kept):,} of {len(train):,} written; train with --config.data.source={path} "
        f"--config.data.image_folder={train.images.root}"
    )


def describe(leaks: Sequence[Leak], ours: Mapping[str, Source]) -> str:
    if not leaks:
        return (
            f"no picture in common with the {len(ours['train']):,} for training, by their paths "
            "and ids; contents are compared by `clip-lite data check`"
        )
    return "\n".join(map(str, leaks))
