"""Choose image pairs yourself: every second image in order, plus the most similar ones.

python examples/custom_pairs.py [IMAGES] [OUTPUT]
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import gim_hloc
from gim_hloc import images as gim_images
from gim_hloc.pairs import exhaustive, sequential, write_pairs


def main() -> None:
    """Write a pair list and reconstruct with it."""
    room = Path(__file__).resolve().parent / "room"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else room / "images"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("output-pairs")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    names = gim_images.scan(folder).names
    chosen = set(sequential(names, window=3, quadratic=False)) | set(exhaustive(names[::4]))
    output.mkdir(parents=True, exist_ok=True)
    listed = output / "my-pairs.txt"
    write_pairs(listed, chosen)  # hloc's format: any list of "name0 name1" lines will do

    result = gim_hloc.reconstruct(folder, output, pairs=str(listed), quality="fast")
    print(f"{len(chosen)} pairs, {result.registered} images registered")


if __name__ == "__main__":
    main()
