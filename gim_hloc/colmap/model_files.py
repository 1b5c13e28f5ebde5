"""COLMAP's model files, read and checked before COLMAP does: it trusts every count in them."""

from __future__ import annotations

import mmap
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pycolmap

from gim_hloc.errors import InputError
from gim_hloc.files import read_text
from gim_hloc.poses import check_quaternion

Row = tuple[str, int, int, tuple[float, ...]]  # model, width, height, parameters


class _Records:
    """A binary file of COLMAP, read record by record; ``InputError`` where it ends too early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0
        self.size = path.stat().st_size
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def __enter__(self) -> _Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(self.data, mmap.mmap):
            self.data.close()
        if kind in (struct.error, OverflowError):
            raise self.cut() from None

    def cut(self) -> InputError:
        return InputError(
            f"{self.path} is cut off or damaged: it ends at byte {self.size}, in the middle "
            "of what it declares. Write or fetch it again."
        )

    def take(self, form: struct.Struct) -> tuple[float, ...]:
        values = form.unpack_from(self.data, self.at)
        self.at += form.size
        return values

    def count(self) -> int:
        return int(self.take(_COUNT)[0])

    def text(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise self.cut()
        start, self.at = self.at, end + 1
        return bytes(self.data[start:end]).decode("utf-8", "surrogateescape")

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > self.size:
            raise self.cut()


_AT_ONCE = 1 << 16  # points copied
_COUNT = struct.Struct("<Q")
_CAMERA = struct.Struct("<IiQQ")  # id, model, width, height
_IMAGE = struct.Struct("<I7dI")  # id, quaternion w x y z, translation, camera
_POINT = struct.Struct("<Q3d3Bd")  # id, position, colour, error; then the track
_SENSOR = struct.Struct("<II")  # type, id
_RIG = struct.Struct("<II")  # id, sensors
_FRAME = struct.Struct("<II7dI")  # id, rig, quaternion w x y z, translation, images


def binary_cameras(path: Path) -> dict[int, Row]:
    """Cameras of a ``cameras.bin`` by id; ``InputError`` if it is cut or names no model."""
    models = {int(v): (n, v) for n, v in pycolmap.CameraModelId.__members__.items() if int(v) >= 0}
    found: dict[int, Row] = {}
    with _Records(path) as records:
        for _ in range(records.count()):
            camera_id, number, width, height = (int(v) for v in records.take(_CAMERA))
            if number not in models:
                raise InputError(f"{path}: camera {camera_id} has the unknown model {number}.")
            name, model = models[number]
            size = len(pycolmap.Camera.create_from_model_id(0, model, 1.0, 2, 2).params)
            found[camera_id] = (name, width, height, records.take(struct.Struct(f"<{size}d")))
    return found


def image_cameras(model: Path) -> dict[str, int]:
    """Image name -> camera id, from images.bin or images.txt in a folder; empty without one."""
    if (model / "images.bin").is_file():
        return {name: camera for _, name, camera, _ in _binary_images(model / "images.bin")}
    if (model / "images.txt").is_file():
        return {fields[9]: int(fields[8]) for fields, _ in image_lines(model / "images.txt")}
    return {}


def _binary_images(path: Path) -> Iterator[tuple[int, str, int, tuple[float, ...]]]:
    """Id, name, camera and quaternion of the images of an ``images.bin``."""
    with _Records(path) as records:
        for _ in range(records.count()):
            image_id, *pose, camera = records.take(_IMAGE)
            name = records.text()
            records.skip(24 * records.count())  # x, y, point of each keypoint
            yield int(image_id), name, int(camera), tuple(pose[:4])


def point_rows(path: Path) -> np.ndarray:
    """Points (M,) of a ``points3D.bin``: ``id``, ``xyz``, ``rgb``, ``error``, ``length``."""
    layout = [
        ("id", "<i8"),
        ("xyz", "<f8", 3),
        ("rgb", "u1", 3),
        ("error", "<f8"),
        ("length", "<i8"),
    ]
    with _Records(path) as records:
        starts = np.array(list(_starts(records)), np.int64)
        data = np.frombuffer(records.data, np.uint8)
        rows = np.empty(len(starts), layout)
        bytes_of = rows.view(np.uint8).reshape(len(rows), rows.itemsize)
        for first in range(0, len(rows), _AT_ONCE):
            chunk = starts[first : first + _AT_ONCE, None]
            bytes_of[first : first + _AT_ONCE] = data[chunk + np.arange(rows.itemsize)]
        del data  # else the file cannot be closed
    return rows


def _starts(records: _Records) -> Iterator[int]:
    """Where the points of a ``points3D.bin`` begin."""
    at = _COUNT.size
    for _ in range(records.count()):
        yield at
        (track,) = _COUNT.unpack_from(records.data, at + _POINT.size)
        at += _POINT.size + _COUNT.size + 8 * track
    records.at = 0
    records.skip(at)


def keypoint_rows(path: Path) -> dict[int, np.ndarray]:
    """Keypoints by image id of an ``images.bin``: (N,) with ``xy`` and ``point``, -1 for none."""
    layout = np.dtype([("xy", "<f8", 2), ("point", "<i8")])
    found = {}
    with _Records(path) as records:
        for _ in range(records.count()):
            image_id = int(records.take(_IMAGE)[0])
            records.text()
            count = records.count()
            start = records.at
            records.skip(layout.itemsize * count)
            found[image_id] = np.frombuffer(records.data[start : records.at], layout)
    return found


def image_lines(path: Path) -> list[tuple[list[str], str | None]]:
    """Ten fields of each image of an ``images.txt`` (names may hold blanks), and the line below.

    COLMAP writes a line of observations below each image, which may be empty; other programs leave
    empty ones out, which is None here.

    Raises:
        InputError: a line is neither, or a quaternion is none.
    """
    found: list[tuple[list[str], str | None]] = []
    below = False  # whether the line can be that of the last image's observations
    text = read_text(path, "list of images").removesuffix("\n")  # which ends a line, and is none
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith("#"):
            continue
        if not line or (below and _is_observations(line)):
            if below:
                found[-1] = (found[-1][0], line)
            below = False
            continue
        fields = line.split(maxsplit=9)
        where = f"{path}, line {number}"
        try:
            int(fields[0]), int(fields[8])
            quaternion = [float(value) for value in fields[1:5]]
            np.array(fields[5:8], dtype=np.float64)
            fields[9]
        except (IndexError, ValueError):
            raise InputError(
                f"{where}: expected 'IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME' or observations "
                "'X Y POINT3D_ID ...'."
            ) from None
        check_quaternion(quaternion, where)
        found.append((fields, None))
        below = True
    return found


def _is_observations(line: str) -> bool:
    fields = line.split()
    if len(fields) % 3:
        return False
    try:
        np.array(fields[:9], dtype=np.float64)
        int(fields[2])
    except ValueError:
        return False
    return True


def check_model(folder: Path) -> None:
    """Walk the records of a model's binary files; ``InputError`` where one is cut off.

    COLMAP reads on where a file ends, some without end.
    """
    binary_cameras(folder / "cameras.bin")
    frames = folder / "frames.bin"
    for image_id, name, _, quaternion in _binary_images(folder / "images.bin"):
        if not frames.is_file():
            check_quaternion(quaternion, f"{folder / 'images.bin'}, image {image_id} ({name})")
    if (folder / "rigs.bin").is_file():
        with _Records(folder / "rigs.bin") as records:
            for _ in range(records.count()):
                sensors = int(records.take(_RIG)[1])
                for number in range(sensors):
                    records.skip(_SENSOR.size)
                    if number and int(records.take(struct.Struct("<B"))[0]):  # the first has none
                        records.skip(56)
    if frames.is_file():
        with _Records(frames) as records:
            for _ in range(records.count()):
                frame_id, _, *pose, images = records.take(_FRAME)
                check_quaternion(pose[:4], f"{frames}, frame {int(frame_id)}")
                records.skip(16 * int(images))
    with _Records(folder / "points3D.bin") as records:
        deque(_starts(records), maxlen=0)
