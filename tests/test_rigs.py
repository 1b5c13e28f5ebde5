"""Rigs of known geometry, through mapping, refinement, localisation, extension and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_matcher
import numpy as np
import pycolmap
import pytest
import test_cascade  # its matchers, one of which forgets
from synthetic import (
    INTRINSICS,
    Scene,
    camera_errors,
    make_rig_scene,
    record,
    write_cameras,
)

import gim_hloc
from gim_hloc import colmap
from gim_hloc.errors import InputError
from gim_hloc.options import CameraOptions
from gim_hloc.pipelines import cascade
from gim_hloc.pipelines.reconstruct import ReconstructResult

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")
SCENE, CONFIGURATION = make_rig_scene()
BASELINE = float(np.linalg.norm(CONFIGURATION[0]["cameras"][1]["cam_from_rig_translation"]))  # type: ignore[index]


@pytest.fixture(autouse=True)
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(fake_matcher, "SCENE", SCENE)
    return SCENE


@pytest.fixture
def rig(tmp_path: Path) -> Path:
    path = tmp_path / "rig_config.json"
    path.write_text(json.dumps(CONFIGURATION))
    return path


def run(images: Path, output: Path, **options: Any) -> ReconstructResult:
    fixed = {
        "matcher": "fake", "rescue": "none", "deterministic": True, "intrinsics": INTRINSICS,
        "refine_keypoints": False,
    }  # fmt: skip
    return gim_hloc.reconstruct(images, output, progress=False, **{**fixed, **options})


def check(model: Any, moments: int) -> None:
    """All images are of frames of a rig of the given geometry, which gives the model its scale."""
    assert model.num_reg_frames() == moments
    assert model.num_reg_images() == 2 * moments
    (rig,) = (rig for rig in model.rigs.values() if rig.num_sensors() == 2)
    (sensor,) = rig.non_ref_sensors.values()
    given = CONFIGURATION[0]["cameras"][1]  # type: ignore[index]
    np.testing.assert_allclose(sensor.translation, given["cam_from_rig_translation"], atol=1e-6)
    poses = colmap.poses_of(model)
    centres = {name: -r.T @ t for name, (r, t) in poses.items()}
    for n in range(moments):
        gap = np.linalg.norm(centres[f"left/{n}.jpg"] - centres[f"right/{n}.jpg"])
        assert gap == pytest.approx(BASELINE, abs=1e-6)
    ends = [f"left/{n}.jpg" for n in (0, moments - 1)]
    true = np.linalg.norm(np.subtract(*(-SCENE.poses[n][0].T @ SCENE.poses[n][1] for n in ends)))
    assert np.linalg.norm(np.subtract(*(centres[n] for n in ends))) == pytest.approx(true, rel=1e-3)
    rotation, centre = camera_errors(poses, SCENE.poses)
    assert rotation < 0.01
    assert centre < 1e-3


@pytest.mark.parametrize("mapper", ["incremental", "global", "hierarchical"])
def test_a_rig_is_kept_and_gives_the_scale(rig: Path, tmp_path: Path, mapper: Any) -> None:
    images = fake_matcher.write_images(tmp_path / "images", SCENE)
    result = run(images, tmp_path / "out", rig=rig, mapper=mapper, export=("3dgs", "txt"))
    check(result.model(), 6)
    handed = pycolmap.Reconstruction(tmp_path / "out/export/0/3dgs/sparse/0")
    assert (handed.num_reg_images(), handed.num_reg_frames()) == (12, 6)
    assert "left/" in (tmp_path / "out/export/0/images.txt").read_text()
    fake_matcher.FakeMatcher.calls.clear()
    run(images, tmp_path / "out", rig=rig, mapper=mapper, stop_after="map")
    assert fake_matcher.FakeMatcher.calls == []


def test_lost_moments_are_rescued_as_frames_of_the_rig(
    rig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ["left/3.jpg", "right/3.jpg"]
    monkeypatch.setattr(test_cascade, "LOST", lost)
    monkeypatch.setattr(cascade, "STRONGEST", ("fake_strong",))
    images = fake_matcher.write_images(tmp_path / "images", SCENE)
    result = run(images, tmp_path / "out", rig=rig, matcher="fake_forgetful", rescue="auto")
    assert result.report["rescue"]["images"] == lost
    check(result.model(), 6)


def test_localisation_and_extension_keep_rigs(rig: Path, tmp_path: Path) -> None:
    images = fake_matcher.write_images(tmp_path / "images", SCENE)
    held_back = tmp_path / "new"
    for name in ("left/5.jpg", "right/5.jpg"):
        (held_back / name).parent.mkdir(parents=True)
        (images / name).rename(held_back / name)
    run(images, tmp_path / "map", rig=rig)
    gim_hloc.localize(tmp_path / "map", held_back, tmp_path / "located", progress=False)
    located = colmap.read_model(tmp_path / "located/sparse")
    assert (located.num_reg_images(), located.num_reg_frames()) == (12, 7)
    assert camera_errors(colmap.poses_of(located), SCENE.poses)[0] < 0.01
    grown = run(held_back, tmp_path / "grown", extend=tmp_path / "map")
    check(grown.model(), 6)


def test_known_poses_become_frames(rig: Path, tmp_path: Path) -> None:
    images = fake_matcher.write_images(tmp_path / "images", SCENE)
    known = write_cameras(SCENE.poses, tmp_path / "known")
    model = run(images, tmp_path / "out", rig=rig, model=known).model()
    check(model, 6)
    for image in model.images.values():  # the poses are the given ones, not just alike
        true = np.column_stack(SCENE.poses[image.name])
        np.testing.assert_allclose(image.cam_from_world().matrix(), true, atol=1e-6)


def test_cameras_of_a_rig_are_its_prefixes(rig: Path, tmp_path: Path) -> None:
    configuration = json.loads(rig.read_text())
    configuration[0]["cameras"][0] |= {
        "camera_model_name": "PINHOLE", "camera_params": [700, 700, 400, 300],
    }  # fmt: skip
    rig.write_text(json.dumps(configuration))
    records = [record(name) for name in (*SCENE.names, "other.jpg")]
    cameras, _ = colmap.assign_cameras(records, CameraOptions(rig=rig))
    kinds = {spec.names[0]: (spec.given, len(spec.names), spec.rig is not None) for spec in cameras}
    assert kinds == {
        "left/0.jpg": (True, 6, True),
        "right/0.jpg": (False, 6, True),
        "other.jpg": (False, 1, False),
    }
    assert [colmap.CameraSpec.of_facts(json.loads(json.dumps(c.to_facts()))) for c in cameras] == (
        cameras
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "no json", "is no rig configuration"),
        (lambda c: [{"cameras": 3}], "is no rig configuration"),
        (lambda c: [{"cameras": c[0]["cameras"][1:]}], "one is the reference"),
        (lambda c: [{"cameras": [{"image_prefix": "left/"}, {"image_prefix": "right/"}]}],
         "without are 'left/', 'right/'"),
        (lambda c: [{"cameras": [*c[0]["cameras"], c[0]["cameras"][1]]}], "two cameras have"),
        (lambda c: [{"cameras": [*c[0]["cameras"], {**c[0]["cameras"][1], "image_prefix": "up/"}]}],
         "begins with 'up/'"),
        (lambda c: [{"cameras": [{**c[0]["cameras"][0], "image_prefix": "left/1"},
                                 {**c[0]["cameras"][1], "image_prefix": "right/0"}]}],
         None),
    ],
    ids=["text", "number", "no reference", "no geometry", "twice", "no image", "moments"],
)  # fmt: skip
def test_what_is_no_rig_is_refused(rig: Path, change: Any, message: str | None) -> None:
    changed = change(json.loads(rig.read_text()))
    rig.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    records = [record(name) for name in SCENE.names]
    if message is None:  # left/1.jpg and right/0.jpg are called alike after these prefixes
        colmap.assign_cameras(records, CameraOptions(rig=rig))
        records = [one for one in records if one.name != "right/0.jpg"] + [record("right/0 b.jpg")]
        message = "no two images are of one moment"
    with pytest.raises(InputError, match=message):
        colmap.assign_cameras(records, CameraOptions(rig=rig))
