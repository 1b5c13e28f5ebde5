"""Equirectangular panoramas among the images: perspective views of each are images of the run.

The views of a panorama are a rig of known geometry. The first one looks at the middle of the
panorama, so that its pose is that of the panorama: x to the right, y down, z ahead.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np
import scipy  # its packages are loaded when they are used
from PIL import Image

from gim_hloc import images as image_module
from gim_hloc.colmap.rigs import RigCamera, RigSensor
from gim_hloc.errors import InputError
from gim_hloc.images import Exif, ImageRecord, ImageSet, read_rgb
from gim_hloc.options import PanoramaUse
from gim_hloc.pipelines.run import RunFolder, Step
from gim_hloc.pipelines.videos import FOLDER
from gim_hloc.poses import Pose
from gim_hloc.store import digest

_NUM_SIDES = 8  # views to all sides, each 90 degrees wide and high: neighbours overlap by half
NUM_VIEWS = _NUM_SIDES + 2  # and one straight up, one straight down
LIST = "panoramas.txt"  # beside a model: their poses
_VIEW = re.compile(r"views/(\d+)/(\d+)/")  # side in pixels, number
_HEAD = 2**18  # bytes of a file in which XMP is looked for


def is_panorama(record: ImageRecord, mode: PanoramaUse) -> bool:
    """Whether an image is an equirectangular panorama: twice as wide as high, and called one."""
    if mode == "none" or record.width != 2 * record.height:
        return False
    if mode == "all":
        return True
    try:
        with record.path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"{record.path} cannot be read: {error.strerror}.") from None
    return b"GPano" in head and b"equirectangular" in head


def _prefix(side: int, number: int) -> str:
    return f"views/{side}/{number}/"


def view_names(record: ImageRecord) -> list[str]:
    """Names of the views of a panorama, below OUTPUT/images."""
    name = record.name
    own = name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"
    return [_prefix(view_side(record.width), number) + own for number in range(NUM_VIEWS)]


def turn(number: int) -> np.ndarray:
    """(3, 3) rotation from the panorama's axes to those of a view."""
    if number >= _NUM_SIDES:
        down = 1 if number > _NUM_SIDES else -1
        return np.array([[1.0, 0, 0], [0, 0, -down], [0, down, 0]])
    angle = 2 * np.pi * number / _NUM_SIDES
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])


def view_side(width: int) -> int:
    """Pixels of a view's side, for a panorama so wide: as many an angle, in the middle."""
    return max(64, round(width / np.pi))


def render_view(panorama: np.ndarray, number: int) -> np.ndarray:
    """A view (S, S, 3) of a panorama (H, 2 H, 3), uint8."""
    height, width = panorama.shape[:2]
    side = view_side(width)
    plane = (np.arange(side) + 0.5 - side / 2) / (side / 2)
    x, y = np.meshgrid(plane, plane)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ turn(number)  # the inverse turn, row by row
    longitude = np.arctan2(rays[..., 0], rays[..., 2])
    latitude = np.arctan2(rays[..., 1], np.hypot(rays[..., 0], rays[..., 2]))
    columns = ((longitude / (2 * np.pi) + 0.5) * width - 0.5).astype(np.float32)
    rows = ((latitude / np.pi + 0.5) * height - 0.5).clip(0, height - 1).astype(np.float32)
    return cv2.remap(panorama, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_WRAP)


class Panoramas:
    """The panoramas of a run.

    Args:
        image_set: all images; those of it that are panoramas make place for their views.
        mode: ``--panorama``.
    """

    def __init__(self, image_set: ImageSet, mode: PanoramaUse) -> None:
        self.image_set = image_set
        self.found = [record for record in image_set if is_panorama(record, mode)]

    @property
    def steps(self) -> dict[str, ImageRecord]:
        """Name of the step that renders the views of each."""
        return {f"frames {record.sha256[:24]}": record for record in self.found}

    def render(self, folder: RunFolder, *, again: bool) -> None:
        """Write the views that are not there yet to OUTPUT/images."""
        todo = {
            step: record
            for step, record in self.steps.items()
            if again or folder.facts(step, self._key(record)) is None
        }
        if not todo:
            return
        if folder.part is not None:
            raise InputError(
                "The views of the panoramas are not there yet: first the command without --step "
                "and --shard, with --stop-after frames."
            )

        def make() -> None:
            for step, record in todo.items():
                with folder.making(step, self._key(record), large=True) as made:
                    _write(record, made.path / FOLDER)

        with folder:
            folder.go([Step("frames", make)])

    def write(self, root: Path) -> None:
        """Write the views to a folder that is nobody's."""
        for record in self.found:
            _write(record, root)

    def _key(self, record: ImageRecord) -> str:
        return digest([record.name, NUM_VIEWS])

    def images(self, root: Path, *, known: Mapping[str, ImageRecord]) -> ImageSet:
        """The images with views in the place of panoramas."""
        gone = {record.name for record in self.found}
        names = {view: record for record in self.found for view in view_names(record)}
        views = image_module.scan(root, names=list(names), min_size=1, known=known)
        records = [
            dataclasses.replace(
                view, video=names[view.name].video, exif=Exif(gps=names[view.name].exif.gps)
            )
            for view in views
        ]
        others = [record for record in self.image_set if record.name not in gone]
        return ImageSet(
            root=root,
            images=tuple(sorted([*others, *records], key=lambda record: record.name)),
            rejected=(*self.image_set.rejected, *views.rejected),
        )


def _write(record: ImageRecord, root: Path) -> None:
    panorama = read_rgb(record)
    for number, name in enumerate(view_names(record)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render_view(panorama, number)).save(path, quality=95, subsampling=0)


def rigs_of_views(names: Iterable[str]) -> list[RigCamera]:
    """The rigs that views of these names belong to, one for each size."""
    views = {(int(found[1]), int(found[2])) for name in names if (found := _VIEW.match(name))}
    cameras = []
    for side, number in sorted(views):
        x, y, z, w = scipy.spatial.transform.Rotation.from_matrix(turn(number)).as_quat().tolist()
        place = (w, x, y, z, 0.0, 0.0, 0.0)
        sensor = RigSensor(
            rig=-side, prefix=_prefix(side, number), cam_from_rig=place if number else None
        )
        cameras.append(RigCamera(sensor=sensor, intrinsics=("PINHOLE", (side / 2,) * 4)))
    return cameras


def poses_text(poses: Mapping[str, Pose]) -> str:
    """Lines ``name qw qx qy qz tx ty tz`` (world to panorama) of the panoramas of a model."""
    lines = []
    for name, (rotation, shift) in sorted(poses.items()):
        found = _VIEW.match(name)
        if found and found[2] == "0":
            x, y, z, w = scipy.spatial.transform.Rotation.from_matrix(rotation).as_quat()
            numbers = " ".join(f"{value:.12g}" for value in (w, x, y, z, *shift))
            lines.append(f"{name[found.end() :]} {numbers}\n")
    return "".join(lines)
