"""Models in other programs' formats: the table of ``--export`` and the plainest of its writers.

Formats that hold no pinhole images of their own are written for the images as they are stored,
distortion included; what a format cannot express is a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gim_hloc.colmap.geo import write_geo
from gim_hloc.colmap.glb import write_glb
from gim_hloc.colmap.photogrammetry import (
    write_bundler,
    write_metashape,
    write_nvm,
    write_openmvs,
    write_realityscan,
)
from gim_hloc.colmap.radiance import write_3dgs, write_nerfstudio
from gim_hloc.colmap.target import Format, Target, coloured_points, write_ply
from gim_hloc.errors import InputError


def export_model(model: Any, folder: Path, *, formats: Sequence[str], **about: Any) -> list[str]:
    """Write a model in several formats.

    Args:
        model: ``pycolmap.Reconstruction``.
        folder: where to write the files of ``FORMATS``.
        formats: names in ``FORMATS``.
        **about: other attributes of ``Target``, such as ``images``.

    Returns:
        Notes about formats that could not be written, or not exactly.

    Raises:
        InputError: for an unknown format, or an image that cannot be read.
        OutputError: an image cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"Unknown export {unknown[0]!r}. Known: {', '.join(FORMATS)}.")
    if formats:
        folder.mkdir(parents=True, exist_ok=True)
    target = Target(folder=folder, **about)
    return [note for name in formats for note in FORMATS[name].write(model, target)]


def write_text(model: Any, target: Target) -> list[str]:
    """Write COLMAP's text files."""
    model.write_text(target.folder)
    return []


def write_points(model: Any, target: Target) -> list[str]:
    """Write the coloured points, ``points.ply``."""
    write_ply(target.folder / "points.ply", *coloured_points(model))
    return []


# By their names in --export (``Export`` in gim_hloc/options.py).
FORMATS = {
    "txt": Format(
        [f"{part}.txt" for part in ("cameras", "images", "points3D", "rigs", "frames")], write_text
    ),
    "ply": Format(["points.ply"], write_points),
    "glb": Format(["model.glb"], write_glb),
    "nvm": Format(["model.nvm"], write_nvm),
    "bundler": Format(["bundle.out", "list.txt"], write_bundler),
    "openmvs": Format(["openmvs/**/*"], write_openmvs, large=True),
    "metashape": Format(["cameras.xml"], write_metashape),
    "realityscan": Format(["realityscan/**/*"], write_realityscan, large=True),
    "nerfstudio": Format(["nerfstudio/**/*"], write_nerfstudio, large=True),
    "geo": Format(["geo/**/*"], write_geo, dense=True),
    "3dgs": Format(["3dgs/**/*"], write_3dgs, large=True, dense=True),
}
