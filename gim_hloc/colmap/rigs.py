"""Rigs of known geometry: cameras that are fixed to each other and look at the same moment.

COLMAP's rig configuration is a JSON list of rigs; each has ``cameras`` with an ``image_prefix``,
one of them with ``ref_sensor``, the others with ``cam_from_rig_rotation`` (w, x, y, z) and
``cam_from_rig_translation``. Images whose names are the same after the prefix are one frame.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import read_text

if TYPE_CHECKING:
    from gim_hloc.images import ImageRecord


@dataclass(frozen=True, kw_only=True)
class RigSensor:
    """The place of a camera in a rig.

    Attributes:
        rig: number of the rig.
        prefix: of the names of its images.
        cam_from_rig: quaternion (w, x, y, z) and translation; None for the reference camera.
    """

    rig: int
    prefix: str
    cam_from_rig: tuple[float, ...] | None = None

    def frame(self, name: str) -> tuple[int, str]:
        """What the images of one moment have in common."""
        return self.rig, name[len(self.prefix) :]


@dataclass(frozen=True, kw_only=True)
class RigCamera:
    """A camera of a rig, with intrinsics (model, parameters) where the configuration has them."""

    sensor: RigSensor
    intrinsics: tuple[str, tuple[float, ...]] | None = None


def read_rigs(path: Path) -> list[RigCamera]:
    """Cameras of a rig configuration.

    Raises:
        InputError: it is none, or does not say where each camera of a rig is.
    """
    try:
        rigs = json.loads(read_text(path, "rig configuration"))
        cameras = [_camera(n, camera) for n, rig in enumerate(rigs) for camera in rig["cameras"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is no rig configuration of COLMAP, a list of rigs with cameras that have an "
            f"image_prefix each ({type(error).__name__}: {error})."
        ) from None
    for number in range(len(rigs)):
        own = [camera.sensor for camera in cameras if camera.sensor.rig == number]
        references = [s.prefix for s in own if s.cam_from_rig is None]
        if len(references) != 1:
            raise InputError(
                f"{path}: of the cameras of rig {number + 1}, one is the reference (ref_sensor), "
                "all others need cam_from_rig_rotation and cam_from_rig_translation; without are "
                f"{', '.join(map(repr, references)) or 'none'}."
            )
    doubled = [p for p, n in Counter(c.sensor.prefix for c in cameras).items() if n > 1]
    if doubled:
        raise InputError(f"{path}: two cameras have the image_prefix {doubled[0]!r}.")
    return cameras


def _camera(rig: int, camera: Mapping[str, Any]) -> RigCamera:
    pose = None
    if "cam_from_rig_rotation" in camera and not camera.get("ref_sensor"):
        turn = np.array(camera["cam_from_rig_rotation"], dtype=np.float64)
        shift = np.array(camera.get("cam_from_rig_translation", (0, 0, 0)), dtype=np.float64)
        if turn.shape != (4,) or shift.shape != (3,) or not abs(np.linalg.norm(turn) - 1) < 0.01:
            raise ValueError("cam_from_rig is no unit quaternion and translation")
        pose = (*(turn / np.linalg.norm(turn)).tolist(), *shift.tolist())
    intrinsics = None
    if "camera_model_name" in camera and "camera_params" in camera:
        params = tuple(float(value) for value in camera["camera_params"])
        intrinsics = (str(camera["camera_model_name"]), params)
    sensor = RigSensor(rig=rig, prefix=str(camera["image_prefix"]), cam_from_rig=pose)
    return RigCamera(sensor=sensor, intrinsics=intrinsics)


def rig_cameras(
    images: Sequence[ImageRecord], rigs: Sequence[RigCamera], path: Path | str
) -> dict[str, RigCamera]:
    """The camera of each image that is of a rig, by name.

    Raises:
        InputError: a camera has no image, or no two images are of one moment.
    """
    by_length = sorted(rigs, key=lambda camera: -len(camera.sensor.prefix))
    found = {}
    for record in images:
        for camera in by_length:
            if record.name.startswith(camera.sensor.prefix):
                found[record.name] = camera
                break
    used = {camera.sensor for camera in found.values()}
    without = [camera.sensor.prefix for camera in rigs if camera.sensor not in used]
    if without:
        raise InputError(
            f"{path}: no image has a name that begins with {without[0]!r}; names are paths "
            "relative to the image folder."
        )
    moments = Counter(camera.sensor.frame(name) for name, camera in found.items())
    if (
        found
        and len(rigs) > len({camera.sensor.rig for camera in rigs})
        and max(moments.values()) < 2
    ):
        raise InputError(
            f"{path}: no two images are of one moment; their names must be the same after the "
            "image_prefix, such as left/001.jpg and right/001.jpg."
        )
    return found


__all__ = ["RigCamera", "RigSensor", "read_rigs", "rig_cameras"]
