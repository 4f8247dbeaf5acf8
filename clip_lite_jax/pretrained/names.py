"""Tables of names: where each weight of a tower stands in another project's file, and how it lies.

Reading and writing follow the same table, so that what is written reads back bit for bit.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_lite_jax.errors import CheckpointError

Weights = Mapping[str, np.ndarray]
"""Tensors by the name that their file gives them."""


@dataclass(frozen=True)
class Layout:
    """The order of axes in the other file (`read` turns it into ours, `write` back)."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(np.transpose, np.transpose)
"""``[out, in]`` there, ``[in, out]`` here."""
CONVOLUTION = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""``[out, in, height, width]`` there, ``[height, width, in, out]`` here."""


@dataclass(frozen=True)
class Link:
    """One weight."""

    ours: str  # collection and path within the tower: "params/layer1_0/conv1/kernel"
    theirs: str
    layout: Layout = SAME
    resize: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None
    """Makes our shape of another one, where that has a meaning: position embeddings."""


@dataclass(frozen=True)
class Naming:
    """The names one project gives to the weights of one tower."""

    name: str
    links: tuple[Link, ...]
    unused: str = r"$^"
    """Regular expression of what such files hold beside the tower: a classifier, counters."""


def norm_links(ours: str, theirs: str, running: bool = False) -> list[Link]:
    """Of a LayerNorm, or with `running` of a BatchNorm: scale, bias and running statistics."""
    links = [
        Link(f"params/{ours}/scale", f"{theirs}.weight"),
        Link(f"params/{ours}/bias", f"{theirs}.bias"),
    ]
    if running:
        links += [
            Link(f"batch_stats/{ours}/mean", f"{theirs}.running_mean"),
            Link(f"batch_stats/{ours}/var", f"{theirs}.running_var"),
        ]
    return links


def linear_links(ours: str, theirs: str, layout: Layout = LINEAR, bias: bool = True) -> list[Link]:
    """Of a dense layer, or with `layout` `CONVOLUTION` of a convolution."""
    links = [Link(f"params/{ours}/kernel", f"{theirs}.weight", layout)]
    return links + [Link(f"params/{ours}/bias", f"{theirs}.bias")] * bias


def read(namings: Iterable[Naming], weights: Weights, like: Any, source: str) -> Any:
    """The variables of a tower, from the naming that fits the file best.

    Names may have a common prefix in front of them (``module.``, ``visual.``).

    Args:
      like: variables, or their shapes, ``{"params": ..., "batch_stats": ...}``.
      source: the file, for messages.

    Raises:
      CheckpointError: a tensor is missing, has another shape, or has no place in the tower.
    """
    naming, prefix = best(namings, weights, source)
    present = _present(naming, prefix, weights)
    wanted = flatten_dict(like, sep="/")
    missing = [link.theirs for link in naming.links if link.theirs not in present]
    if missing:
        raise CheckpointError(
            f"{source} looks like {naming.name} but lacks {_some(missing, prefix)}: the file is "
            "damaged, or of another architecture than model.*.name and options say"
        )
    unused = re.compile(naming.unused)
    rest = {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
    surplus = sorted(n for n in rest - present if not unused.search(n))
    if surplus:
        raise CheckpointError(
            f"{source} has weights that this encoder has no place for: {_some(surplus, prefix)}; "
            "it is a larger or another architecture than model.*.name and options say"
        )
    found = {link.ours: _read(link, prefix, weights, wanted, source) for link in naming.links}
    found = _stacked(found, wanted)
    theirs = {link.ours: prefix + link.theirs for link in naming.links}
    for path, array in found.items():
        shape = wanted[path].shape if path in wanted else None
        if array.shape != shape:
            raise CheckpointError(
                f"{source}: {theirs.get(path, path)} is {array.shape} in our order of axes, and "
                f"{path} of this encoder is {shape}: another size than model.*.options say"
            )
    if lacking := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{source}: {naming.name} has no name for {_some(lacking)}")
    return unflatten_dict(
        {path: np.asarray(array, wanted[path].dtype) for path, array in found.items()}, sep="/"
    )


def best(namings: Iterable[Naming], weights: Weights, source: str) -> tuple[Naming, str]:
    """The naming under which most of a file's tensors are known, and what stands before them.

    Raises:
      CheckpointError: none knows any.
    """
    candidates = [(naming, _prefix(naming, weights)) for naming in namings]
    if not candidates:
        raise CheckpointError(
            f"{source} cannot be read: no known project has an encoder with these options"
        )
    naming, prefix = max(candidates, key=lambda c: len(_present(c[0], c[1], weights)))
    if not _present(naming, prefix, weights):
        known = ", ".join(naming.name for naming, _ in candidates)
        some = ", ".join(sorted(weights)[:4])
        raise CheckpointError(
            f"{source} holds no weight of this encoder under the names of {known}; it has "
            f"{some}, ...: is it another architecture, or the other tower?"
        )
    return naming, prefix


def _read(
    link: Link, prefix: str, weights: Weights, wanted: Mapping[str, Any], source: str
) -> np.ndarray:
    """One weight in our order of axes, and in our shape where its link can change that."""
    theirs = weights[prefix + link.theirs]
    try:
        array = link.layout.read(theirs)
        shape = wanted[link.ours].shape if link.ours in wanted else array.shape
        if link.resize is not None and array.shape != shape:
            array = link.resize(array, shape)
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            f"{source}: {prefix}{link.theirs} of shape {theirs.shape} cannot be {link.ours}: the "
            "file is of another architecture than model.*.name and options say"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {prefix}{link.theirs}: {error}") from error
    return array


def write(naming: Naming, variables: Any) -> dict[str, np.ndarray]:
    """The weights of a tower under other names, contiguous."""
    flat = _unstacked(flatten_dict(variables, sep="/"))
    return {
        link.theirs: np.ascontiguousarray(link.layout.write(np.asarray(flat[link.ours])))
        for link in naming.links
    }


def _prefix(naming: Naming, weights: Weights) -> str:
    """What stands before the names in this file: the prefix with which most of them are there."""
    ends = [link.theirs for link in naming.links]
    found = {
        name[: -len(end)] for end in (ends[0], ends[-1]) for name in weights if name.endswith(end)
    }
    prefixes = sorted(found | {""}, key=len)
    return max(prefixes, key=lambda prefix: len(_present(naming, prefix, weights)))


def _present(naming: Naming, prefix: str, weights: Weights) -> set[str]:
    return {link.theirs for link in naming.links if prefix + link.theirs in weights}


_NUMBERED = re.compile(r"/blocks_(\d+)/")


def _stacked(found: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Layers ``blocks_0``, ``blocks_1``, ... as one ``blocks``, where the tower scans over them."""
    if not any("/blocks/" in path for path in wanted):
        return found
    layers: dict[str, dict[int, np.ndarray]] = {}
    plain = {}
    for path, array in found.items():
        if number := _NUMBERED.search(path):
            layers.setdefault(_NUMBERED.sub("/blocks/", path), {})[int(number[1])] = array
        else:
            plain[path] = array
    return plain | {path: np.stack([of[i] for i in range(len(of))]) for path, of in layers.items()}


def _unstacked(flat: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for path, array in flat.items():
        if "/blocks/" in path:
            for number, layer in enumerate(array):
                result[path.replace("/blocks/", f"/blocks_{number}/")] = layer
        else:
            result[path] = array
    return result


def _some(names: list[str], prefix: str = "") -> str:
    listed = ", ".join(prefix + name for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")
