"""A table of product pictures to try things out with: Debian's sweethome3d-furniture.

``python -m tools.build_furniture FURNITURE OUT`` writes ``OUT/products.csv`` with the columns
image, name, description and product, and ``OUT/photos``.  FURNITURE is the folder of the package's
catalogues, ``/usr/share/sweethome3d/furniture``.  The renders are in the public domain, or CC-BY
3.0 by the creators that the catalogues name.
"""

import argparse
import csv
from pathlib import Path

from benchmarks.frozen_pairs import CATALOGUES, read_catalogue


def write_table(furniture: Path, out: Path) -> int:
    """Writes table and pictures; returns how many products there are.

    Raises:
      DataError: a catalogue is missing, or of another version.
    """
    (out / "photos").mkdir(parents=True, exist_ok=True)
    renders = [render for name in CATALOGUES for render in read_catalogue(furniture / name)]
    with (out / "products.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "name", "description", "product"])
        for number, render in enumerate(renders):
            name = f"photos/{number:04d}.png"
            (out / name).write_bytes(render.image)
            table.writerow([name, *(*render.captions, "")[:2], render.group])
    return len(renders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("furniture", type=Path, help="folder of the catalogues")
    parser.add_argument("out", type=Path, help="folder to write to")
    known = parser.parse_args()
    print(f"{write_table(known.furniture, known.out)} products: {known.out / 'products.csv'}")


if __name__ == "__main__":
    main()
