"""The synthetic scenes and matcher themselves: everything else is measured with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gim_hloc import colmap, images
from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks import scene as synthetic_dense
from gim_hloc.evaluation.benchmarks.scene import (
    Scene,
    SceneOptions,
    SyntheticDense,
    load_scene,
    make_scene,
    simulated_keypoints,
    write_scene,
)
from gim_hloc.matchers import registry

SIZE = (640, 480)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(SceneOptions(views=6, size=SIZE))


def matcher(scene: Scene, **options: object) -> SyntheticDense:
    values = {"size": (240, 320), "noise_px": 0.0, "outlier_share": 0.0, **options}
    return SyntheticDense.for_scene(scene, **values)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, np.array(SIZE) - 1.0, (count, 2))


def test_rays_end_on_the_surface_first_met(scene: Scene) -> None:
    view = scene.views[scene.names[0]]
    rays = view.rays(pixels(400))
    distance = scene.cast(view.centre, rays)
    hit = view.centre + distance[:, None] * rays
    assert scene.distance(hit).max() < 1e-6
    # Nothing before the hit: marched in small steps, every place is above the surface and
    # outside all boxes.
    for share in np.linspace(0.05, 0.995, 120):
        at = view.centre + share * distance[:, None] * rays
        assert (at[:, 2] > scene.height(at[:, :2])).all()
        for x, y, a, b, top, turn in scene.boxes:
            c, s = np.cos(turn), np.sin(turn)
            u = c * (at[:, 0] - x) + s * (at[:, 1] - y)
            v = -s * (at[:, 0] - x) + c * (at[:, 1] - y)
            assert not ((np.abs(u) < a) & (np.abs(v) < b) & (at[:, 2] < top)).any()


def test_boxes_are_seen_and_hide_things(scene: Scene) -> None:
    a, b = scene.names[0], scene.names[-1]
    xyz = scene.points(scene.views[a], pixels(3000))
    on_box = np.abs(xyz[:, 2] - scene.height(xyz[:, :2])) > 1e-3
    assert 0.02 < on_box.mean() < 0.5
    xy, _ = scene.views[b].project(xyz)
    inside = (xy > 0).all(1) & (xy < np.array(SIZE) - 1).all(1)
    hidden = inside & ~scene.visible(scene.views[b], xyz)
    assert 0.01 < hidden[inside].mean() < 0.4


def test_projection_undoes_rays(scene: Scene) -> None:
    for view in scene.views.values():
        xy = pixels(50)
        back, depth = view.project(scene.points(view, xy))
        np.testing.assert_allclose(back, xy, atol=1e-8)
        assert (depth > 0).all()


def test_exact_warp_is_the_truth(scene: Scene) -> None:
    a, b = scene.pairs(1)[0]
    exact = matcher(scene)
    warp = exact.warp(exact.encode(exact.blank_image(a)), exact.encode(exact.blank_image(b)))
    xy = pixels(1500)
    for there, name, other in ((warp, a, b), (warp.swapped(), b, a)):
        truth = scene.true_position(name, other, xy)
        seen = np.isfinite(truth).all(1)
        reading = there.read(torch.from_numpy(xy).float())
        certain = reading.certainty.numpy() > 0.5
        assert 0.3 < seen.mean() < 0.95
        # Off the edges of boxes, where four cells lie on two surfaces.
        assert (certain == seen).mean() > 0.95
        both = certain & seen
        error = np.linalg.norm(reading.xy_px.numpy()[both] - truth[both], axis=1)
        assert np.median(error) < 0.005
        assert np.quantile(error, 0.95) < 0.1
        assert np.median(reading.cycle_px.numpy()[both]) < 0.005


def test_noise_has_its_size_and_both_directions_their_own(scene: Scene) -> None:
    a, b = scene.pairs(1)[0]
    encodings = {}
    errors = {}
    at = torch.from_numpy(pixels(4000)).float()
    for seed in (0, 1):
        exact, noisy = matcher(scene), matcher(scene, noise_px=0.8, noise_seed=seed)
        for name in (a, b):
            encodings[name] = encodings.get(name) or exact.encode(exact.blank_image(name))
        for first, second in ((a, b), (b, a)):
            true = exact.warp(encodings[first], encodings[second])
            spoilt = noisy.warp(encodings[first], encodings[second])
            sure = true.read(at).certainty > 0.5
            errors[seed, first] = (spoilt.read(at).xy_px - true.read(at).xy_px)[sure].numpy()
    # Some 100 patches of noise are independent of each other.
    spread = np.concatenate(list(errors.values())).std(0)
    np.testing.assert_allclose(spread, 0.8, rtol=0.15)
    assert np.abs(errors[0, a] - errors[1, a]).mean() > 0.5


def test_same_warp_every_time_and_either_way_round(scene: Scene) -> None:
    a, b = scene.pairs(1)[0]
    warps = []
    for _ in range(2):
        spoilt = matcher(scene, noise_px=0.5, outlier_share=0.05)
        warps.append(
            spoilt.warp(spoilt.encode(spoilt.blank_image(a)), spoilt.encode(spoilt.blank_image(b)))
        )
    for name in ("flow0", "flow1", "certainty0", "certainty1"):
        assert torch.equal(getattr(warps[0], name), getattr(warps[1], name))
    plain = matcher(scene, noise_px=0.5, outlier_share=0.05)
    encodings = [plain.encode(plain.blank_image(name)) for name in (a, b)]
    assert torch.equal(plain.warp(*encodings).flow0, plain.warp(*encodings[::-1]).flow1)


def test_outliers_fail_the_cycle(scene: Scene) -> None:
    a, b = scene.pairs(1)[0]
    at = torch.from_numpy(pixels(6000)).float()
    exact, spoilt = matcher(scene), matcher(scene, outlier_share=0.15)
    encodings = [exact.encode(exact.blank_image(name)) for name in (a, b)]
    true, found = exact.warp(*encodings).read(at), spoilt.warp(*encodings).read(at)
    sure = (true.certainty > 0.5) & (found.certainty > 0.5)
    off = (true.xy_px - found.xy_px).norm(dim=1)[sure] > 5
    assert off.float().mean() > 0.04
    assert (found.cycle_px[sure][off] < 2).float().mean() < 0.2


def test_scene_survives_its_file(scene: Scene, tmp_path: Path) -> None:
    scene.save(tmp_path / "scene.json")
    again = load_scene(tmp_path / "scene.json")
    assert again.as_dict() == scene.as_dict()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json is not a scene"):
        load_scene(tmp_path / "other.json")
    with pytest.raises(InputError, match="nothing"):
        load_scene(tmp_path / "nothing.json")


def test_registered_matcher_goes_through_files(scene: Scene, tmp_path: Path) -> None:
    small = make_scene(SceneOptions(views=3, size=(320, 240)))
    write_scene(small, tmp_path)
    synthetic_dense.register()
    synthetic_dense.register()  # again changes nothing
    loaded = registry.load(
        synthetic_dense.NAME, scene=str(tmp_path / "scene.json"), size=(120, 160), device="cpu"
    )
    records = images.scan(tmp_path / "images")
    encodings = [
        loaded.encode(images.load(record, loaded.image_options)) for record in list(records)[:2]
    ]
    found = loaded.match(*encodings)
    assert len(found) > 500
    truth = small.true_position(encodings[0].name, encodings[1].name, found.keypoints0.numpy())
    error = np.linalg.norm(found.keypoints1.numpy() - truth, axis=1)
    assert np.nanmedian(error) < 1.0
    # The truth beside the images is COLMAP's, corner origin and all.
    poses = colmap.model_cameras(tmp_path / "truth")
    for name, (rotation, translation) in small.poses.items():
        np.testing.assert_allclose(poses[name][0], rotation, atol=1e-12)
        np.testing.assert_allclose(poses[name][1], translation, atol=1e-12)
    with pytest.raises(InputError, match="needs its scene"):
        registry.load(synthetic_dense.NAME)
    image = loaded.blank_image(encodings[0].name)
    image.name = "strange.png"
    with pytest.raises(InputError, match="not a view"):
        loaded.encode(image)


def test_pictures_show_the_scene(scene: Scene) -> None:
    """The same place of the surface has the same colour in all views."""
    a, b = scene.pairs(1)[0]
    pictures = [synthetic_dense.render(scene, scene.views[name]).astype(float) for name in (a, b)]
    xy = np.round(pixels(4000))
    target = scene.true_position(a, b, xy)
    seen = np.isfinite(target).all(1)
    rows, columns = np.round(target[seen]).astype(int).T[::-1]
    inside = (rows < SIZE[1]) & (columns < SIZE[0]) & (rows >= 0) & (columns >= 0)
    here = pictures[0][xy[seen][inside, 1].astype(int), xy[seen][inside, 0].astype(int)]
    there = pictures[1][rows[inside], columns[inside]]
    correlation = np.corrcoef(here.ravel(), there.ravel())[0, 1]
    unrelated = np.corrcoef(here.ravel(), np.roll(there, 7, axis=0).ravel())[0, 1]
    assert correlation > 0.7
    assert unrelated < 0.3
    assert here.std() > 20


def test_simulated_keypoints(scene: Scene) -> None:
    found = simulated_keypoints(scene, number=600, noise_px=0.0)
    a, b = scene.pairs(1)[0]
    assert all(400 < len(xy) < 800 for xy, _ in found.values())
    target = scene.true_position(a, b, found[a][0])
    seen = target[np.isfinite(target).all(1)]
    distance = np.linalg.norm(seen[:, None] - found[b][0][None], axis=2).min(1)
    # 80 % are no clutter, 60 % of those are found in the other image, exactly.
    assert (distance < 1e-3).mean() == pytest.approx(0.48, abs=0.08)
