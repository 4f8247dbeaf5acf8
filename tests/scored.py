"""A source with faults that were planted, for the tests of `clip-lite score`."""

import csv
import shutil
from pathlib import Path

from conftest import draw

EVIL = (
    "</script><img src=x onerror=\"document.title='owned'\"> {{ 7 * 7 }} \u2028 'quoted' & \u202e."
)
COPIES = {
    "copy_a.png": "red_circle.png",
    "copy_b.png": "red_circle.png",
    "copy_c.png": "pink_bar.png",
}


def write_faulty(pairs: Path, folder: Path) -> Path:
    """The pictures of `pairs` with one caption each, and among them what is wrong.

    Three copies of files, one broken file, one missing, a hostile caption, and one caption that
    stands beside three pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in sorted(pairs.parent.glob("*.png")):
        shutil.copy(path, folder / path.name)
        rows.append((path.name, f"a {path.stem.replace('_', ' ')}"))
    for copy, original in COPIES.items():
        shutil.copy(folder / original, folder / copy)
        rows.append((copy, f"once more {original.removesuffix('.png')}"))
    for number in range(3):
        draw("ring", "navy", 20 + number).save(folder / f"navy_{number}.png")
        rows.append((f"navy_{number}.png", "image not available"))
    draw("bar", "gold").save(folder / "evil.png")
    rows.append(("evil.png", EVIL))
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    rows.append(("torn.png", "a torn picture"))
    rows.append(("gone.png", "a picture that is not there"))
    table = folder / "faulty.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return table
