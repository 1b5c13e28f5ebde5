"""Matchers that users write: through every command, in other processes, and what goes wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from video_files import write_video

from gim_hloc import images, matchers
from gim_hloc.cli import localize, pairs, reconstruct, video, zeb
from gim_hloc.cli import match as match_command
from gim_hloc.colmap import read_model
from gim_hloc.errors import GimError, InputError
from gim_hloc.hloc_plugin import match_dense
from gim_hloc.hloc_plugin.models import ExtractorModel, SparseMatcherModel
from gim_hloc.matchers import check, registry
from gim_hloc.store import read_encoding
from gim_hloc.types import SparseEncoding

HERE = Path(__file__).parent
WIDTH, HEIGHT, FOCAL = 320, 240, 220.0
STEP = 9.0  # px that the far plane moves from one image to the next; the near one moves twice it
BOTH = ["own_matcher:Orb", "own_flow.py:Flow"]
CAMERA = ["--intrinsics", f"SIMPLE_PINHOLE,{FOCAL},{WIDTH / 2},{HEIGHT / 2}"]
TWO = ["--workers", "2"]
MODULE = """
from gim_hloc.matchers import MatcherBase, MatcherInfo
class Mine(MatcherBase):
    info = MatcherInfo(name="mine", kind="sparse")
    def encode(self, image):
        raise ValueError("no answer")
    def match(self, a, b):
        return 1 / 0
class Other: ...
"""


def view(step: float) -> np.ndarray:
    """(H, W, 3) uint8: a near plane before a far one, seen from a place further to the right."""
    far, near = check.scene(), np.roll(check.scene()[::-1], 100, axis=1)
    moved = [
        cv2.warpAffine(plane, np.array([[1.0, 0, -shift * step], [0, 1, 0]]), (WIDTH, HEIGHT))
        for plane, shift in ((far[100:], STEP), (near[50:], 2 * STEP))
    ]
    column = 120 - round(2 * STEP * step)
    return np.concatenate([moved[0][:, : column + 40], moved[1][:, column + 40 :]], axis=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a user works: his matchers, a folder of images, another one of a query."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(HERE.parent / "examples" / "own_matcher.py", folder)
    shutil.copy(HERE / "own_flow.py", folder)
    for name, steps in (("photos", range(5)), ("queries", [2.5])):
        (folder / name).mkdir()
        for step in steps:
            Image.fromarray(view(step)).save(folder / name / f"{step}.png")
    before, path = os.getcwd(), list(sys.path)
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = path
    registry._entries.pop("orb", None)


@pytest.fixture(scope="module", params=BOTH)
def own(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scene(place: Path, own: str) -> Path:
    """The model that two workers made of the images."""
    out = place / f"out-{own.split(':')[1]}"
    flags = [*CAMERA, *TWO, "--map.init-min-tri-angle", "4", "--anchors", "own_matcher:Orb"]
    assert reconstruct.main(["photos", str(out), "--matcher", own, *flags]) == 0
    return out


def test_a_model(scene: Path, own: str) -> None:
    model = read_model(scene / "sparse" / "0")
    assert model.num_reg_images() == 5
    assert model.compute_mean_reprojection_error() < 1
    xyz = np.array([point.xyz for point in model.points3D.values()])
    pose = next(iter(model.images.values())).cam_from_world()
    depth = (xyz @ pose.rotation.matrix().T + pose.translation)[:, 2]
    near, far = np.quantile(depth, (0.1, 0.9))
    assert far / near == pytest.approx(2, rel=0.1)
    encoding = read_encoding(scene / ("features.h5" if "Orb" in own else "anchors.h5"), "0.png")
    assert encoding.descriptors.dtype == torch.uint8  # bits stay bits
