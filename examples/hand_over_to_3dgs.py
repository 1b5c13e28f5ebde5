"""Prepare a reconstruction for 3D Gaussian splatting, NeRF and MVS programs.

    python examples/hand_over_to_3dgs.py IMAGES OUTPUT

Splatting programs want pinhole images and a model of them in ``sparse/0``; nerfstudio reads
``transforms.json`` and undistorts by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gim_hloc
from gim_hloc import colmap


def main() -> None:
    """Reconstruct (or reuse), undistort, and say what to run next."""
    room = Path(__file__).resolve().parent / "room"
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else room / "images"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("output-3dgs")

    result = gim_hloc.reconstruct(images, output, export=("ply", "nerfstudio"))
    workspace = output / "undistorted"
    colmap.undistort(images, result.models[0], workspace)
    print(f"gaussian-splatting, gsplat:  --source_path {workspace}")
    print(f"nerfstudio:                  ns-train splatfacto --data {output / 'export' / '0'}")
    print(f"COLMAP, OpenMVS:             {workspace}")


if __name__ == "__main__":
    main()
