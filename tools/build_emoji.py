"""Builds the built-in image-text pairs: emoji artwork with its English Unicode CLDR captions.

    python tools/build_emoji.py [--packages DIR] [--out FILE]

`DIR` holds the npm tarballs listed in `PACKAGES`; without it they are fetched with ``npm pack``.
Every tarball is checked against its pinned SHA-512 and read in memory: nothing is extracted.
Beside `FILE` the tool writes ``NOTICE.md`` and ``licences/``; the licence texts that the tarballs
lack are kept there by hand.  The packaged file was built, and has the same bytes on every run,
with resvg-py 0.5.0, Pillow 13.0.0 and array_record 0.8.6.

Images.  Each SVG is rendered at 64 x 64 pixels over white with its aspect ratio kept, then stored
as lossless WebP (the whole file stays well under the limit of 16 MB, so no lossy step is needed).

Concepts.  A concept is one emoji in its default skin tone, known by its code points without the
variation selector ("1f3c3-200d-2640").  A set's drawing is found by code point, or by the slug of
the name where the set does not list code points.  Record ids are "artist/concept".

Captions.  First the CLDR short name, then the CLDR keywords without the name, then up to two other
published phrasings: the formal Unicode name, a regional English CLDR name, an emojibase shortcode,
emojibase's tags, or regional CLDR keywords.  Nothing is made up, and no concept has a caption
twice.  Formal names that say "black" or "white" are passed over unless CLDR says so too: there the
words mean filled and outlined, and would put a wrong colour into the caption.

Splits.  "train", "validation" and "test" divide the concepts by a hash of the *base glyph*, so that
the variants of one drawing (woman, man or person running; a magnifying glass tilted left or right;
hearts of any colour) are on one side.  Twemoji is wholly outside training: its drawings of training
concepts form "artist_validation" and "artist_test".

Look-alike families stay whole in train and out of the artist galleries, because within them nobody
could tell from the picture alone which of the names is meant, so that a miss says nothing:
  clock            clock faces differ in the angle of a thin hand
  moon             phases, and moons with a face, differ in the side and share that is lit
  arrow            arrows, and words over an arrow, on the same blue square
  av-symbol        player buttons: the triangles of "next track" and "fast-forward"
  alphanum         letters and ideographs on a coloured square; the name is their translation
  keycap           digits on the same blue square
  zodiac           twelve abstract signs on the same purple square
  geometric        circles, squares and diamonds that differ in colour or in relative size
  family           couples and families: combinations of the same few figures
  flags            flags of countries and regions: one has to know the names, and some are alike
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import resvg_py
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tool runs from a checkout, installed or not

from clip_lite_jax.data.records import Example, write_records  # noqa: E402

SIZE = 64  # pixels
MAX_BYTES = 16 * 10**6
DEFAULT_OUT = ROOT / "clip_lite_jax" / "data" / "builtin" / "emoji.arrayrecord"
LICENCES = DEFAULT_OUT.parent / "licences"


@dataclasses.dataclass(frozen=True)
class Package:
    """One pinned npm package.  `artist` is empty for text packages."""

    name: str
    version: str
    sha512: str
    licence: str  # SPDX
    attribution: str
    licence_file: str  # under licences/
    use: str
    artist: str = ""
    licence_member: str = ""  # where the tarball holds its licence text

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        name="@iconify-json/noto",
        version="1.2.9",
        sha512="0d08ae5c435bba7e35721f973d2579e47f456962a91d3cb3e3a6082ad49a2980"
        "f87c80c3ccbd6d47a1f89e9fd3dfc8dfad301e237adc285d26a8761e65502e6b",
        licence="Apache-2.0",
        attribution="Noto Emoji, Copyright Google Inc.",
        licence_file="Apache-2.0.txt",
        use="drawings",
        artist="noto",
    ),
    Package(
        name="@iconify-json/noto-v1",
        version="1.2.5",
        sha512="fc3b15322bacebd4347d14b9df3ed02b54d1392b9aafad3a8e2231fa5697b5db"
        "1818c5e97fa2ed1c1c7a0867e8a375071dbfd7a41b30fb52f5c777b23ea32e54",
        licence="Apache-2.0",
        attribution="Noto Emoji (v1), Copyright Google Inc.",
        licence_file="Apache-2.0.txt",
        use="drawings",
        artist="noto-v1",
    ),
    Package(
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        sha512="0fc1ba6ca03222ccb13f5af366d216aff820fdf3b8460d7e0f209695fa8a2b88"
        "7c5bee049bf6343fa4188095104e551c6a0cc9bd2ca0fbd381bf8873e0773f40",
        licence="MIT",
        attribution="Fluent Emoji, Copyright (c) Microsoft Corporation.",
        licence_file="MIT-fluent-emoji.txt",
        use="drawings",
        artist="fluent-emoji",
    ),
    Package(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        sha512="458e3b4603dbe3b7d8522cab03ae2c20e2f4f94534dacdbdb17a4d05b2104415"
        "253e57cd1532949990c4446bb10ecffbc8d196a9062fb9a4983353387d15e553",
        licence="MIT",
        attribution="Fluent Emoji Flat, Copyright (c) Microsoft Corporation.",
        licence_file="MIT-fluent-emoji.txt",
        use="drawings",
        artist="fluent-emoji-flat",
    ),
    Package(
        name="@iconify-json/twemoji",
        version="1.2.5",
        sha512="b8aa6e204574bfa2b9056dcc8ddca5f972855406db70fc408227cabc432d6685"
        "19079f98898e7368c9b6b8d342c725f301653dc8d2e58f8d5653afe6be000bb3",
        licence="CC-BY-4.0",
        attribution="Twemoji, Copyright Twitter, Inc and other contributors",
        licence_file="CC-BY-4.0.txt",
        use="drawings",
        artist="twemoji",
    ),
    Package(
        name="cldr-annotations-full",
        version="48.2.0",
        sha512="0d5ec0fab11c81448d4d1b1518d1aa05946602419fc211873b9435751c330680"
        "6756b1d6a7cd3824feff40974473aea21e6c77fb32d654830214b9b4956ecf51",
        licence="Unicode-3.0",
        attribution="Unicode CLDR, Copyright (c) 2004-2026 Unicode, Inc.",
        licence_file="Unicode-3.0.txt",
        use="names and keywords",
        licence_member="LICENSE",
    ),
    Package(
        name="cldr-annotations-derived-full",
        version="48.2.0",
        sha512="96883ada49be00ecc8ee7fcd12e34d155d2683d0d69edebb1180a1d51c3166af"
        "5dc91bb2b5e079f3a2d3f3729ef1372111f9f023d7089363f7d733b89d3bd99b",
        licence="Unicode-3.0",
        attribution="Unicode CLDR, Copyright (c) 2004-2026 Unicode, Inc.",
        licence_file="Unicode-3.0.txt",
        use="names and keywords of sequences",
        licence_member="LICENSE",
    ),
    Package(
        name="unicode-emoji-json",
        version="0.9.0",
        sha512="1ddad05bfed275b5d4b1377cb93013bfb2ef4099024a06c08110830ad3a143ac"
        "67dc4031fb164742d46788e5d624adf2c08a8f7a090d84fe14e046ee16c8909e",
        licence="MIT",
        attribution="unicode-emoji-json, Copyright (c) 2019 Mu-An Chiou",
        licence_file="MIT-unicode-emoji-json.txt",
        use="the list of emoji and their categories",
        licence_member="LICENSE",
    ),
    Package(
        name="emojibase-data",
        version="17.0.0",
        sha512="62f81be405a81d588757f82ad6aaf96406ab7018a9f81dbbfd92d1b142646e00"
        "0468b959fdfa1ff60f3cd8b4e9984a728413440b49b6484988b658c7b13ca08c",
        licence="MIT",
        attribution="emojibase-data, Copyright (c) 2017-2019 Miles Johnson",
        licence_file="MIT-emojibase-data.txt",
        use="tags, shortcodes, formal Unicode names and subgroups",
        licence_member="LICENSE",
    ),
)

HELD_OUT_ARTIST = "twemoji"
SPLITS = ("train", "validation", "test", "artist_validation", "artist_test")
# Shares of base glyphs outside the families; they give about 150 concepts each.
VALIDATION_SHARE, TEST_SHARE = 0.108, 0.124
GALLERY_CONCEPTS = range(145, 166)  # what each of validation and test must hold
MIN_ARTIST_TEST_CONCEPTS = 400

# Families named by their subgroup, or by code points where the subgroup holds other things too.
_FAMILY_OF_SUBGROUP = {
    "arrow": "arrow",
    "av-symbol": "av-symbol",
    "alphanum": "alphanum",
    "keycap": "keycap",
    "zodiac": "zodiac",
    "geometric": "geometric",
    "family": "family",
    "country-flag": "flags",
    "subdivision-flag": "flags",
}
_FAMILY_OF_CODE = {
    **{f"{code:x}": "clock" for code in range(0x1F550, 0x1F568)},
    **{f"{code:x}": "moon" for code in range(0x1F311, 0x1F31E)},
    # "family", "family: adult, child" and the like
    "1f9d1-200d-1f9d1-200d-1f9d2": "family",
    "1f9d1-200d-1f9d1-200d-1f9d2-200d-1f9d2": "family",
    "1f46a": "family",
    "1f9d1-200d-1f9d2": "family",
    "1f9d1-200d-1f9d2-200d-1f9d2": "family",
}

# Words that tell variants of one drawing apart; the base glyph is the name without them.
_VARIANT_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        man men woman women person people boy girl child man's woman's men's women's facing
        left right up down leftwards rightwards upwards downwards tilted front oncoming red
        orange yellow green blue purple brown black white grey pink light open closed raised
        lowered 1st 2nd 3rd low medium high increasing decreasing curly blond hair bald
        """,
    )
)
# Variants that their names do not show.
_BASE_OF_CODE = {
    **dict.fromkeys(("1f385", "1f936", "1f9d1-200d-1f384"), "claus"),
    **dict.fromkeys(("1f934", "1f478", "1fac5"), "royalty"),
    **dict.fromkeys(("1f9dc", "1f9dc-200d-2642", "1f9dc-200d-2640"), "merperson"),
    **dict.fromkeys(("1f9d3", "1f474", "1f475"), "old"),
    **dict.fromkeys(
        ("1f931", "1f469-200d-1f37c", "1f468-200d-1f37c", "1f9d1-200d-1f37c"), "feeding baby"
    ),
    **dict.fromkeys(("1f415", "1f9ae", "1f415-200d-1f9ba"), "dog"),
    **dict.fromkeys(("1f43b", "1f43b-200d-2744"), "bear"),
    **dict.fromkeys(("1f34b", "1f34b-200d-1f7e9"), "lemon"),
    **dict.fromkeys(("26d3", "26d3-200d-1f4a5"), "chains"),
    **dict.fromkeys(("1f42a", "1f42b"), "camel"),
    **dict.fromkeys(("1f512", "1f513", "1f510", "1f50f"), "lock"),
    **dict.fromkeys(("1f4c8", "1f4c9", "1f4b9"), "chart"),
    **dict.fromkeys(("1f507", "1f508", "1f509", "1f50a"), "speaker"),
    **dict.fromkeys(("1f514", "1f515"), "bell"),
    **dict.fromkeys(("1f30d", "1f30e", "1f30f"), "globe"),
    **dict.fromkeys(("2764-200d-1f525", "2764-200d-1fa79"), "heart"),
    **dict.fromkeys(("1f4b4", "1f4b5", "1f4b6", "1f4b7"), "banknote"),
    **dict.fromkeys(("1f4e4", "1f4e5"), "tray"),
    **dict.fromkeys(("26c5", "1f324", "1f325", "1f326"), "sun behind cloud"),
    **dict.fromkeys(("2603", "26c4"), "snowman"),
    **dict.fromkeys(("1f648", "1f649", "1f64a"), "no-evil monkey"),
    **dict.fromkeys(("1f6eb", "1f6ec"), "airplane and runway"),
    **dict.fromkeys(("1f3b5", "1f3b6"), "musical note"),
    **dict.fromkeys(("1f4c3", "1f4c4"), "page"),
    **dict.fromkeys(("1f3e3", "1f3e4"), "post office"),
}

# Names under which a set has the drawing of something else.
_WRONG_DRAWINGS = {
    ("noto-v1", "cricket"),  # the game
    ("noto-v1", "pistol"),  # a firearm, the concept is now a water pistol
    ("noto-v1", "up-button"),  # the triangle, the concept is a button that says "UP!"
    ("fluent-emoji-flat", "white-square-button"),  # a black square
}

# English regions whose CLDR names differ from the American ones ("aubergine", "torch").
_REGIONS = ("en-GB", "en-001", "en-AU", "en-CA", "en-IN")
_SHORTCODES = ("emojibase", "iamcal", "github", "joypixels")
_MAX_CAPTIONS = 4

# All that is read from the tarballs.
MEMBERS = frozenset(
    [
        "LICENSE",
        "icons.json",
        "chars.json",
        "info.json",
        "data-by-emoji.json",
        "en/data.json",
        "meta/groups.json",
        "meta/unicode-names.json",
        *(f"en/shortcodes/{preset}.json" for preset in _SHORTCODES),
        *(f"annotations/{language}/annotations.json" for language in ("en", *_REGIONS)),
        "annotationsDerived/en/annotations.json",
    ]
)

# Words of shortcodes and formal names that are misspelt, run together, brands or slurs.
_POOR_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        android bullettrain couplekiss handicapped iphone lmao mag mans mega mens shit
        thumbsdown thumbsup trex volumne womans womens wtf
        """,
    )
)
_TYPED = str.maketrans("’“”", '\'""')  # as one would type it


@dataclasses.dataclass(frozen=True)
class Concept:
    """What all drawings of one emoji share."""

    code: str
    name: str
    captions: tuple[str, ...]
    category: str
    subgroup: str
    base: str  # base glyph, or "family:..." for the look-alikes
    split: str  # of the training artists' drawings


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One SVG document to be rendered."""

    artist: str
    licence: str
    concept: Concept
    split: str
    svg: str


class Tarball:
    """The needed members of one npm tarball, held in memory."""

    def __init__(self, path: pathlib.Path) -> None:
        self._files: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for info in archive:
                member = info.name.removeprefix("package/")
                stream = archive.extractfile(info) if member in MEMBERS and info.isreg() else None
                if stream is not None:
                    self._files[member] = stream.read()

    def read(self, member: str) -> bytes:
        """One file of `MEMBERS`; raises ``KeyError`` when the tarball does not have it."""
        return self._files[member]

    def json(self, member: str) -> Any:
        """One JSON file of `MEMBERS`."""
        return json.loads(self.read(member))


def verify(path: pathlib.Path, sha512: str) -> None:
    """Raises ``ValueError`` when the file at `path` has another SHA-512."""
    found = hashlib.sha512(path.read_bytes()).hexdigest()
    if found != sha512:
        raise ValueError(f"{path.name}: SHA-512 is {found}, pinned is {sha512}")


def fetch(folder: pathlib.Path) -> None:
    """Downloads all packages into `folder` with npm."""
    for package in PACKAGES:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def open_packages(folder: pathlib.Path) -> dict[str, Tarball]:
    """Verified tarballs by package name."""
    for package in PACKAGES:
        verify(folder / package.tarball, package.sha512)
    return {package.name: Tarball(folder / package.tarball) for package in PACKAGES}


def code_of(text: str) -> str:
    """Code points of an emoji, or of an id such as "2764-FE0F", without the variation selector."""
    codes = text.lower().split("-") if text.isascii() else [f"{ord(char):x}" for char in text]
    return "-".join(code for code in codes if code != "fe0f")


def slug(name: str) -> str:
    """The form in which icon sets write a name: "flag: Réunion" becomes "flag-reunion"."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    spelled = ascii_name.replace("'", "").replace("&", " and ")
    return re.sub(r"[^a-z0-9]+", "-", spelled).strip("-")


def words(text: str) -> list[str]:
    """Lower-case words of a name, hyphens taken apart."""
    return re.findall(r"[^\s:,\-–_]+", text.lower().replace("’", "'"))


def fraction(key: str, salt: str) -> float:
    """A stable pseudo-random number in [0, 1) for `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=salt.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def base_glyph(code: str, name: str, subgroup: str) -> str:
    """What the variants of one drawing share; "family:..." for look-alike families."""
    family = _FAMILY_OF_CODE.get(code) or _FAMILY_OF_SUBGROUP.get(subgroup)
    if family:
        return f"family:{family}"
    kept = [word for word in words(name) if word not in _VARIANT_WORDS]
    return _BASE_OF_CODE.get(code) or " ".join(kept) or "person"


def split_of(base: str) -> str:
    """The split of the training artists' drawings of a base glyph."""
    if base.startswith("family:"):
        return "train"
    place = fraction(base, "split")
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def split_of_drawing(concept: Concept, artist: str) -> str | None:
    """The split of one drawing; None for one that belongs nowhere."""
    if artist != HELD_OUT_ARTIST:
        return concept.split
    if concept.split != "train" or concept.base.startswith("family:"):
        return None
    return "artist_test" if fraction(concept.base, "artist") < 0.5 else "artist_validation"


def phrasings(
    name: str, code: str, formal_name: str, regional: Iterable[str], shortcodes: Iterable[str]
) -> Iterator[str]:
    """Other published names of a concept, the most telling first."""
    colours = {"black", "white"} & set(words(formal_name))
    if "-" not in code and colours <= set(words(name)) and "ideograph" not in formal_name.lower():
        yield formal_name.lower()
    yield from regional
    for shortcode in shortcodes:
        phrase = shortcode.replace("_", " ").replace("-", " ")
        # Abbreviations ("couple ww", "family wwbb") and numbers ("tiger2") are not English.
        if all(re.fullmatch(r"(?=.*[aeiouy])[a-z]{3,}", word) for word in phrase.split()):
            yield phrase


def captions_of(
    name: str,
    keywords: Sequence[str],
    others: Iterable[str],
    more_keywords: Iterable[Sequence[str]],
) -> tuple[str, ...]:
    """The name, the keywords, other phrasings and further keyword lists; at most `_MAX_CAPTIONS`.

    A caption of the same words as an earlier one is left out, and so is a further keyword list
    that brings no new word.
    """
    captions: dict[frozenset[str], str] = {}
    for caption in (name, _listed(keywords, name), *filter(_is_good, others)):
        plain = " ".join(caption.translate(_TYPED).split())
        if plain:
            captions.setdefault(frozenset(words(plain)), plain)
    for terms in more_keywords:
        plain = _listed(terms, name).translate(_TYPED)
        if not set(words(plain)) <= frozenset().union(*captions):
            captions[frozenset(words(plain))] = plain
    return tuple(captions.values())[:_MAX_CAPTIONS]


def _listed(terms: Sequence[str], name: str) -> str:
    return ", ".join(term for term in terms if term.lower() != name.lower())


def _is_good(phrase: str) -> bool:
    return not _POOR_WORDS & set(words(phrase))


def _annotations(tarball: Tarball, kind: str, language: str) -> dict[str, dict[str, list[str]]]:
    """CLDR annotations of one language by code; "tts" is the name, "default" the keywords."""
    content = tarball.json(f"{kind}/{language}/annotations.json")
    return {code_of(emoji): entry for emoji, entry in content[kind]["annotations"].items()}


def load_concepts(packages: Mapping[str, Tarball]) -> dict[str, Concept]:
    """All concepts of the emoji list by code, in the order of the list."""
    cldr = packages["cldr-annotations-full"]
    english = {
        **_annotations(packages["cldr-annotations-derived-full"], "annotationsDerived", "en"),
        **_annotations(cldr, "annotations", "en"),
    }
    regions = [_annotations(cldr, "annotations", region) for region in _REGIONS]
    emojibase = packages["emojibase-data"]
    entries = {code_of(entry["emoji"]): entry for entry in emojibase.json("en/data.json")}
    subgroups = emojibase.json("meta/groups.json")["subgroups"]
    formal_names = emojibase.json("meta/unicode-names.json")
    shortcodes = [emojibase.json(f"en/shortcodes/{preset}.json") for preset in _SHORTCODES]

    concepts = {}
    for emoji, listed in packages["unicode-emoji-json"].json("data-by-emoji.json").items():
        code = code_of(emoji)
        entry, annotation = entries[code], english[code]
        name = annotation["tts"][0].translate(_TYPED)
        hexcode, subgroup = entry["hexcode"], subgroups[str(entry["subgroup"])]
        regional = [region[code] for region in regions if code in region]
        more_keywords = [region["default"] for region in regional if "default" in region]
        others = phrasings(
            name,
            code,
            formal_names.get(hexcode, ""),
            [region["tts"][0] for region in regional if "tts" in region],
            [text for preset in shortcodes for text in _as_list(preset.get(hexcode, []))],
        )
        base = base_glyph(code, name, subgroup)
        concepts[code] = Concept(
            code=code,
            name=name,
            captions=captions_of(
                name, annotation["default"], others, [entry.get("tags", []), *more_keywords]
            ),
            category=listed["group"],
            subgroup=subgroup,
            base=base,
            split=split_of(base),
        )
    return concepts


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class IconSet:
    """The drawings of one artist."""

    def __init__(self, tarball: Tarball) -> None:
        self._content = tarball.json("icons.json")
        self._aliases: dict[str, dict[str, Any]] = self._content.get("aliases", {})
        self.names: set[str] = set(self._content["icons"]) | set(self._aliases)
        self.name_of_code: dict[str, str] = {}
        for code, name in tarball.json("chars.json").items():
            self.name_of_code.setdefault(code_of(code), name)

    def svg(self, name: str) -> str:
        """The SVG document of one icon; ``ValueError`` for a transformation not known here."""
        alias = self._aliases.get(name, {})
        icon = self._content["icons"][alias.get("parent", name)]
        width = icon.get("width", self._content["width"])
        height = icon.get("height", self._content["height"])
        body = icon["body"]
        unknown = (set(alias) | set(icon)) & {"vFlip", "rotate", "left", "top"}
        if unknown:
            raise ValueError(f"icon {name}: {sorted(unknown)} is not supported")
        if alias.get("hFlip", False):
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{SIZE}" height="{SIZE}">{body}</svg>'
        )


def name_index(concepts: Iterable[Concept], sets: Iterable[IconSet]) -> dict[str, str]:
    """Code by slug: today's names, and those that sets with code points use for the same code.

    A slug that could mean two concepts is left out, unless one of them has it as its name.
    """
    known = list(concepts)
    codes = {concept.code for concept in known}
    today: dict[str, set[str]] = collections.defaultdict(set)
    used: dict[str, set[str]] = collections.defaultdict(set)
    for concept in known:
        today[slug(concept.name)].add(concept.code)
    for icon_set in sets:
        for code, name in icon_set.name_of_code.items():
            if code in codes:
                used[name].add(code)
    used.update(today)
    return {name: next(iter(found)) for name, found in used.items() if len(found) == 1}


def match(icon_set: IconSet, artist: str, index: Mapping[str, str]) -> dict[str, str]:
    """Icon name by code.  Code points decide, then today's or another set's name."""
    codes = set(index.values())
    found = {code: name for code, name in icon_set.name_of_code.items() if code in codes}
    for name in sorted(icon_set.names):
        if name in index and (artist, name) not in _WRONG_DRAWINGS:
            found.setdefault(index[name], name)
    return found


def collect(packages: Mapping[str, Tarball]) -> tuple[list[Drawing], collections.Counter[str]]:
    """All drawings that belong to a split, sorted by artist and code, and counts of the others."""
    concepts = load_concepts(packages)
    artists = [package for package in PACKAGES if package.artist]
    sets = {package.artist: IconSet(packages[package.name]) for package in artists}
    index = name_index(concepts.values(), sets.values())
    matches = {artist: match(icons, artist, index) for artist, icons in sets.items()}
    trained = {code for artist in sets if artist != HELD_OUT_ARTIST for code in matches[artist]}
    drawings, dropped = [], collections.Counter[str]()
    for package in sorted(artists, key=lambda package: package.artist):
        for code, name in sorted(matches[package.artist].items()):
            split = split_of_drawing(concepts[code], package.artist)
            if split is None or code not in trained:
                dropped[f"{package.artist}: outside the artist galleries"] += 1
                continue
            svg = sets[package.artist].svg(name)
            drawings.append(Drawing(package.artist, package.licence, concepts[code], split, svg))
    return drawings, dropped


def render(svg: str) -> tuple[bytes, bytes]:
    """The WebP file of one drawing and the SHA-256 of its pixels."""
    # Higher WebP effort takes 30 times as long for 0.5 % fewer bytes.
    # System fonts would make the result depend on the machine; no drawing has text.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.size != (SIZE, SIZE):
        raise ValueError(f"rendered at {image.size}")
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=True, quality=75, method=4)
    return encoded.getvalue(), hashlib.sha256(image.tobytes()).digest()


def to_example(drawing: Drawing, image: bytes) -> Example:
    """The record of one drawing."""
    concept = drawing.concept
    return Example(
        id=f"{drawing.artist}/{concept.code}",
        group=concept.code,
        captions=concept.captions,
        image=image,
        attributes={
            "artist": drawing.artist,
            "base": concept.base,
            "category": concept.category,
            "concept": concept.name,
            "licence": drawing.licence,
            "split": drawing.split,
            "subgroup": concept.subgroup,
        },
    )


def without_copies(
    examples: Sequence[Example], pixels: Sequence[bytes]
) -> tuple[list[Example], collections.Counter[str]]:
    """Keeps one of all examples with the same pixels, and counts the others.

    The one kept is the first in the order of `SPLITS`: what training has seen is no test.  Within
    a split it is the first concept in code order, which has the most general name.
    """
    order = sorted(
        range(len(examples)),
        key=lambda i: (SPLITS.index(examples[i].attributes["split"]), examples[i].group, i),
    )
    first: dict[bytes, int] = {}
    dropped = collections.Counter[str]()
    for i in order:
        kept = examples[first.setdefault(pixels[i], i)]
        if kept is not examples[i]:
            kind = "concept" if kept.group == examples[i].group else "other concept"
            dropped[f"{examples[i].attributes['artist']}: same pixels as one of {kind}"] += 1
    return [examples[i] for i in sorted(first.values())], dropped


def build(
    packages: Mapping[str, Tarball],
) -> tuple[list[Example], collections.Counter[str]]:
    """All examples in the order of the file, and counts of what was dropped."""
    drawings, dropped = collect(packages)
    rendered = [render(drawing.svg) for drawing in drawings]
    examples = [
        to_example(drawing, image) for drawing, (image, _) in zip(drawings, rendered, strict=True)
    ]
    kept, copies = without_copies(examples, [digest for _, digest in rendered])
    return kept, dropped + copies


def check(examples: Sequence[Example]) -> None:
    """Raises ``ValueError`` when the splits do not have the sizes they must have."""
    concepts: dict[str, set[str]] = collections.defaultdict(set)
    for example in examples:
        concepts[example.attributes["split"]].add(example.group)
    for split in ("validation", "test"):
        if len(concepts[split]) not in GALLERY_CONCEPTS:
            raise ValueError(f"{split} has {len(concepts[split])} concepts")
    if len(concepts["artist_test"]) < MIN_ARTIST_TEST_CONCEPTS:
        raise ValueError(f"artist_test has {len(concepts['artist_test'])} concepts")


def write_notices(packages: Mapping[str, Tarball], folder: pathlib.Path) -> None:
    """Writes ``NOTICE.md`` and ``licences/`` into `folder`."""
    licences = folder / "licences"
    licences.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Sources of the built-in emoji pairs",
        "",
        "`emoji.arrayrecord` was made by `tools/build_emoji.py` from the npm packages below.",
        f"Drawings were changed: rendered at {SIZE} x {SIZE} pixels over white, as lossless WebP.",
        "Texts were changed: selected, lower-cased in part, and joined into captions.",
        "The authors of the sources do not endorse this project.",
        "",
    ]
    for package in PACKAGES:
        tarball = packages[package.name]
        target = licences / package.licence_file
        if package.licence_member:
            target.write_bytes(tarball.read(package.licence_member))
        elif target != LICENCES / package.licence_file:
            target.write_bytes((LICENCES / package.licence_file).read_bytes())
        lines += [
            f"## {package.name} {package.version}",
            "",
            f"- Used for: {package.use}" + (f" (`{package.artist}`)" if package.artist else ""),
            f"- Attribution: {package.attribution}",
            f"- Licence: {package.licence}, see `licences/{package.licence_file}`",
        ]
        if package.artist:
            info = tarball.json("info.json")
            lines += [
                f"- Source: {info['author']['name']}, {info['author']['url']}",
                f"- Licence address: {info['license']['url']}",
            ]
        lines.append("")
    (folder / "NOTICE.md").write_text("\n".join(lines), encoding="utf-8")


def summary(examples: Sequence[Example], dropped: Mapping[str, int], out: pathlib.Path) -> str:
    """Counts per split and artist, what was dropped, and the file's size and SHA-256."""
    lines = [f"{'split':18} {'artist':18} {'images':>6} {'concepts':>8} {'captions':>8}"]
    groups: dict[tuple[str, str], list[Example]] = collections.defaultdict(list)
    for example in examples:
        for artist in (example.attributes["artist"], "all"):
            groups[example.attributes["split"], artist].append(example)
    for split in SPLITS:
        for artist in (*(package.artist for package in PACKAGES if package.artist), "all"):
            members = groups.get((split, artist))
            if members:
                concepts = len({example.group for example in members})
                mean = sum(len(example.captions) for example in members) / len(members)
                lines.append(f"{split:18} {artist:18} {len(members):6} {concepts:8} {mean:8.2f}")
    lines += [f"dropped: {count:5} {reason}" for reason, count in sorted(dropped.items())]
    lines.append(f"{os.path.getsize(out)} bytes")
    lines.append(f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}")
    return "\n".join(lines)


def run(folder: pathlib.Path, out: pathlib.Path) -> str:
    """Builds `out` and its notices from the tarballs in `folder`; returns the summary."""
    packages = open_packages(folder)
    examples, dropped = build(packages)
    check(examples)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_records(out, examples)
    write_notices(packages, out.parent)
    if os.path.getsize(out) > MAX_BYTES:
        raise ValueError(f"{out} has {os.path.getsize(out)} bytes, more than {MAX_BYTES}")
    return summary(examples, dropped, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds the built-in emoji image-text pairs.")
    parser.add_argument("--packages", type=pathlib.Path, help="folder with the npm tarballs")
    parser.add_argument("--out", type=pathlib.Path, default=DEFAULT_OUT, help="file to write")
    options = parser.parse_args(arguments)
    if options.packages:
        print(run(options.packages, options.out))
        return
    with tempfile.TemporaryDirectory() as temporary:
        fetch(pathlib.Path(temporary))
        print(run(pathlib.Path(temporary), options.out))


if __name__ == "__main__":
    main()
