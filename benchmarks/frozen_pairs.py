"""Real image-caption pairs for the benchmarks on frozen features, and what of them is held out.

Two sources: the built-in emoji drawings, and the furniture renders of the Debian package
sweethome3d-furniture 1.8-1 (public domain, and CC-BY 3.0 by the creators its catalogues name).
Each of `GALLERIES` is held out twice, as ``validation/NAME`` for choices and as ``test/NAME``:

  unseen_concepts   emoji that training does not have, by artists that it has
  unseen_artist     emoji that training has, in the style of Twemoji, which it does not have
  unseen_both       the emoji of unseen_concepts in the style of Noto v1, which training lacks too
  unseen_furniture  renders whose name has a head word that no render in training has

Head words of many names ("table", "plug") mean look-alikes and stay in training.  A render with the
name of an emoji joins its group; it is for training if the emoji is, and left out if not.
"""

import hashlib
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import read_emoji
from clip_lite_jax.data.splits import split_of
from clip_lite_jax.errors import DataError

STAGES = ("validation", "test")
GALLERIES = ("unseen_concepts", "unseen_artist", "unseen_both", "unseen_furniture")
SPLITS = ("train", *(f"{stage}/{gallery}" for stage in STAGES for gallery in GALLERIES))

HELD_OUT_ARTIST = "noto-v1"
HELD_OUT_HEADS = 0.22
"""Share of the head words for validation, and again for test."""
MAX_NAMES = 4
"""A head word of more names than this stays in training."""

CATALOGUES = {
    "BlendSwap-CC-0.sh3f": "7ef093fe70cedbb160bdb532d86a84580459635e34130c16777f549eba1993dc",
    "BlendSwap-CC-BY.sh3f": "29ae78937b4d5dbe93db74067817a984fa411f017b007fd666bc40368bdb0c83",
    "KatorLegaz.sh3f": "f512443b5d3a6903497573095f971f44334b3165ab32182133051fa9487764a6",
    "Reallusion.sh3f": "dd553207876ccec6372dde7aaea6b2dcf2d631997fcdb8a9856a639e0db9aa9b",
    "Scopia.sh3f": "b4505451b1e8ab339c101c0afddfef4e1a07b95aa8c821c61ec41487afd43850",
}
"""SHA-256 of each catalogue of version 1.8-1."""

_PROPERTY = re.compile(r"(\w+)#(\d+)=(.*)")
_NO_TAGS = {"", "Blend Swap", "SCPTS", "Miscellaneous"}  # makers, and the category of no category
# "Chair | with cushion", "TV | 16:9", "Double French window | small panes"
_AFTER_HEAD = re.compile(r" (?:with|on|under|and|small)\b.*| - .*|,.*| \d.*")


def read_pairs(furniture: Path) -> list[Example]:
    """All pairs, with one of `SPLITS` as their attribute ``split``, always in the same order.

    Raises:
      DataError: the folder `furniture` lacks a catalogue or has another version of it.
    """
    renders = [render for name in CATALOGUES for render in read_catalogue(furniture / name)]
    built_in = read_emoji(DataConfig(), BadExamples())
    drawings = [source[i] for _, source in sorted(built_in.items()) for i in range(len(source))]
    emoji = place_emoji(drawings)
    return emoji + place_furniture(renders, emoji)


def place_emoji(drawings: Iterable[Example]) -> list[Example]:
    """The drawings with their splits, without the training concepts of the held-out artist."""
    placed = []
    for drawing in drawings:
        split = drawing.attributes["split"]
        held_out = drawing.attributes["artist"] == HELD_OUT_ARTIST
        if split in STAGES:
            gallery = "unseen_both" if held_out else "unseen_concepts"
            placed.append(_in_split(drawing, f"{split}/{gallery}"))
        elif split != "train":
            placed.append(_in_split(drawing, f"{split.removeprefix('artist_')}/unseen_artist"))
        elif not held_out:
            placed.append(drawing)
    return placed


def _in_split(example: Example, split: str) -> Example:
    return replace(example, attributes={**example.attributes, "split": split})


def place_furniture(renders: Iterable[Example], emoji: Iterable[Example]) -> list[Example]:
    """The renders with their groups and splits; `emoji` have theirs already."""
    emoji = list(emoji)
    group_of = {text.casefold(): e.group for e in emoji for text in e.captions}
    group_of |= {e.captions[0].casefold(): e.group for e in emoji}
    trained = {e.group for e in emoji if e.attributes["split"] == "train"}
    unseen = {e.group for e in emoji} - trained
    renders = [replace(r, group=group_of.get(r.group, r.group)) for r in renders]
    groups = defaultdict(set)
    for render in renders:
        groups[head_word(render.captions[0])].add(render.group)

    def split(render: Example) -> str:
        head = head_word(render.captions[0])
        if len(groups[head]) > MAX_NAMES or groups[head] & trained:
            return "train"
        stage = split_of(head, HELD_OUT_HEADS)
        return stage if stage == "train" else f"{stage}/unseen_furniture"

    return [_in_split(render, split(render)) for render in renders if render.group not in unseen]


def head_word(name: str) -> str:
    """What a name says the thing is: "Coffee table" and "Table on trestles" are a "table"."""
    return _AFTER_HEAD.sub("", name.casefold()).split()[-1]


def read_catalogue(path: Path) -> list[Example]:
    """The renders of one catalogue, a zip file; the group is the name in lower case.

    Captions are the name, and the name with its tags and category.

    Raises:
      DataError: no such file, or not the file of version 1.8-1.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; it is part of Debian's sweethome3d-furniture 1.8-1")
    if hashlib.sha256(path.read_bytes()).hexdigest() != CATALOGUES[path.name]:
        raise DataError(f"{path} is not the file of Debian's sweethome3d-furniture 1.8-1")
    with zipfile.ZipFile(path) as archive:
        items = parse_catalogue(archive.read("PluginFurnitureCatalog.properties"))
        return [_render(item, archive.read(item["icon"].removeprefix("/"))) for item in items]


def parse_catalogue(properties: bytes) -> list[dict[str, str]]:
    """The items of a catalogue: ``name#3=Vase`` gives item 3 its ``name``."""
    items: dict[int, dict[str, str]] = defaultdict(dict)
    for line in properties.decode("unicode_escape").splitlines():
        if match := _PROPERTY.match(line):
            items[int(match[2])][match[1]] = match[3].strip()
    return [items[number] for number in sorted(items)]


def _render(item: dict[str, str], image: bytes) -> Example:
    name = item["name"]
    tags = [tag.strip() for tag in (*item.get("tags", "").split(","), item["category"])]
    described = ", ".join(dict.fromkeys((name, *(tag for tag in tags if tag not in _NO_TAGS))))
    return Example(
        id=f"furniture/{item['id']}",
        group=name.casefold(),
        captions=tuple(dict.fromkeys((name, described))),
        image=image,
        attributes={"artist": item["creator"], "category": item["category"]},
    )
