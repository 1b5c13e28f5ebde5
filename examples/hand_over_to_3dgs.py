"""Prepare a reconstruction for 3D Gaussian splatting, NeRF and MVS programs.

    python examples/hand_over_to_3dgs.py IMAGES OUTPUT

Splatting programs want undistorted images and a pinhole model of them in ``sparse/0``; nerfstudio
reads ``transforms.json`` and undistorts by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gim_hloc


def main() -> None:
    """Reconstruct (or reuse), export, and say what to run next."""
    room = Path(__file__).resolve().parent / "room"
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else room / "images"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("output-3dgs")

    gim_hloc.reconstruct(images, output, export=("ply", "nerfstudio", "3dgs"), dense=True)
    export = output / "export" / "0"
    print(f"gaussian-splatting, gsplat:  --source_path {export / '3dgs'}")
    print(f"nerfstudio:                  ns-train splatfacto --data {export}")
    print(f"COLMAP's MVS, OpenMVS:       {output / 'dense'}")


if __name__ == "__main__":
    main()
