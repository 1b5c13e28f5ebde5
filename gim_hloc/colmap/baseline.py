"""What a reconstruction is compared with: COLMAP as it comes, on the same images and cameras."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pycolmap

from gim_hloc.colmap.cameras import CameraSpec
from gim_hloc.colmap.mapping import keep_intrinsics
from gim_hloc.colmap.model import colmap_log


def sift_baseline(
    images: Path,
    output: Path,
    *,
    cameras: Sequence[CameraSpec],
    max_features: int = 8192,
    seed: int = 0,
    log_dir: Path | None = None,
) -> list[Any]:
    """Models of COLMAP as it comes: its SIFT, its exhaustive matching, its incremental mapping.

    Args:
        images: image root.
        output: gets ``database.db``.
        cameras: one camera with known parameters is given to COLMAP and kept; several, or a
            guessed one, are left to COLMAP's own AUTO mode.
        max_features: SIFT features an image (COLMAP's default is 8192).
        seed: of COLMAP's random numbers.
        log_dir: where COLMAP's own log goes.
    """
    output.mkdir(parents=True, exist_ok=True)
    database = output / "database.db"
    database.unlink(missing_ok=True)
    given = len(cameras) == 1 and cameras[0].given
    reader = pycolmap.ImageReaderOptions()
    if given:
        reader.camera_model = cameras[0].model
        reader.camera_params = ",".join(repr(p) for p in cameras[0].params)
    extraction = pycolmap.FeatureExtractionOptions()
    extraction.sift.max_num_features = max_features
    extraction.use_gpu = False
    matching = pycolmap.FeatureMatchingOptions()
    matching.use_gpu = False
    with colmap_log(log_dir):
        pycolmap.extract_features(
            database,
            images,
            camera_mode=pycolmap.CameraMode.SINGLE
            if len(cameras) == 1
            else pycolmap.CameraMode.AUTO,
            reader_options=reader,
            extraction_options=extraction,
        )
        pycolmap.match_exhaustive(database, matching_options=matching)
        mapping = pycolmap.IncrementalPipelineOptions()
        mapping.random_seed = seed
        if given:
            keep_intrinsics(mapping)
        models = pycolmap.incremental_mapping(database, images, output, options=mapping)
    return sorted(models.values(), key=lambda model: -model.num_reg_images())
