"""Rules that judge a finished model, and mapping that does not give up; the truth is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap
import pytest
from scipy.spatial.transform import Rotation
from synthetic import FOCAL, HEIGHT, WIDTH, Scene, camera_errors, make_scene

from gim_hloc import colmap
from gim_hloc.colmap import checks, mapping
from gim_hloc.errors import MappingError
from gim_hloc.options import CameraOptions, MapOptions, VerifyOptions
from gim_hloc.poses import Pose


def look(centre: list[float], yaw: float = 0, pitch: float = 0, roll: float = 0) -> Pose:
    """Pose of a camera at a centre that looks along +z, turned by degrees."""
    rotation = Rotation.from_euler("yxz", [yaw, pitch, roll], degrees=True).as_matrix()
    return rotation, -rotation @ np.array(centre, dtype=float)


def observe(
    xyz: np.ndarray, poses: list[Pose], *, focal: float = FOCAL, noise: float = 0.5
) -> Scene:
    """A scene of given cameras and points, seen with noise (px)."""
    rng = np.random.default_rng(0)
    scene = Scene()
    for index, pose in enumerate(poses):
        scene.see(f"{index:02d}.jpg", pose, xyz, focal=focal, noise_px=noise, rng=rng)
    return scene


def job_of(scene: Scene, folder: Path, options: MapOptions | None = None) -> colmap.MapJob:
    """A verified database of true matches, nothing known of the camera."""
    cameras, _ = colmap.assign_cameras(scene.records(), CameraOptions())
    database = folder / "database.db"
    colmap.build_database(
        database,
        cameras=cameras,
        names=scene.names,
        keypoints=scene.keypoints.__getitem__,
        matches=[m for m in scene.all_matches() if len(m[2])],
        verify=VerifyOptions(),
    )
    return colmap.MapJob(
        database=database,
        cameras=cameras,
        options=options or MapOptions(),
        threads=1,
        log_dir=folder / "logs",
    )


def model_of(scene: Scene, *, focal: float = FOCAL, prior: bool = False) -> pycolmap.Reconstruction:
    """The scene as a model: true poses, points triangulated from all of their observations."""
    model = pycolmap.Reconstruction()
    params = [focal, WIDTH / 2, HEIGHT / 2, 0]
    camera = pycolmap.Camera(
        model="SIMPLE_RADIAL", width=WIDTH, height=HEIGHT, params=params, camera_id=1
    )
    camera.has_prior_focal_length = prior
    model.add_camera_with_trivial_rig(camera)
    views: dict[int, list[tuple[int, int]]] = {}
    equations: dict[int, list[np.ndarray]] = {}
    for index, name in enumerate(scene.names, 1):
        image = pycolmap.Image(name=name, camera_id=1, image_id=index)
        image.points2D = pycolmap.Point2DList(
            [pycolmap.Point2D(xy) for xy in scene.keypoints[name].astype(float) + 0.5]
        )
        pose = pycolmap.Rigid3d(np.column_stack(scene.poses[name]))
        model.add_image_with_trivial_frame(image, pose)
        matrix = np.column_stack(scene.poses[name])
        xy = camera.cam_from_img(scene.keypoints[name].astype(float) + 0.5)
        both = xy[:, :, None] * matrix[2] - matrix[:2]
        for row, (point, lines) in enumerate(zip(scene.points[name].tolist(), both, strict=True)):
            views.setdefault(point, []).append((index, row))
            equations.setdefault(point, []).append(lines)
    for point, elements in views.items():
        if len(elements) < 2:
            continue
        homogeneous = np.linalg.svd(np.concatenate(equations[point]))[2][-1]
        track = pycolmap.Track([pycolmap.TrackElement(*e) for e in elements])
        model.add_point3D(homogeneous[:3] / homogeneous[3], track)
    return model


def cloud(count: int, low: list[float], high: list[float], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, (count, 3))


# ------------------------------------------------------------------------- a camera that only turns


def panorama(images: int, *, focal: float, noise: float, step: float) -> Scene:
    """A camera that turns about its centre in steps (share of the picture's width)."""
    degrees = np.degrees(np.arctan(WIDTH / 2 / focal)) * 2 * step
    poses = [look([0, 0, 0], degrees * (i - images / 2), 3 * np.sin(i)) for i in range(images)]
    rng = np.random.default_rng(5)
    directions = np.column_stack(
        [rng.uniform(-3, 3, 3000), rng.uniform(-1.2, 1.2, 3000), np.ones(3000)]
    )
    return observe(directions * rng.uniform(2, 20, (3000, 1)), poses, focal=focal, noise=noise)


@pytest.mark.parametrize(
    ("images", "focal", "noise", "step"), [(6, 500, 0.5, 0.15), (3, 700, 1.0, 0.2)]
)
def test_a_camera_that_only_turns_gives_no_model(
    images: int, focal: float, noise: float, step: float, tmp_path: Path
) -> None:
    scene = panorama(images, focal=focal, noise=noise, step=step)
    try:
        models = colmap.run_mapping(job_of(scene, tmp_path)).models
    except MappingError:
        return  # COLMAP saw it itself
    checked = colmap.check_models(models)
    assert checked.models == []


def with_made_up_depth(scene: Scene, focal: float, guess: float) -> pycolmap.Reconstruction:
    """A fictional model: wrong focal length, centres beside each other, adjusted to matches."""
    rng = np.random.default_rng(0)
    moved = Scene(names=scene.names, poses={}, keypoints=scene.keypoints, points=scene.points)
    for name, (rotation, _) in scene.poses.items():
        small = Rotation.from_matrix(rotation).as_rotvec() * focal / guess
        turned = Rotation.from_rotvec(small).as_matrix()
        moved.poses[name] = (turned, -turned @ rng.normal(0, 0.1, 3))
    model = model_of(moved, focal=guess)
    colmap.bundle_adjust(model, set(), 1)
    return model


@pytest.mark.parametrize("focal", [500.0, 700.0, 1600.0])
@pytest.mark.parametrize("noise", [0.04, 1.0])
def test_made_up_depth_is_seen_through(focal: float, noise: float) -> None:
    scene = panorama(7, focal=focal, noise=noise, step=0.15)
    assert colmap.only_turns(with_made_up_depth(scene, focal, 1.3 * focal))


def facade() -> np.ndarray:
    return cloud(900, [-8, -4, 10], [8, 4, 10])


def ground() -> np.ndarray:
    return cloud(1500, [-60, -40, 100], [60, 40, 100])


FLAT = {
    "facade": (facade(), [look([0.8 * i, 0, 0]) for i in range(-3, 4)], FOCAL),
    "facade, turned": (facade(), [look([1.5 * i, 0, 0], -8 * i) for i in range(-3, 4)], FOCAL),
    "nadir": (ground(), [look([14 * (i % 3), 12 * (i // 3), 0]) for i in range(-4, 5)], FOCAL),
    "nadir, tele": (
        cloud(8000, [-60, -40, 100], [60, 40, 100]),
        [look([8 * (i % 3), 6 * (i // 3), 0], roll=2 * i) for i in range(-4, 5)],
        2000.0,
    ),
    "small step": (
        cloud(500, [-2, -2, 6], [2, 2, 12]),
        [look([0.1 * i, 0, 0]) for i in range(4)],
        FOCAL,
    ),
    "forward": (
        cloud(1200, [-6, -3, 2], [6, 3, 60]),
        [look([0.1 * np.sin(i), 0, 1.5 * i], np.sin(i)) for i in range(8)],
        FOCAL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_planes_and_small_baselines_stay_models(kind: str, noise: float) -> None:
    xyz, poses, focal = FLAT[kind]
    model = model_of(observe(xyz, poses, focal=focal, noise=noise), focal=focal)
    assert not colmap.only_turns(model)
    kept = colmap.check_models([model])
    assert [m.num_reg_images() for m in kept.models] == [len(poses)]
    assert kept.notes == []


def test_a_panorama_inside_a_good_set_is_left_alone() -> None:
    xyz = cloud(1500, [-10, -4, 4], [10, 4, 14])
    turning = [look([0, 0, 0], 6 * i) for i in range(-3, 4)]
    walking = [look([1.2 * i, 0.1 * i, 0], -4 * i) for i in range(-4, 5)]
    model = model_of(observe(xyz, turning + walking))
    assert [m.num_reg_images() for m in colmap.check_models([model]).models] == [16]


# --------------------------------------------------------------------------- joints, lonely images


def two_places(common: int, points: int, images: int = 5) -> Scene:
    """Two sets of images with ``common`` points in all of both, true or not."""
    one, two = (
        make_scene(images=images, points=points, seed=k, noise_px=0.3, arc_deg=60,
                   names=[f"{k}-{i}.jpg" for i in range(images)])
        for k in (1, 2)
    )  # fmt: skip
    return one.beside(two, points - common)


@pytest.mark.parametrize("common", [1, 8, 24])
def test_two_places_joined_by_a_few_points_are_split(common: int) -> None:
    model = model_of(two_places(common, 400))
    checked = colmap.check_models([model], turns=False)
    found = [{m.image(i).name[0] for i in m.reg_image_ids()} for m in checked.models]
    assert sorted(map(sorted, found)) == [["1"], ["2"]]
    assert [m.num_reg_images() for m in checked.models] == [5, 5]
    assert any("split into 5 and 5" in note for note in checked.notes)
    assert checked.reasons == {}


def test_a_joint_of_many_points_is_kept() -> None:
    checked = colmap.check_models([model_of(two_places(60, 400))], turns=False)
    assert [m.num_reg_images() for m in checked.models] == [10]


def test_sparse_images_of_one_place_are_not_cut_off() -> None:
    """Neighbours share 20 to 30 points throughout: few, but no less than anywhere else."""
    xyz = cloud(150, [-2, -2, 5], [22, 2, 9])
    scene = observe(xyz, [look([1.8 * i, 0, 0]) for i in range(12)], noise=0.3)
    model = model_of(scene)
    shared = checks.shared_points(model)[1]
    assert np.diag(shared, 1).max() < checks.WEAK_JOINT + 30
    assert np.diag(shared, 1).min() < checks.WEAK_JOINT
    assert [m.num_reg_images() for m in colmap.check_models([model]).models] == [12]


def keep_observations(scene: Scene, name: str, count: int) -> None:
    scene.keypoints[name] = scene.keypoints[name][:count]
    scene.points[name] = scene.points[name][:count]


def test_a_weak_but_right_image_stays_and_one_without_support_leaves() -> None:
    scene = make_scene(images=7, noise_px=0.3, arc_deg=60)
    weak, bare = scene.names[3], scene.names[5]
    keep_observations(scene, weak, 16)
    keep_observations(scene, bare, 8)
    checked = colmap.check_models([model_of(scene)])
    names = {i.name for i in checked.models[0].images.values() if i.has_pose}
    assert names == set(scene.names) - {bare}
    assert list(checked.reasons) == [bare]
    assert "only 8 points" in checked.reasons[bare]
    cameras = {camera["id"] for camera in colmap.cameras_of(checked.models[0])}
    assert set(colmap.pose_errors(checked.models[0], cameras, 1)) == names


def test_images_without_points_do_not_disturb_the_joints() -> None:
    model = model_of(two_places(8, 200))
    for image_id in (1, 2):
        for row, point in enumerate(model.image(image_id).points2D):
            if point.has_point3D():
                model.delete_observation(image_id, row)
    parts = colmap.split_at_weak_joints(model, [])
    assert len(parts) == 2
    scene = make_scene(images=5)
    for name in scene.names:
        keep_observations(scene, name, 0)
    assert len(colmap.split_at_weak_joints(model_of(scene), [])) == 1


def test_models_without_points_are_none() -> None:
    scene = make_scene(images=4)
    for name in scene.names:
        keep_observations(scene, name, 3)
    checked = colmap.check_models([model_of(scene)])
    assert checked.models == []
    assert set(checked.reasons) == set(scene.names)


# ----------------------------------------------------------------------------------------- attempts


def street(noise: float = 0.5) -> Scene:
    """Steps straight ahead between two walls: no first pair without forward motion."""
    rng = np.random.default_rng(3)
    walls = np.column_stack(
        [rng.choice([-4, 4], 700), rng.uniform(-3, 3, 700), rng.uniform(4, 50, 700)]
    ) + rng.normal(0, 0.3, (700, 3))
    return observe(walls, [look([0, 0, 3 * i]) for i in range(7)], noise=noise)


def test_a_walk_straight_ahead_is_mapped(tmp_path: Path) -> None:
    scene = street()
    mapped = colmap.run_mapping(job_of(scene, tmp_path))
    model = colmap.check_models(mapped.models).models[0]
    assert model.num_reg_images() == 7
    assert camera_errors(colmap.poses_of(model), scene.poses)[1] < 0.05


def count_maps(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> list[tuple[int, bool]]:
    """Pretend attempts that give models of these sizes; returns what was called."""
    calls: list[tuple[int, bool]] = []

    def attempt(job: colmap.MapJob, *, relaxed: bool) -> list[pycolmap.Reconstruction]:
        calls.append((job.seed, relaxed))
        size = sizes[len(calls) - 1]
        return [model_of(make_scene(images=size, points=120))] if size else []

    monkeypatch.setattr(mapping, "map_once", attempt)
    return calls


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> colmap.MapJob:
    """Ten images to be mapped."""
    return job_of(make_scene(images=10, points=150, arc_deg=40), tmp_path_factory.mktemp("ten"))


@pytest.mark.parametrize(
    ("sizes", "tried", "kept"),
    [
        ([8, 0, 0], 1, 8),  # 80 %
        ([2, 9, 0], 2, 9),
        ([2, 3, 9], 3, 9),
        ([6, 7, 10], 2, 7),  # twice the first one's work is done
        ([5, 3, 0], 3, 5),
        ([0, 0, 4], 3, 4),
    ],
)
def test_attempts_are_few_and_the_best_is_kept(
    sizes: list[int],
    tried: int,
    kept: int,
    ten: colmap.MapJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_maps(monkeypatch, sizes)
    mapped = colmap.run_mapping(ten)
    assert calls == [(0, False), (0, True), (1, True)][:tried]
    assert mapped.models[0].num_reg_images() == kept
    assert any("repeated" in note for note in mapped.notes) == (tried > 1)
    assert any(f"holds {kept} of the 10" in note for note in mapped.notes) == (kept < 8)


def test_images_with_hardly_a_point_do_not_make_an_attempt_better(
    ten: colmap.MapJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = make_scene(images=9, points=120)
    for name in poor.names[4:]:
        keep_observations(poor, name, 5)
    models = iter([[model_of(make_scene(images=6, points=120))], [model_of(poor)], []])
    monkeypatch.setattr(mapping, "map_once", lambda job, relaxed: next(models))
    assert colmap.run_mapping(ten).models[0].num_reg_images() == 6


def test_options_of_the_user_hold_in_every_attempt(tmp_path: Path) -> None:
    options = MapOptions(
        init_min_num_inliers=77, init_min_tri_angle=9.5, abs_pose_min_num_inliers=23
    )
    job = job_of(make_scene(images=3), tmp_path, options)
    for relaxed in (False, True):
        used = mapping._incremental_options(job, relaxed=relaxed).mapper
        assert used.init_min_num_inliers == 77
        assert used.init_min_tri_angle == 9.5
        assert used.abs_pose_min_num_inliers == 23
    free = mapping._incremental_options(job_of(make_scene(images=3), tmp_path), relaxed=True)
    assert free.mapper.init_max_forward_motion == 1


def test_a_part_of_the_scene_that_mapping_left_is_tried_by_itself(tmp_path: Path) -> None:
    """Photographs of another place map at once; a walk straight ahead needs relaxed values."""
    walk = street()
    other = make_scene(images=7, points=200, names=[f"other {i}" for i in range(7)])
    both = walk.beside(other)
    mapped = colmap.run_mapping(job_of(both, tmp_path))
    sizes = sorted(model.num_reg_images() for model in mapped.models)
    assert sizes == [7, 7]
    for model in mapped.models:
        poses = colmap.poses_of(model)
        assert camera_errors(poses, {name: both.poses[name] for name in poses})[1] < 0.05
