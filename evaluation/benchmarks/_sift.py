"""COLMAP's own SIFT from images to a model, as the process that ``vs_peers`` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gim_hloc import colmap
from gim_hloc import images as image_module
from gim_hloc.options import CameraOptions


@dataclass(frozen=True, kw_only=True)
class SiftOptions:
    """Run COLMAP as it comes."""

    images: Annotated[Path, tyro.conf.Positional]
    """Image folder."""
    output: Annotated[Path, tyro.conf.Positional]
    """Gets the models."""
    intrinsics: str | None = None
    """As of gim-reconstruct; kept as they are."""
    max_features: int = 8192
    """SIFT features an image."""


def main() -> None:
    """Entry point of the module."""
    options = tyro.cli(SiftOptions)
    records = image_module.scan(options.images).images
    cameras, _ = colmap.assign_cameras(records, CameraOptions(intrinsics=options.intrinsics))
    models = colmap.sift_baseline(
        options.images,
        options.output,
        cameras=cameras,
        max_features=options.max_features,
        log_dir=options.output / "logs",
    )
    colmap.write_models(models, options.output / "sparse")


if __name__ == "__main__":
    main()
