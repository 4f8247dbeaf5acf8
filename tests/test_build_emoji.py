"""The built-in emoji pairs: a cut of the packages, built again, equals the packaged records; and
the packaged file keeps the promises that evaluation rests on.

`data/emoji_sample` holds, per package, the members that the tool reads, cut to a few concepts:
plain drawings of all splits, drawings found by the name only, a mirrored alias, two drawings with
the same pixels, and names under which a set has something else.
"""

import collections
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_lite_jax.data.records import Example, RecordSource, encode_record, write_records

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "data" / "emoji_sample"
sys.path.insert(0, str(ROOT / "tools"))

import build_emoji  # noqa: E402

PERMISSIVE = {"Apache-2.0", "MIT", "CC-BY-4.0", "Unicode-3.0"}
TRAINING_ARTISTS = {"noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, build_emoji.Tarball]:
    """The sample as npm would pack it, by package name."""
    folder = tmp_path_factory.mktemp("packages")
    tarballs = {}
    for package in build_emoji.PACKAGES:
        path = folder / package.tarball
        with tarfile.open(path, "w:gz") as archive:
            archive.add(SAMPLE / package.name.replace("@", "").replace("/", "-"), "package")
        tarballs[package.name] = build_emoji.Tarball(path)
    return tarballs


@pytest.fixture(scope="module")
def sample(packages: dict[str, build_emoji.Tarball]) -> list[Example]:
    """What the tool builds from the sample."""
    return build_emoji.build(packages)[0]


@pytest.fixture(scope="module")
def packaged() -> list[Example]:
    """The records of the packaged file."""
    return list(RecordSource(build_emoji.DEFAULT_OUT))


def _by_split(examples: list[Example], key: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = collections.defaultdict(set)
    for example in examples:
        found[example.attributes["split"]].add(example.attributes[key])
    return found


def _pixels(example: Example) -> np.ndarray:
    with Image.open(io.BytesIO(example.image)) as image:
        return np.asarray(image)


# The build.


def test_sample_equals_the_packaged_records(sample: list[Example], packaged: list[Example]) -> None:
    records = {example.id: encode_record(example) for example in packaged}
    assert len(sample) > 40
    for example in sample:
        assert encode_record(example) == records[example.id], example.id
    splits = {example.attributes["split"] for example in sample}
    assert splits == set(build_emoji.SPLITS)


def test_building_twice_gives_the_same_bytes(
    packages: dict[str, build_emoji.Tarball], sample: list[Example], tmp_path: pathlib.Path
) -> None:
    write_records(tmp_path / "a", sample)
    write_records(tmp_path / "b", build_emoji.build(packages)[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_drawings_are_found_by_name_and_wrong_ones_are_not(sample: list[Example]) -> None:
    ids = {example.id for example in sample}
    assert "fluent-emoji/1f53a" in ids  # "red-triangle" there, "red triangle pointed up" here
    assert {"noto-v1/1f199", "noto-v1/1f3cf"} <= ids
    assert "noto-v1/1f997" not in ids  # its "cricket" is the game
    assert not any("1f1ef-1f1f5" in name for name in ids)  # the one flag is Twemoji's


def test_copies_are_dropped_and_counted(packages: dict[str, build_emoji.Tarball]) -> None:
    examples, dropped = build_emoji.build(packages)
    ids = {example.id for example in examples}
    assert "noto-v1/1f3c3" in ids  # person running
    assert "noto-v1/1f3c3-200d-2642" not in ids  # man running, the same drawing
    assert dropped["noto-v1: same pixels as one of other concept"] == 1
    assert dropped["fluent-emoji-flat: same pixels as one of concept"] == 1
    assert "fluent-emoji-flat/1f445" not in ids


def test_what_training_has_seen_is_kept_out_of_the_tests() -> None:
    def example(name: str, group: str, split: str) -> Example:
        return Example(name, group, ("x",), b"x", {"artist": "a", "split": split})

    examples = [example("1", "c", "test"), example("2", "b", "train"), example("3", "a", "train")]
    kept, dropped = build_emoji.without_copies(examples, [b"same"] * 3)
    assert [item.id for item in kept] == ["3"]
    assert sum(dropped.values()) == 2


def test_mirrored_alias_is_rendered_mirrored(sample: list[Example]) -> None:
    images = {example.id: _pixels(example) for example in sample}
    left, right = (images[f"fluent-emoji-flat/{code}"] for code in ("1f448", "1f449"))
    assert not np.array_equal(left, right)
    # The two are rasterised on different sides of the pixel grid.
    assert np.abs(left[:, ::-1].astype(int) - right).mean() < 0.5


def test_rendering_is_over_white_and_keeps_the_aspect_ratio() -> None:
    encoded, _ = build_emoji.render(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1" width="64" height="64">'
        '<path fill="#f00" d="M0 0h2v1H0z"/></svg>'
    )
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.format == "WEBP"
        pixels = np.asarray(image)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[16:48] == (255, 0, 0)).all()
    assert (pixels[:16] == 255).all()
    assert (pixels[48:] == 255).all()


def test_unknown_transformations_are_refused(tmp_path: pathlib.Path) -> None:
    icons = b'{"width": 1, "height": 1, "icons": {"a": {"body": "", "rotate": 1}}}'
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name, content in (("icons.json", icons), ("chars.json", b"{}")):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match="rotate"):
        build_emoji.IconSet(build_emoji.Tarball(tmp_path / "a.tgz")).svg("a")


def test_tarball_reads_only_known_regular_members(tmp_path: pathlib.Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name in ("package/LICENSE", "package/../../escape", "/etc/icons.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("package/chars.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    tarball = build_emoji.Tarball(tmp_path / "a.tgz")
    assert tarball.read("LICENSE") == b"{}"
    for member in ("chars.json", "icons.json", "../../escape"):
        with pytest.raises(KeyError):
            tarball.read(member)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tgz"}


def test_changed_tarballs_are_refused(tmp_path: pathlib.Path) -> None:
    for package in build_emoji.PACKAGES:
        (tmp_path / package.tarball).write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-512"):
        build_emoji.open_packages(tmp_path)


def test_command_line_says_what_is_missing(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, ROOT / "tools" / "build_emoji.py", "--packages", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "iconify-json-noto-1.2.9.tgz" in result.stderr


@pytest.mark.parametrize(
    ("code", "name", "subgroup", "base"),
    [
        ("1f3c3", "person running", "person-activity", "running"),
        ("1f3c3-200d-2640", "woman running", "person-activity", "running"),
        (
            "1f3c3-200d-2642-200d-27a1",
            "man running: facing right",
            "person-activity",
            "running",
        ),
        ("1f50d", "magnifying glass tilted left", "light-video", "magnifying glass"),
        ("1f50e", "magnifying glass tilted right", "light-video", "magnifying glass"),
        ("1f468-200d-1f9b3", "man: white hair", "person", "person"),
        ("1f467", "girl", "person", "person"),
        ("1f49a", "green heart", "heart", "heart"),
        ("2764-200d-1f525", "heart on fire", "heart", "heart"),
        ("1f552", "three o'clock", "time", "family:clock"),
        ("1f1eb-1f1f7", "flag: France", "country-flag", "family:flags"),
        ("1f9d1-200d-1f9d2", "family: adult, child", "person-symbol", "family:family"),
    ],
)
def test_base_glyph_joins_variants(code: str, name: str, subgroup: str, base: str) -> None:
    assert build_emoji.base_glyph(code, name, subgroup) == base


def test_captions_are_real_distinct_and_bounded() -> None:
    others = list(
        build_emoji.phrasings(
            "red heart",
            "2764",
            "HEAVY BLACK HEART",
            ["heart of red"],
            ["heart_2", "couple_ww", "love"],
        )
    )
    assert others == ["heart of red", "love"]  # the formal name's "black" means filled
    captions = build_emoji.captions_of(
        "red heart",
        ["emotion", "Red heart", "love"],
        [*others, "heart, red", "shit"],
        [["emotion", "love"], ["love", "valentine"]],
    )
    assert captions == ("red heart", "emotion, love", "heart of red", "love")
    assert build_emoji.captions_of("men’s room", ["men’s room"], [], []) == ("men's room",)


def test_gallery_sizes_are_checked(packaged: list[Example]) -> None:
    build_emoji.check(packaged)
    with pytest.raises(ValueError, match="validation has"):
        build_emoji.check([e for e in packaged if e.attributes["split"] != "validation"])
    with pytest.raises(ValueError, match="artist_test has"):
        build_emoji.check([e for e in packaged if e.attributes["split"] != "artist_test"])


# The packaged file.


def test_packaged_size() -> None:
    assert build_emoji.DEFAULT_OUT.stat().st_size <= build_emoji.MAX_BYTES
    assert build_emoji.MAX_BYTES == 16_000_000


def test_packaged_ids_and_captions(packaged: list[Example]) -> None:
    assert len({example.id for example in packaged}) == len(packaged)
    for example in packaged:
        assert example.captions[0] == example.attributes["concept"]
        assert all(caption.strip() == caption != "" for caption in example.captions)
        folded = [caption.lower() for caption in example.captions]
        assert len(set(folded)) == len(folded), example.captions
        assert set(example.attributes) == {
            "artist", "base", "category", "concept", "licence", "split", "subgroup"
        }  # fmt: skip
    assert sum(len(example.captions) for example in packaged) / len(packaged) > 2.8
    names = {example.group: example.captions[0] for example in packaged}
    assert len(set(names.values())) == len(names)  # a name means one concept


def test_packaged_groups_agree(packaged: list[Example]) -> None:
    first: dict[str, Example] = {}
    for example in packaged:
        known = first.setdefault(example.group, example)
        assert example.captions == known.captions
        assert example.attributes["base"] == known.attributes["base"]


@pytest.mark.parametrize("key", ["concept", "base"])
def test_packaged_splits_are_disjoint(packaged: list[Example], key: str) -> None:
    members = _by_split(packaged, key)
    assert set(members) == set(build_emoji.SPLITS)
    for one, other in (
        ("train", "validation"),
        ("train", "test"),
        ("validation", "test"),
        ("artist_validation", "artist_test"),
    ):
        assert not members[one] & members[other]
    # The other artist draws what training knows.
    assert members["artist_validation"] | members["artist_test"] <= members["train"]


def test_packaged_artists(packaged: list[Example]) -> None:
    artists = _by_split(packaged, "artist")
    for split in ("train", "validation", "test"):
        assert artists[split] == TRAINING_ARTISTS
    for split in ("artist_validation", "artist_test"):
        assert artists[split] == {"twemoji"}


def test_packaged_look_alikes_are_only_in_train(packaged: list[Example]) -> None:
    for example in packaged:
        if example.attributes["base"].startswith("family:"):
            assert example.attributes["split"] == "train"


def test_packaged_galleries(packaged: list[Example]) -> None:
    concepts = _by_split(packaged, "concept")
    assert 145 <= len(concepts["validation"]) <= 165
    assert 145 <= len(concepts["test"]) <= 165
    assert len(concepts["artist_validation"]) >= 400
    assert len(concepts["artist_test"]) >= 400
    assert len(concepts["train"]) >= 1300


def test_packaged_images(packaged: list[Example]) -> None:
    seen: dict[bytes, str] = {}
    for example in packaged:
        pixels = _pixels(example)
        assert pixels.shape == (64, 64, 3)
        digest = hashlib.sha256(pixels.tobytes()).digest()
        assert digest not in seen, (example.id, seen[digest])
        seen[digest] = example.id
        assert pixels.min() < 255  # something is drawn


def test_packaged_licences(packaged: list[Example]) -> None:
    assert {example.attributes["licence"] for example in packaged} <= PERMISSIVE
    assert {package.licence for package in build_emoji.PACKAGES} <= PERMISSIVE
    of_artist = {package.artist: package.licence for package in build_emoji.PACKAGES}
    for example in packaged:
        assert example.attributes["licence"] == of_artist[example.attributes["artist"]]


def test_notices_name_every_source(
    packages: dict[str, build_emoji.Tarball], tmp_path: pathlib.Path
) -> None:
    build_emoji.write_notices(packages, tmp_path)
    notice = (tmp_path / "NOTICE.md").read_text(encoding="utf-8")
    assert notice == (build_emoji.DEFAULT_OUT.parent / "NOTICE.md").read_text(encoding="utf-8")
    for package in build_emoji.PACKAGES:
        assert f"{package.name} {package.version}" in notice
        assert package.attribution in notice
        text = (tmp_path / "licences" / package.licence_file).read_bytes()
        assert text == (build_emoji.LICENCES / package.licence_file).read_bytes()
    written = {path.name for path in build_emoji.LICENCES.iterdir()}
    assert written == {package.licence_file for package in build_emoji.PACKAGES}
