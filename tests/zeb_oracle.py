"""Matchers that know the answer, and a set of ZEB for them; also imported by subprocesses."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from zeb_scene import turned

from gim_hloc import matchers
from gim_hloc.matchers.sparse import make_encoding
from gim_hloc.types import ImageOptions, MatcherInfo, Matches

POINTS = np.random.default_rng(3).uniform([-2, -1.2, 4], [2, 1.2, 8], (150, 3))


def pose(i: int) -> np.ndarray:
    """World to camera i: steps to the right with turns."""
    return turned(0.05 * i, (-0.35 * i, 0.03 * i, 0.04 * i))


def calibration(size: tuple[int, int]) -> np.ndarray:
    width, height = size
    return np.array(
        [[0.9 * width, 0, (width - 1) / 2], [0, 0.9 * width, (height - 1) / 2], [0, 0, 1]]
    )


def project(i: int, size: tuple[int, int]) -> np.ndarray:
    pixels = (POINTS @ pose(i)[:3, :3].T + pose(i)[:3, 3]) @ calibration(size).T
    return pixels[:, :2] / pixels[:, 2:]


@dataclass(frozen=True, kw_only=True)
class Options:
    delay: float = 0.0


class Oracle:
    """Exact projections as keypoints."""

    def __init__(self, name: str, delay: float) -> None:
        self.info = matchers.describe(name)
        self.options = Options()
        self.image_options = ImageOptions(max_size=None)
        self.device = torch.device("cpu")
        self.delay = delay

    def encode_settings(self) -> dict[str, Any]:
        return {"matcher": self.info.name}

    def match_settings(self) -> dict[str, Any]:
        return {}

    def encode(self, image: Any) -> Any:
        keypoints = torch.from_numpy(project(int(Path(image.name).stem[-1]), image.size)).float()
        return make_encoding(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            keypoints=keypoints,
            descriptors=torch.zeros(len(keypoints), 1),
            scores=torch.ones(len(keypoints)),
        )

    def match_batch(self, pairs: Any) -> list[Matches]:
        results = []
        for a, b in pairs:
            time.sleep(self.delay)
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
        default_size=800, summary="knows the answer",
    )  # fmt: skip
    matchers.register(name, lambda *, quality, device: Oracle(name, delay), info)


def write_set(
    root: Path, folder: str, *, separator: str, suffix: str, size: tuple[int, int], images: int
) -> None:
    """Write all pairs of a scene ``a`` into ``root/zeb/<folder>``."""
    path = root / "zeb" / folder
    path.mkdir(parents=True)
    K = " ".join(repr(float(v)) for v in calibration(size).ravel())
    for i in range(images):
        Image.new("RGB", size, (20 * i, 9, 9)).save(path / f"a{separator}{i}.png")
        for j in range(i + 1, images):
            truth = pose(j) @ np.linalg.inv(pose(i))
            text = " ".join(repr(float(v)) for v in truth.ravel())
            label = path / f"a{separator}{i}{separator}{j}.txt"
            label.write_text(f"{i}{suffix} {j}{suffix} 0.5 0.5 {K} {K} {text}\n")


def run_and_kill(code: str, *arguments: str, out: Path) -> None:
    """Run Python code as a process of its own, killed when it has kept the matches of two pairs.

    Args:
        code: the first argument that it gets is the folder of this module.
        arguments: further ones.
        out: folder of its results.
    """
    process = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), *arguments])
    try:
        end = time.monotonic() + 120
        while sum(_entries(path) for path in out.glob("predictions/*.db")) < 2:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def _entries(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            return int(database.execute("SELECT COUNT(*) FROM entries").fetchone()[0])
        except sqlite3.OperationalError:  # not made yet
            return 0
