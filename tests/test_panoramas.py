"""Panoramas: their views, the rig of these, and poses of the panoramas against exact ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fake_matcher
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from synthetic import Scene, camera_errors

import gim_hloc
from gim_hloc import images
from gim_hloc.pipelines import panoramas
from gim_hloc.pipelines.panoramas import NUM_VIEWS, render_view, turn, view_side

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")
WIDTH = 512
XMP = (
    b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description "
    b"xmlns:GPano='http://ns.google.com/photos/1.0/panorama/' "
    b"GPano:ProjectionType='equirectangular'/></x:xmpmeta>"
)


def write_panorama(path: Path, seed: int = 0, *, called: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (WIDTH // 2, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(path, **({"comment": XMP} if called else {}))
    return path


def test_views_show_what_lies_in_their_direction() -> None:
    """Colours of this panorama are directions, so that each pixel of a view says where it looks."""
    longitude = ((np.arange(WIDTH) + 0.5) / WIDTH - 0.5) * 2 * np.pi
    latitude = ((np.arange(WIDTH // 2) + 0.5) / (WIDTH // 2) - 0.5) * np.pi
    x = np.cos(latitude)[:, None] * np.sin(longitude)
    z = np.cos(latitude)[:, None] * np.cos(longitude)
    y = np.broadcast_to(np.sin(latitude)[:, None], x.shape)
    colours = np.rint((np.stack([x, y, z], -1) + 1) * 127).astype(np.uint8)
    side = view_side(WIDTH)
    for number in range(NUM_VIEWS):
        seen = render_view(colours, number)
        assert seen.shape == (side, side, 3)
        plane = (np.arange(side) + 0.5) / (side / 2) - 1
        rays = np.stack([*np.meshgrid(plane, plane), np.ones((side, side))], -1)
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        np.testing.assert_allclose(seen, (rays @ turn(number) + 1) * 127, atol=2)


def make_panoramas(count: int, points: int = 900) -> tuple[Scene, dict[str, Any]]:
    """What the fake matcher sees in views of panoramas along a path, and their poses."""
    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(points, 3)) * [1, 0.3, 1]
    xyz *= rng.uniform(3, 6, (points, 1)) / np.linalg.norm(xyz, axis=1, keepdims=True)
    side = view_side(WIDTH)
    scene, truth = Scene(), {}
    for n in range(count):
        rotation = Rotation.from_euler("yx", [25 * n, 3 * n], degrees=True).as_matrix()
        shift = -rotation @ np.array([0.9 * n - 1.5, 0.1 * (n % 2), 0.4 * np.sin(n)])
        truth[f"pano{n}.jpg"] = (rotation, shift)
        for number in range(NUM_VIEWS):
            name = f"views/{side}/{number}/pano{n}.jpg"
            pose = turn(number) @ rotation, turn(number) @ shift
            scene.see(name, pose, xyz, focal=side / 2, size=(side, side))
    return scene, truth


def run(source: Path, output: Path, **options: Any) -> Any:
    fixed = {"matcher": "fake", "rescue": "none", "deterministic": True, "refine_keypoints": False}
    return gim_hloc.reconstruct(source, output, progress=False, **{**fixed, **options})


def test_panoramas_have_poses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, truth = make_panoramas(4)
    monkeypatch.setattr(fake_matcher, "SCENE", scene)
    folder, out = tmp_path / "in", tmp_path / "out"
    for n, name in enumerate(truth):
        write_panorama(folder / name, n)
    # Pairs of one view each: what joins the views is the rig alone.
    model = run(folder, out, pairs="sequential").model()
    assert sorted(os.listdir(folder)) == sorted(truth)
    assert (model.num_reg_frames(), model.num_reg_images()) == (4, 4 * NUM_VIEWS)
    found = {}
    for line in (out / "sparse/0/panoramas.txt").read_text().splitlines():
        name, w, x, y, z, *shift = line.split()
        turned = Rotation.from_quat([float(v) for v in (x, y, z, w)]).as_matrix()
        found[name] = turned, np.array([float(v) for v in shift])
    assert found.keys() == truth.keys()
    rotation, centre = camera_errors(found, truth)
    assert rotation < 0.02
    assert centre < 2e-3


def test_what_is_taken_for_a_panorama(tmp_path: Path) -> None:
    write_panorama(tmp_path / "called.jpg")
    write_panorama(tmp_path / "plain.jpg", 1, called=False)
    Image.new("RGB", (300, 200)).save(tmp_path / "photo.jpg", comment=XMP)
    records = images.scan(tmp_path)
    taken = {
        mode: [r.name for r in records if panoramas.is_panorama(r, mode)]  # type: ignore[arg-type]
        for mode in ("auto", "all", "none")
    }
    assert taken == {"auto": ["called.jpg"], "all": ["called.jpg", "plain.jpg"], "none": []}


def test_views_are_made_once_and_go_with_their_panorama(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for n in range(2):
        write_panorama(folder / f"sub/pano{n}.jpg", n)
    write_panorama(folder / "photo.jpg", 5, called=False)
    run(folder, out, stop_after="pairs")
    views = sorted((out / "images").rglob("pano*.jpg"))
    assert len(views) == 2 * NUM_VIEWS
    assert (out / "images/photo.jpg").samefile(folder / "photo.jpg")
    before = [path.stat().st_mtime_ns for path in views]
    run(folder, out, stop_after="pairs")
    assert before == [path.stat().st_mtime_ns for path in views]
    (folder / "sub/pano1.jpg").unlink()
    run(folder, out, stop_after="pairs")
    assert {path.name for path in (out / "images").rglob("pano*.jpg")} == {"pano0.jpg"}
