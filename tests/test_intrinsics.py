"""What the images determine of cameras that nobody gave, on scenes whose cameras are known."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from synthetic import FOCAL, HEIGHT, INTRINSICS, WIDTH, Scene, camera_errors, make_scene

from gim_hloc import colmap
from gim_hloc.colmap import CameraSpec, MapJob, mapping
from gim_hloc.options import CameraOptions, VerifyOptions

CENTRE = np.array([WIDTH / 2, HEIGHT / 2])


def zoom(scene: Scene, factors: list[float], shift: tuple[float, float] = (0.0, 0.0)) -> None:
    """Enlarge images about a point ``shift`` px off the middle, as if cropped and resized."""
    for name, factor in zip(scene.names, factors, strict=True):
        about = CENTRE + (shift if factor != 1 else (0.0, 0.0))
        xy = (scene.keypoints[name] + 0.5 - about) * factor + CENTRE
        inside = (xy > 0).all(1) & (xy < 2 * CENTRE).all(1)
        scene.keypoints[name] = (xy[inside] - 0.5).astype(np.float32)
        scene.points[name] = scene.points[name][inside]


def flight(*, noise_px: float = 0.3) -> Scene:
    """Twelve images straight down on flat ground, from one height."""
    rng = np.random.default_rng(0)
    ground = np.column_stack([rng.uniform(-4, 8, (1000, 2)), np.zeros(1000)])
    scene, rotation = Scene(), np.diag([1.0, -1.0, -1.0])
    for i in range(12):
        pose = rotation, -rotation @ np.array([1.5 * (i % 4), 1.5 * (i // 4), 5.0])
        scene.see(f"{i:02d}.jpg", pose, ground, noise_px=noise_px, rng=rng)
    return scene


def job_of(
    scene: Scene, folder: Path, options: CameraOptions | None = None, **exif: object
) -> MapJob:
    cameras, _ = colmap.assign_cameras(scene.records(**exif), options or CameraOptions())
    colmap.build_database(
        folder / "database.db",
        cameras=cameras,
        names=scene.names,
        keypoints=scene.keypoints.__getitem__,
        matches=scene.all_matches(),
        verify=VerifyOptions(),
    )
    return MapJob(database=folder / "database.db", cameras=cameras, threads=1)


def finish(job: MapJob, *, split: bool = True) -> tuple[MapJob, object, list[str]]:
    """Map, hold, settle: job with the cameras after all, model, notes."""
    grouped = colmap.map_scene(job, split=split)
    job, model = dataclasses.replace(job, cameras=grouped.cameras), grouped.models[0]
    colmap.hold_undetermined(model, job)
    before = {camera["id"]: camera["params"] for camera in colmap.cameras_of(model)}
    notes, _ = colmap.settle(model, job, before)
    return job, model, grouped.notes + notes


def by_focal(cameras: list[CameraSpec]) -> list[CameraSpec]:
    return sorted(cameras, key=lambda camera: camera.params[0])


def test_images_of_one_size_at_several_zooms_get_a_camera_for_each(tmp_path):
    scene = make_scene(images=9, noise_px=0.4, arc_deg=80)
    zooms = (1.0, 1.3, 1.7)  # two: the crops below
    factors = [zooms[i % 3] for i in range(9)]
    zoom(scene, factors)
    job, model, notes = finish(job_of(scene, tmp_path))
    assert "taken at 3 focal lengths" in notes[0]
    assert [camera.names for camera in by_focal(job.cameras)] == [
        [n for n, f in zip(scene.names, factors, strict=True) if f == level] for level in zooms
    ]
    for camera_id, spec in enumerate(job.cameras, 1):
        level = factors[scene.names.index(spec.names[0])]
        assert model.camera(camera_id).params[0] == pytest.approx(level * FOCAL, rel=0.01)
    assert model.num_reg_images() == 9
    assert max(camera_errors(colmap.model.poses_of(model), scene.poses)) < 0.5
    # The database says the same to whoever goes on with it.
    assert colmap.read_cameras(job.database, job.cameras) == list(job.cameras)


def test_crops_beside_the_middle_get_their_principal_point(tmp_path):
    scene = make_scene(images=8, points=1500, noise_px=0.1, arc_deg=120)
    zoom(scene, [1.0, 1.4] * 4, shift=(90.0, -50.0))
    job, model, notes = finish(job_of(scene, tmp_path))
    assert "taken at 2 focal lengths" in notes[0]
    ids = {spec.names[0]: camera_id for camera_id, spec in enumerate(job.cameras, 1)}
    whole, crop = (model.camera(ids[name]).params[:3] for name in scene.names[:2])
    assert whole == pytest.approx([FOCAL, *CENTRE], abs=3)
    assert crop == pytest.approx([1.4 * FOCAL, *(CENTRE - np.array([90, -50]) * 1.4)], abs=6)


@pytest.mark.parametrize("case", ["noise", "short baseline", "flight"])
def test_what_only_noise_tells_apart_stays_one_camera(tmp_path, case):
    scene = {
        "noise": lambda: make_scene(images=8, noise_px=1.5, arc_deg=80),
        "short baseline": lambda: make_scene(images=8, noise_px=0.7, arc_deg=12),
        "flight": lambda: flight(noise_px=0.7),
    }[case]()
    grouped = colmap.map_scene(job_of(scene, tmp_path), split=True)
    assert [camera.names for camera in grouped.cameras] == [scene.names]
    assert not [note for note in grouped.notes if "focal length" in note]


def test_cameras_are_not_parted_where_that_tears_the_model_apart(tmp_path, monkeypatch):
    scene = make_scene(images=9, noise_px=0.4, arc_deg=80)
    zoom(scene, [1.0, 1.4] * 4 + [1.0])
    judged = []

    def torn(model, notes):  # as a street of forward steps, whose focal lengths drift
        judged.append(len({model.image(i).camera_id for i in model.reg_image_ids()}))
        parts = [copy.deepcopy(model) for _ in range(judged[-1])]
        for k, part in enumerate(parts if len(parts) > 1 else []):
            frames = sorted(part.reg_frame_ids())
            colmap.checks.deregister(part, frames[:2] if k else frames[2:])
        return parts

    monkeypatch.setattr(mapping, "split_at_weak_joints", torn)
    grouped = colmap.map_scene(job_of(scene, tmp_path), split=True)
    assert set(judged) == {1, 2}
    assert [camera.names for camera in grouped.cameras] == [scene.names]
    assert colmap.read_cameras(tmp_path / "database.db", grouped.cameras) == list(grouped.cameras)


def test_cameras_that_the_user_ordered_are_not_parted(tmp_path):
    scene = make_scene(images=6, noise_px=0.4, arc_deg=80)
    zoom(scene, [1.0, 1.4] * 3)
    job = job_of(scene, tmp_path, CameraOptions(camera_mode="single"))
    assert len(colmap.map_scene(job, split=False).cameras) == 1


def test_a_well_seen_principal_point_is_found(tmp_path):
    scene = make_scene(images=10, points=800, noise_px=0.1, arc_deg=200)  # as refined keypoints
    for name in scene.names:
        scene.keypoints[name] += np.float32([12, -8])
    job = job_of(scene, tmp_path)
    mapped = colmap.map_scene(job, split=True).models[0]
    before = camera_errors(colmap.poses_of(mapped), scene.poses)
    notes, found = colmap.settle(mapped, job, {})
    assert "determine the principal point of camera 1" in notes[0]
    focal, *principal = mapped.camera(1).params[:3]
    assert focal == pytest.approx(FOCAL, abs=1)
    assert principal == pytest.approx(list(CENTRE + np.array([12, -8])), abs=3)
    after = camera_errors(colmap.poses_of(mapped), scene.poses)
    assert after[0] < 0.3 * before[0]
    row = colmap.describe_intrinsics(mapped, job, found)[1]
    assert (row["source"], row["refined"], row["principal_point_refined"]) == (
        "guessed",
        True,
        True,
    )


def test_images_that_are_not_trusted_hardly_move_the_intrinsics(tmp_path):
    scene = make_scene(images=12, points=800, noise_px=0.05, arc_deg=200)
    rng = np.random.default_rng(1)
    for name in scene.names[::4]:
        scene.keypoints[name] += rng.normal(0, 1, scene.keypoints[name].shape).astype(np.float32)
    job = job_of(scene, tmp_path)
    model = colmap.map_scene(job, split=True).models[0]
    assert not colmap.determined(model, set(), 1)[1].principal  # all observations weigh the same
    notes, _ = colmap.settle(model, job, {}, 0.25)
    assert "determine the principal point of camera 1" in notes[0]
    assert list(model.camera(1).params[:3]) == pytest.approx([FOCAL, *CENTRE], abs=1)


def test_given_intrinsics_stay(tmp_path):
    scene = make_scene(images=6, noise_px=0.2, arc_deg=80)
    for name in scene.names:
        scene.keypoints[name] += np.float32([12, -8])
    _, model, notes = finish(job_of(scene, tmp_path, CameraOptions(intrinsics=INTRINSICS)))
    assert list(model.camera(1).params) == [FOCAL, FOCAL, *CENTRE]
    assert notes == []


def test_over_flat_ground_the_focal_length_stays_at_exif(tmp_path):
    stated = 1.01 * FOCAL * 43.2666 / np.hypot(WIDTH, HEIGHT)  # mm on 35 mm film
    job, model, notes = finish(job_of(flight(), tmp_path, focal_35mm=stated))
    prior = job.cameras[0].params[0]
    assert prior == pytest.approx(1.01 * FOCAL, rel=1e-3)
    found = colmap.determined(model, set(), 1)
    assert not found[1].focal
    assert model.camera(1).params[0] == prior
    assert list(model.camera(1).params[1:3]) == list(CENTRE)
    assert "do not determine the focal length of camera 1" in notes[-1]
    assert notes[-1].endswith("it was held where EXIF has it.")
    row = colmap.describe_intrinsics(model, job, found)[1]
    assert (row["source"], row["refined"], row["principal_point_refined"]) == ("EXIF", False, False)
    assert row.get("focal_stderr_px", np.inf) > 5


def test_standard_errors_are_those_of_random_halves(tmp_path):
    scene = make_scene(images=8, points=300, noise_px=0.5, arc_deg=60)
    model = colmap.map_scene(job_of(scene, tmp_path), split=False).models[0]
    errors = colmap.determined(model, set(), 1)[1]
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(4):
        ids = rng.permutation(sorted(model.point3D_ids()))
        found = []
        for part in (ids[::2], ids[1::2]):
            some = copy.deepcopy(model)
            for point_id in part:
                some.delete_point3D(int(point_id))
            colmap.improve.adjuster(some, set(), 1, principal_point=True).solve()
            found.append(np.array(some.camera(1).params[:3]))
        differences.append((found[0] - found[1]) / 2)
    halves = np.sqrt(np.mean(np.square(differences), axis=0))
    assert errors.focal_stderr_px == pytest.approx(halves[0], rel=0.6)
    assert errors.principal_stderr_px == pytest.approx(halves[1:].max(), rel=0.6)


def test_exif_that_mapping_fails_with_is_forgotten(tmp_path):
    scene = make_scene(images=6, noise_px=0.3, arc_deg=60)
    job = job_of(scene, tmp_path, focal_35mm=400.0)
    assert job.cameras[0].prior
    job, model, notes = finish(job)
    assert model.num_reg_images() == 6
    assert model.camera(1).params[0] == pytest.approx(FOCAL, rel=0.02)
    assert not job.cameras[0].prior
    assert "focal lengths in EXIF" in notes[0]


def test_pose_errors_agree_with_the_scatter_of_adjustments(tmp_path):
    scene = make_scene(images=6, points=250, noise_px=0.0, arc_deg=60)
    _, exact, _ = finish(job_of(scene, tmp_path, CameraOptions(intrinsics=INTRINSICS)))
    true = colmap.poses_of(exact)
    cameras = {camera["id"] for camera in colmap.cameras_of(exact)}
    rng, ratios = np.random.default_rng(0), []
    for _ in range(8):
        model = copy.deepcopy(exact)
        for image_id in model.reg_image_ids():
            for point in model.image(image_id).points2D:
                point.xy = point.xy + rng.normal(size=2)
        colmap.bundle_adjust(model, cameras, 1)
        now = colmap.poses_of(model)
        found = colmap.pose_errors(model, cameras, 1)
        assert sorted(found) == scene.names
        for name, error in found.items():
            (r, t), (r0, t0) = (
                (a @ c.T, b - a @ c.T @ d)
                for (a, b), (c, d) in ((p[name], p[error.neighbour]) for p in (now, true))
            )
            turned = np.degrees(np.arccos(np.clip((np.trace(r @ r0.T) - 1) / 2, -1, 1)))
            cosine = t @ t0 / np.linalg.norm(t) / np.linalg.norm(t0)
            ratios.append(
                [turned / error.rotation_deg, np.degrees(np.arccos(cosine)) / error.direction_deg]
            )
    # Of the worst of three axes, and of two.
    assert (np.sqrt(np.mean(np.square(ratios), axis=0)) < np.sqrt([3, 2]) * 1.1).all()
    assert (np.sqrt(np.mean(np.square(ratios), axis=0)) > 0.9).all()
