"""Builds the packaged emoji pairs again from the published packages.

Kept out of the ordinary run because it downloads 38 MB with npm and renders all 7,000 drawings
(about a minute); `tests/test_build_emoji.py` builds a cut of the same packages.
"""

import hashlib
import json
import pathlib
import shutil
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "emoji_sample"
sys.path.insert(0, str(ROOT / "tools"))

import build_emoji  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The published tarballs."""
    path = tmp_path_factory.mktemp("npm")
    build_emoji.fetch(path)
    return path


def test_full_build_has_the_same_sha256(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "emoji.arrayrecord"
    print(build_emoji.run(folder, out))
    assert _sha256(out) == _sha256(build_emoji.DEFAULT_OUT)
    built = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for path in built:
        assert _sha256(tmp_path / path) == _sha256(build_emoji.DEFAULT_OUT.parent / path), path


def test_sample_is_a_cut_of_the_packages(folder: pathlib.Path) -> None:
    for name, tarball in build_emoji.open_packages(folder).items():
        root = SAMPLE / name.replace("@", "").replace("/", "-")
        for path in (path for path in root.rglob("*") if path.is_file()):
            member = path.relative_to(root).as_posix()
            if path.suffix == ".json":
                assert _is_cut(json.loads(path.read_bytes()), tarball.json(member)), path
            else:
                assert path.read_bytes() == tarball.read(member), path


def _is_cut(part: Any, whole: Any) -> bool:
    """Whether `part` is `whole` with members left out of its maps, and objects of its lists."""
    if isinstance(part, dict):
        return all(key in whole and _is_cut(value, whole[key]) for key, value in part.items())
    if part and isinstance(part, list) and isinstance(part[0], dict):
        return all(any(_is_cut(item, other) for other in whole) for item in part)
    return part == whole


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
