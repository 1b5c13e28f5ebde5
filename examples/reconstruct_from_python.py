"""Reconstruct a folder from Python and look at the result.

python examples/reconstruct_from_python.py [IMAGES] [OUTPUT]
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import gim_hloc


def main() -> None:
    """Run one reconstruction with the camera known from its calibration."""
    room = Path(__file__).resolve().parent / "room"
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else room / "images"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("output-python")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # Every flag of gim-reconstruct is a keyword here.
    result = gim_hloc.reconstruct(images, output, matcher="aliked_lightglue", quality="fast")

    summary = result.report["summary"]
    print(f"{summary['registered']} of {summary['images']} images, {summary['points']} points")
    for row in result.report["images"]:
        if row["status"] != "registered":
            print(f"missing: {row['name']}: {row['reason']}")
    model = result.model()  # a pycolmap.Reconstruction
    print(model.summary())


if __name__ == "__main__":
    main()
