"""Patch refinement of tracks, on pictures of analytic textures: every true position is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import FOCAL, HEIGHT, INTRINSICS, WIDTH, camera_errors, make_scene

from gim_hloc import colmap
from gim_hloc.options import CameraOptions, VerifyOptions
from gim_hloc.tracks.photometric import (
    PhotometricOptions,
    TrackViews,
    judge_images,
    local_normals,
    pick_references,
    refine_positions,
    tangents,
)


class Texture:
    """A smooth random function of the plane, evaluated exactly anywhere (128 +- about 40)."""

    def __init__(self, seed: int = 0, waves: int = 60, shortest: float = 5.0) -> None:
        rng = np.random.default_rng(seed)
        self.k = rng.normal(size=(waves, 2))
        lengths = shortest * rng.uniform(1, 4, (waves, 1))
        self.k *= 2 * np.pi / lengths / np.linalg.norm(self.k, axis=1, keepdims=True)
        self.phase = rng.uniform(0, 2 * np.pi, waves)

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        waves = np.zeros(xy.shape[:-1], np.float32)
        for k, phase in zip(self.k, self.phase, strict=True):
            waves += np.cos(xy @ k + phase).astype(np.float32)
        return 128 + 40 * waves / np.sqrt(len(self.k) / 2)


def picture(
    texture: Texture, matrix: np.ndarray, offset: np.ndarray, size: int = 200
) -> np.ndarray:
    """Image whose pixel x shows the texture at ``matrix @ x + offset``."""
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).astype(np.float64)
    return texture(grid @ matrix.T + offset)


def align(second: np.ndarray, shape: np.ndarray, true: np.ndarray, first: np.ndarray, **kw: object):
    """Refine points of ``second`` started off their true place; returns errors and confirmed."""
    points = np.stack(np.meshgrid(np.arange(64, 137, 12), np.arange(64, 137, 12)), -1)
    points = points.reshape(-1, 2).astype(np.float64)
    count = len(points)
    truth = (points - 100) @ shape.T + true
    start = truth + np.random.default_rng(1).uniform(-1, 1, truth.shape)
    views = TrackViews(
        track=np.tile(np.arange(count), 2),
        image=np.repeat([0, 1], count),
        xy_px=np.concatenate([points, start]),
    )
    shapes = np.concatenate([np.tile(np.eye(2), (count, 1, 1)), np.tile(shape, (count, 1, 1))])
    scale = kw.pop("scale", np.ones(2))
    xy, confirmed = refine_positions(
        views,
        np.arange(count),
        shapes,
        lambda i: (first, second)[i],
        scale,
        PhotometricOptions(),
        **kw,
    )  # type: ignore[arg-type]
    assert np.array_equal(xy[:count], points)  # the view compared with keeps its place
    return np.linalg.norm(xy[count:] - truth, axis=1), confirmed[count:], xy


def turn(degrees: float, scale: float = 1.0) -> np.ndarray:
    a = np.deg2rad(degrees)
    return scale * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


@pytest.mark.parametrize(
    "shape",
    [np.eye(2), turn(20), turn(-35, 1.3), turn(5, 0.8), np.array([[1.1, 0.3], [0, 0.9]])],
    ids=["shift", "turn", "turn+scale", "smaller", "shear"],
)
def test_known_motion_is_recovered(shape: np.ndarray) -> None:
    texture = Texture()
    first = picture(texture, np.eye(2), np.zeros(2))
    true = np.array([100.37, 99.81])
    inverse = np.linalg.inv(shape)
    # brighter and with more contrast: gain and offset must not matter
    second = 1.4 * picture(texture, inverse, 100 - inverse @ true) - 30
    errors, confirmed, _ = align(second, shape, true, first)
    assert confirmed.mean() > 0.9
    assert errors[confirmed].max() < 0.05
    assert np.median(errors[confirmed]) < 0.02


def test_other_content_and_blank_walls_are_not_confirmed() -> None:
    first = picture(Texture(0), np.eye(2), np.zeros(2))
    other = picture(Texture(1), np.eye(2), np.zeros(2))
    errors, confirmed, _ = align(other, np.eye(2), np.array([100.0, 100.0]), first)
    assert confirmed.mean() < 0.1
    assert (errors[~confirmed] <= np.sqrt(2)).all()  # unconfirmed ones stay where they were
    blank = np.full_like(first, 77.0)
    _, confirmed, _ = align(blank, np.eye(2), np.array([100.0, 100.0]), blank)
    assert not confirmed.any()
    stripes = np.tile(np.sin(np.arange(200) / 2) * 50 + 100, (200, 1))  # nothing vertical to hold
    _, confirmed, _ = align(stripes, np.eye(2), np.array([100.0, 100.0]), stripes)
    assert not confirmed.any()


def test_soft_images_are_compared_at_the_size_that_was_seen() -> None:
    """Enlarged four times, with noise that grew with them: full size alone finds nothing better."""
    rng = np.random.default_rng(2)
    texture = Texture(shortest=24.0)  # px of the large image, which shows nothing finer
    points = np.stack(np.meshgrid(np.arange(80, 321, 24), np.arange(80, 321, 24)), -1)
    points = points.reshape(-1, 2).astype(np.float64)
    true = np.array([1.3, -0.9])
    pictures = [
        picture(texture, np.eye(2), shift, 400)
        + np.kron(rng.normal(0, 2, (100, 100)), np.ones((4, 4)))
        for shift in (np.zeros(2), -true)
    ]
    start = points + true + rng.uniform(-3, 3, points.shape)  # a network pixel is four of these
    views = TrackViews(
        track=np.tile(np.arange(len(points)), 2),
        image=np.repeat([0, 1], len(points)),
        xy_px=np.concatenate([points, start]),
    )
    shapes = np.tile(np.eye(2), (2 * len(points), 1, 1))

    def errors(scale: float) -> np.ndarray:
        xy, confirmed = refine_positions(
            views, np.arange(len(points)), shapes, pictures.__getitem__, np.full(2, scale),
            PhotometricOptions(),
        )  # fmt: skip
        found = np.linalg.norm(xy[len(points) :] - points - true, axis=1)
        return np.where(confirmed[len(points) :], found, np.inf)

    assert np.median(errors(0.25)) < 0.4  # a tenth of a network pixel
    assert (errors(0.25) < 1).mean() > 0.9
    assert (errors(1.0) < 1).mean() < 0.6


def test_blurred_images_are_not_trusted() -> None:
    """Five images; two agree with nobody, not even with each other."""
    rng = np.random.default_rng(0)
    track, image = (a.ravel() for a in np.meshgrid(np.arange(400), np.arange(5), indexing="ij"))
    views = TrackViews(track=track, image=image, xy_px=np.zeros((2000, 2)))
    reference = np.arange(400) * 5 + rng.integers(0, 5, 400)
    blurred = np.isin(image, [1, 3])
    share = np.where(blurred | blurred[reference][track], 0.1, 0.7)
    confirmed = rng.uniform(size=2000) < share
    options = PhotometricOptions()
    trusted = judge_images(views, reference, confirmed, 5, options)
    assert trusted.tolist() == [True, False, True, False, True]
    footprint = rng.uniform(1, 2, 2000)
    assert not blurred[pick_references(views, footprint, 400, trusted)].any()
    assert not judge_images(views, reference, np.zeros(2000, bool), 5, options).any()


def test_workers_do_not_change_the_result() -> None:
    first = picture(Texture(), np.eye(2), np.zeros(2))
    second = picture(Texture(), np.eye(2), np.array([0.3, -0.2]))
    true = np.array([99.7, 100.2])
    one = align(second, np.eye(2), true, first, workers=1)[2]
    many = align(second, np.eye(2), true, first, workers=3)[2]
    assert np.array_equal(one, many)


def test_normals_of_a_plane_and_of_nothing() -> None:
    rng = np.random.default_rng(0)
    flat = np.c_[rng.uniform(-1, 1, (200, 2)), np.zeros(200)]
    towards = np.tile([0.5, 0, np.sqrt(0.75)], (200, 1))
    assert np.allclose(local_normals(flat, towards, neighbours=10), [0, 0, 1], atol=1e-6)
    cloud = rng.normal(size=(200, 3))
    found = local_normals(cloud, towards, neighbours=10, flatness=0.0)
    assert np.array_equal(found, towards)
    assert np.array_equal(local_normals(flat[:5], towards[:5], neighbours=10), towards[:5])


def test_tangents_span_the_plane() -> None:
    normals = np.random.default_rng(0).normal(size=(50, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    u, v = tangents(normals)
    frames = np.stack([u, v, normals], 1)
    assert np.allclose(frames @ frames.transpose(0, 2, 1), np.eye(3), atol=1e-12)


def test_reference_is_the_view_of_median_size() -> None:
    views = TrackViews(track=np.array([0, 0, 0, 1, 1]), image=np.arange(5), xy_px=np.zeros((5, 2)))
    footprint = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    assert list(pick_references(views, footprint, 2)) == [2, 4]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory):
    """A model of a textured plane from keypoints with 0.5 px of noise, and its pictures."""
    folder = tmp_path_factory.mktemp("plane")
    scene = make_scene(images=6, points=500, arc_deg=50)
    rng = np.random.default_rng(3)
    xyz = np.c_[rng.uniform(-1.8, 1.8, (500, 2)), np.zeros(500)]
    texture = Texture(shortest=0.06)  # about 7 px
    pictures = {}
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    rays = np.stack([(columns + 0.5 - WIDTH / 2) / FOCAL, (rows + 0.5 - HEIGHT / 2) / FOCAL,
                     np.ones((HEIGHT, WIDTH))], -1)  # fmt: skip
    for name, (rotation, translation) in scene.poses.items():
        centre = -rotation.T @ translation
        world = rays @ rotation  # rows times R: camera to world
        on_plane = centre[:2] - world[..., :2] * (centre[2] / world[..., 2])[..., None]
        pictures[name] = texture(on_plane)
        camera = xyz @ rotation.T + translation
        xy = camera[:, :2] / camera[:, 2:] * FOCAL + [WIDTH / 2, HEIGHT / 2] - 0.5
        inside = (xy > 8).all(1) & (xy < [WIDTH - 8, HEIGHT - 8]).all(1)
        noisy = xy + rng.normal(0, 0.5, xy.shape)
        scene.keypoints[name] = noisy[inside].astype(np.float32)
        scene.points[name] = np.flatnonzero(inside)
    cameras, _ = colmap.assign_cameras(scene.records(), CameraOptions(intrinsics=INTRINSICS))
    colmap.build_database(
        folder / "database.db", cameras=cameras, names=scene.names,
        keypoints=scene.keypoints.__getitem__, matches=scene.all_matches(), verify=VerifyOptions(),
    )  # fmt: skip
    job = colmap.MapJob(database=folder / "database.db", cameras=cameras, threads=1)
    paths = colmap.write_models(colmap.run_mapping(job).models, folder / "sparse")
    return scene, pictures, paths[0]


def test_refinement_improves_a_whole_model(plane, tmp_path: Path) -> None:
    scene, pictures, path = plane
    model = colmap.read_model(path)
    before = camera_errors(colmap.model_cameras(path), scene.poses)
    refined = colmap.refine_tracks(
        model,
        pictures.__getitem__,
        rounds=2,
        options=PhotometricOptions(),
        fixed={1},
        threads=1,
    )
    assert refined.sentence.startswith("refined")
    model.write(tmp_path)
    after = camera_errors(colmap.model_cameras(tmp_path), scene.poses)
    assert model.num_reg_images() == 6
    assert after[0] < before[0] / 3
    assert after[1] < before[1] / 3
    assert colmap.model_statistics(tmp_path)["mean_reprojection_error_px"] < 0.1
    assert list(model.cameras[1].params) == [FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2]


def test_dropped_observations_come_back_with_the_poses_held(plane) -> None:
    _, _, path = plane
    original = colmap.read_model(path)
    model = colmap.read_model(path)
    images = [model.image(i) for i in sorted(model.reg_image_ids())]
    ids = sorted(model.point3D_ids())
    kept = {i: model.point3D(i).xyz.copy() for i in ids[1::3]}
    for point_id in ids[::3]:
        model.delete_point3D(point_id)
    for point_id in ids[2::3]:
        if model.point3D(point_id).track.length() > 2:
            element = model.point3D(point_id).track.elements[0]
            model.delete_observation(element.image_id, element.point2D_idx)
    poses = [np.array(image.cam_from_world().matrix()) for image in images]
    before = model.compute_num_observations()
    refined = colmap.Refined(sentence="", original=original, scales=np.ones(len(images)))
    assert "observations and 500 of 500 points" in colmap.give_back(model, refined, 1)
    assert all(
        np.array_equal(pose, image.cam_from_world().matrix())
        for pose, image in zip(poses, images, strict=True)
    )
    assert all(np.array_equal(model.point3D(i).xyz, xyz) for i, xyz in kept.items())
    assert set(model.point3D_ids()) == set(ids)
    assert before < model.compute_num_observations() == original.compute_num_observations()


@pytest.mark.parametrize("min_share", [0.35, 0.0])  # told at once, or by the points it would cost
def test_pictures_that_confirm_nothing_leave_the_model_alone(
    plane, tmp_path: Path, min_share: float
) -> None:
    scene, pictures, path = plane
    model = colmap.read_model(path)
    rng = np.random.default_rng(0)
    refined = colmap.refine_tracks(
        model,
        lambda name: rng.normal(128, 40, pictures[name].shape).astype(np.float32),
        rounds=2,
        options=PhotometricOptions(min_confirmed=0, min_share=min_share),
        fixed={1},
        threads=1,
    )
    assert "kept as it was" in refined.sentence
    assert refined.original is None
    model.write(tmp_path)
    kept, original = colmap.model_cameras(tmp_path), colmap.model_cameras(path)
    assert all(np.allclose(kept[n][1], original[n][1]) for n in scene.names)
    assert colmap.model_statistics(tmp_path) == colmap.model_statistics(path)
