"""A scene of points, the cameras that see it, and a matcher that knows it; for subprocesses too."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import forked
import numpy as np
import torch
from PIL import Image

from gim_hloc import matchers
from gim_hloc.matchers.sparse import encode_network_keypoints
from gim_hloc.types import ImageOptions, MatcherInfo, Matches

SIZE = (64, 48)  # (width, height), px
K = np.array([[60.0, 0, 31.5], [0, 61.0, 23.5], [0, 0, 1]])  # of images of that size
POINTS = np.random.default_rng(0).uniform([-2, -1.5, 4], [2, 1.5, 8], (200, 3))
PLANE = POINTS * [1, 1, 0] + [0, 0, 6]


def pose(i: int) -> np.ndarray:
    """World to camera i, (4, 4): a slow walk to the right with turns."""
    angle = 0.06 * i
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)],
    ]  # fmt: skip
    matrix[:3, 3] = (-0.3 * i, 0.02 * i * i, 0.05 * i)
    return matrix


def relative(i: int, j: int) -> np.ndarray:
    return pose(j) @ np.linalg.inv(pose(i))


def calibration(size: tuple[int, int]) -> np.ndarray:
    """K of images of a size; all show the same."""
    x, y = np.array(size) / SIZE
    return np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]]) @ K


def project(i: int, points: np.ndarray = POINTS, size: tuple[int, int] = SIZE) -> np.ndarray:
    pixels = (points @ pose(i)[:3, :3].T + pose(i)[:3, 3]) @ calibration(size).T
    return pixels[:, :2] / pixels[:, 2:]


class Oracle:
    """Knows where the points are in an image as it is shown, turned, resized or padded.

    The number of the camera ends the image's name. What it is asked is kept on the class.
    """

    encoded: ClassVar[list[str]] = []
    matched: ClassVar[list[tuple[str, str]]] = []
    shown: ClassVar[dict[str, tuple[int, int]]] = {}
    scene = POINTS
    stop_after: int | None = None  # pairs after which it is interrupted
    poison: str = ""  # image on which it fails
    error: Exception = ValueError("poisoned")

    def __init__(self, name: str, delay: float = 0.0) -> None:
        self.info = matchers.describe(name)
        self.image_options = ImageOptions(max_size=32)
        self.device = torch.device("cpu")
        self.delay = delay

    def encode_settings(self) -> dict[str, Any]:
        return {"matcher": self.info.name}

    match_settings = encode_settings

    def encode(self, image: Any) -> Any:
        self.encoded.append(image.name)
        self.shown[image.name] = image.network_size
        found = re.fullmatch(r"(.*?)( turned by (\d+) degrees)?", image.name)
        assert found is not None
        camera = int(re.findall(r"\d+", Path(found[1]).stem)[-1])
        width, height = image.size
        xy = project(camera, self.scene, image.size)
        for _ in range(int(found[3] or 0) // 90):  # a quarter turn counter-clockwise
            xy = np.column_stack([xy[:, 1], width - 1 - xy[:, 0]])
            width, height = height, width
        inside = image.network_size
        if image.mask is not None:
            inside = (int(image.mask[0].sum()), int(image.mask[:, 0].sum()))
        xy = (xy + 0.5) * (np.array(inside) / (width, height)) - 0.5
        return encode_network_keypoints(
            image, torch.from_numpy(xy).float(), torch.zeros(len(xy), 1), torch.ones(len(xy))
        )

    def match_batch(self, pairs: Any) -> list[Matches]:
        results = []
        for a, b in pairs:
            if self.stop_after is not None and len(self.matched) >= self.stop_after:
                raise KeyboardInterrupt
            if self.poison and self.poison in (a.name, b.name):
                raise self.error
            time.sleep(self.delay)
            self.matched.append((a.name, b.name))
            rows = torch.arange(len(a)).repeat(2, 1).T
            results.append(Matches.from_indices(a, b, rows, torch.ones(len(a))))
        return results


def register(
    name: str, *, kind: Literal["sparse", "semidense", "dense"] = "sparse", delay: float = 0.0
) -> None:
    """Make a matcher known under a name; a name is registered once."""
    if name in matchers.names():
        return
    info = MatcherInfo(
        name=name, kind=kind, checkpoint=(), licence="MIT", commercial=True, colour="rgb",
        summary="knows the answer",
    )  # fmt: skip
    matchers.register(name, lambda *, quality, device: Oracle(name, delay), info)


def fresh(monkeypatch: Any, name: str) -> type[Oracle]:
    """The matcher under a name, with nothing asked yet."""
    register(name)
    for field, value in (("encoded", []), ("matched", []), ("shown", {}), ("scene", POINTS)):
        monkeypatch.setattr(Oracle, field, value)
    return Oracle


def numbers(*matrices: np.ndarray) -> str:
    return " ".join(repr(float(v)) for matrix in matrices for v in matrix.ravel())


def write_set(
    root: Path,
    folder: str,
    *,
    separator: str = "_",
    suffix: str = ".jpg",
    size: tuple[int, int] = SIZE,
    images: int = 6,
    scenes: str = "a",
) -> Path:
    """Write all pairs of scenes into ``root/zeb/<folder>``; returns the root."""
    path = root / "zeb" / folder
    path.mkdir(parents=True)
    K = calibration(size)
    for scene in scenes:
        for i in range(images):
            Image.new("RGB", size, (20 * i, 9, 9)).save(path / f"{scene}{separator}{i}.png")
            for j in range(i + 1, images):
                label = path / f"{scene}{separator}{i}{separator}{j}.txt"
                line = f"{i}{suffix} {j}{suffix} 0.5 0.5 {numbers(K, K, relative(i, j))}\n"
                label.write_text(line)
    return root


def run_and_kill(function: Callable[..., Any], *arguments: Any, out: Path) -> None:
    """Call a function in a process of its own, killed when it has kept the matches of two pairs."""
    process = forked.start(function, *arguments)
    try:
        end = time.monotonic() + 120
        while sum(_entries(path) for path in out.glob("predictions/*.db")) < 2:
            assert process.exitcode is None, "the run ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _entries(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            return int(database.execute("SELECT COUNT(*) FROM entries").fetchone()[0])
        except sqlite3.OperationalError:  # not made yet
            return 0
