"""Points carried by depth and pose agree with scenes whose geometry has a closed form."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch

from gim_hloc.training.batch import PairBatch, PairSample, collate
from gim_hloc.training.data import rendered
from gim_hloc.training.data.augment import AugmentOptions, RawPair, apply_homography, make_sample
from gim_hloc.training.data.truth import pixel_grid, warp_points

SIZE = (96, 72)
LOOKUPS: tuple[Literal["nearest", "bilinear"], ...] = ("nearest", "bilinear")


def plane_sample(
    *, depth: float = 2.0, focal: float = 50.0, shift: float = 0.2, size: tuple[int, int] = SIZE
) -> PairSample:
    """A wall parallel to both images, the camera moved along x: everything moves alike."""
    width, height = size
    K = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    T = torch.eye(4, dtype=torch.float64)
    T[0, 3] = shift
    return PairSample(
        image0=torch.zeros(3, height, width),
        image1=torch.zeros(3, height, width),
        valid0=torch.ones(height, width, dtype=torch.bool),
        valid1=torch.ones(height, width, dtype=torch.bool),
        to_original0=torch.eye(3, dtype=torch.float64),
        to_original1=torch.eye(3, dtype=torch.float64),
        size0=size,
        size1=size,
        dataset="plane",
        names=("a", "b"),
        depth0=torch.full((height, width), depth),
        depth1=torch.full((height, width), depth),
        K0=K.double(),
        K1=K.double(),
        T_0to1=T,
    )


def batch_of(*samples: PairSample) -> PairBatch:
    return collate(samples)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_wall_moves_alike_everywhere(lookup: Literal["nearest", "bilinear"]) -> None:
    batch = batch_of(plane_sample())
    xy = pixel_grid(SIZE[1], SIZE[0], 1)[None]
    for source, sign in ((0, 1.0), (1, -1.0)):
        other, valid = warp_points(batch, xy, source=source, lookup=lookup)
        expected = xy + torch.tensor([sign * 5.0, 0.0])
        assert (other - expected).abs().max() < 1e-4
        x, y = expected[0].T
        if lookup == "nearest":
            inside = (x > 0) & (x < SIZE[0] - 1) & (y > 0) & (y < SIZE[1] - 1)
        else:
            inside = (x >= 0) & (x <= SIZE[0] - 1)
        assert torch.equal(valid[0], inside)


def test_depth_is_divided_by_as_it_is() -> None:
    # With z + 1e-4 in the denominator this point would lie 1 % nearer to the principal point.
    batch = batch_of(plane_sample(depth=0.01, shift=0.002))
    other, _ = warp_points(batch, torch.tensor([[[40.0, 30.0]]]), source=0, lookup="bilinear")
    assert other[0, 0].tolist() == pytest.approx([50.0, 30.0], abs=1e-4)


@pytest.mark.parametrize(("factor", "seen"), [(0.79, True), (0.84, True), (0.83, False)])
def test_depths_must_agree_within_a_fifth(factor: float, seen: bool) -> None:
    if factor == 0.79:
        factor = 1.24  # |1.24 - 1| / 1.24 < 0.2
    sample = plane_sample(shift=0.0)
    assert sample.depth1 is not None
    sample.depth1 *= factor
    xy = torch.tensor([[[40.0, 30.0]]])
    _, valid = warp_points(batch_of(sample), xy, source=0)
    assert bool(valid[0, 0]) == seen
    _, valid = warp_points(batch_of(sample), xy, source=0, lookup="bilinear")
    assert bool(valid[0, 0])  # that version does not test it


def test_unknown_depth() -> None:
    sample = plane_sample(shift=0.0)
    assert sample.depth0 is not None
    sample.depth0[30, 40] = 0.0
    sample.depth0[50, 60] = float("nan")
    xy = torch.tensor([[[40.0, 30.0], [60.0, 50.0], [40.4, 30.0], [40.6, 30.0], [20.0, 20.0]]])
    for lookup in LOOKUPS:
        other, valid = warp_points(batch_of(sample), xy, source=0, lookup=lookup)
        assert valid[0].tolist() == [False, False, False, True, True]
        assert torch.isfinite(other).all()
        assert (other[0, 3] - xy[0, 3]).norm() < 1e-4


def test_bilinear_depth_and_what_stands_in_for_it() -> None:
    sample = plane_sample(shift=1.0, depth=4.0)
    assert sample.depth0 is not None
    sample.depth0[:, 21:] = 8.0
    batch = batch_of(sample)
    xy = torch.tensor([[[20.25, 30.0], [20.75, 30.5], [20.25, 0.0]]])
    moved = warp_points(batch, xy, source=0, lookup="bilinear")[0][0, :, 0] - xy[0, :, 0]
    assert moved.tolist() == pytest.approx([50 / 5.0, 50 / 7.0, 50 / 5.0], abs=1e-4)
    moved = warp_points(batch, xy, source=0)[0][0, :, 0] - xy[0, :, 0]
    assert moved.tolist() == pytest.approx([50 / 4.0, 50 / 8.0, 50 / 4.0], abs=1e-4)
    sample.depth0[31, 20] = float("nan")  # a neighbour of the second point only
    moved = warp_points(batch_of(sample), xy, source=0, lookup="bilinear")[0][0, :, 0] - xy[0, :, 0]
    assert moved.tolist() == pytest.approx([50 / 5.0, 50 / 8.0, 50 / 5.0], abs=1e-4)


def test_half_a_pixel_at_the_border_has_depth() -> None:
    batch = batch_of(plane_sample(shift=0.0))
    xy = torch.tensor([[[-0.4, 10.0], [95.4, 10.0], [-0.6, 10.0], [10.0, 71.6]]])
    batch.to_original1[0, 0, 2] = 0.5  # so that they arrive on the other image
    other, _ = warp_points(batch, xy, source=0, lookup="bilinear")
    assert (other[0, 0] - torch.tensor([-0.9, 10.0])).norm() < 1e-4


def test_padding_and_no_depth() -> None:
    padded = plane_sample(shift=0.0)
    padded.valid0[:, 60:] = False
    padded.valid1[40:] = False
    bare = dataclasses.replace(plane_sample(), depth0=None, depth1=None)
    batch = batch_of(padded, bare)
    xy = torch.tensor([[70.0, 30.0], [59.0, 30.0], [30.0, 50.0], [30.0, 39.0]])
    for lookup in LOOKUPS:
        _, valid = warp_points(batch, xy.expand(2, -1, -1), source=0, lookup=lookup)
        assert valid.tolist() == [[False, True, False, True], [False] * 4]


def test_what_is_behind_the_other_camera() -> None:
    sample = plane_sample(depth=1.0, shift=0.0)
    sample.T_0to1[2, 3] = -3.0
    for lookup in LOOKUPS:
        other, valid = warp_points(
            batch_of(sample), torch.tensor([[[47.5, 35.5]]]), source=0, lookup=lookup
        )
        assert not valid.any()
        assert torch.isfinite(other).all()


def test_points_that_are_no_numbers() -> None:
    xy = torch.tensor([[[float("nan"), 3.0], [float("inf"), 3.0], [-1e30, 3.0], [1e9, 1e9]]])
    for lookup in LOOKUPS:
        other, valid = warp_points(batch_of(plane_sample()), xy, source=0, lookup=lookup)
        assert not valid.any()
        assert torch.isfinite(other).all()


def test_a_batch_is_its_samples() -> None:
    samples = [plane_sample(), plane_sample(depth=3.0)]
    large = plane_sample(size=(120, 90), depth=5.0)
    for name in ("image0", "image1", "valid0", "valid1"):
        value = getattr(large, name)
        setattr(large, name, value[..., : SIZE[1], : SIZE[0]])
    samples.append(large)
    xy = torch.rand(3, 500, 2) * torch.tensor(SIZE)
    for lookup in LOOKUPS:
        for source in (0, 1):
            together = warp_points(batch_of(*samples), xy, source=source, lookup=lookup)
            for k, sample in enumerate(samples):
                alone = warp_points(batch_of(sample), xy[k : k + 1], source=source, lookup=lookup)
                assert torch.equal(together[1][k], alone[1][0])
                rows = alone[1][0]
                assert torch.allclose(together[0][k][rows], alone[0][0][rows], atol=1e-5)


def test_unknown_words_are_refused() -> None:
    batch = batch_of(plane_sample())
    with pytest.raises(ValueError, match="0 or 1"):
        warp_points(batch, torch.zeros(1, 1, 2), source=2)
    with pytest.raises(ValueError, match="nearest"):
        warp_points(batch, torch.zeros(1, 1, 2), source=0, lookup="cubic")  # type: ignore[arg-type]


def test_pixel_grid() -> None:
    grid = pixel_grid(17, 25, 8)
    assert grid.tolist() == [[3.5, 3.5], [11.5, 3.5], [19.5, 3.5], [3.5, 11.5], [11.5, 11.5],
                             [19.5, 11.5]]  # fmt: skip
    assert pixel_grid(2, 2, 1).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]


# --------------------------------------------------------------------------------- analytic scenes


@pytest.fixture(scope="module")
def room() -> tuple[rendered.Room, rendered.Camera, rendered.Camera, RawPair]:
    options = rendered.RenderedOptions(size=(160, 120), seed=5)
    scene = rendered.make_room(np.random.default_rng(0), options, 8)
    camera0, camera1 = rendered.draw_cameras(scene, np.random.default_rng(1), options)
    textures = [rendered.pyramid(np.full((64, 64, 3), 40 + 20 * k, np.uint8)) for k in range(8)]
    (image0, depth0), (image1, depth1) = (
        rendered.render_view(scene, camera, textures) for camera in (camera0, camera1)
    )
    pair = RawPair(
        image0=image0,
        image1=image1,
        names=("a", "b"),
        depth0=depth0,
        depth1=depth1,
        K0=camera0.K,
        K1=camera1.K,
        T_0to1=camera1.world_to_camera @ np.linalg.inv(camera0.world_to_camera),
    )
    return scene, camera0, camera1, pair


def ray_depth(scene: rendered.Room, camera: rendered.Camera, xy: np.ndarray) -> np.ndarray:
    """Depth along the optical axis at any pixels (N, 2), by intersecting every patch with rays.

    Nothing of the renderer's projective arithmetic is used.
    """
    rays = np.c_[xy, np.ones(len(xy))] @ np.linalg.inv(camera.K).T @ camera.world_to_camera[:3, :3]
    best = np.full(len(xy), np.inf)
    for origin, a, b in zip(scene.origin, scene.side0, scene.side1, strict=True):
        normal = np.cross(a, b)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = ((origin - camera.centre) @ normal) / (rays @ normal)
            at = camera.centre + t[:, None] * rays - origin
            s, u = at @ a / (a @ a), at @ b / (b @ b)
            hit = (t > 1e-9) & (s >= 0) & (s <= 1) & (u >= 0) & (u <= 1)
        best = np.where(hit & (t < best), t, best)
    return best


def project(scene_camera: rendered.Camera, world: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    local = world @ scene_camera.world_to_camera[:3, :3].T + scene_camera.world_to_camera[:3, 3]
    return (local @ scene_camera.K.T)[:, :2] / local[:, 2:], local[:, 2]


def true_places(
    scene: rendered.Room, camera0: rendered.Camera, camera1: rendered.Camera, xy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in the other image, the depth there, and the depth of what is seen there."""
    depth = ray_depth(scene, camera0, xy)
    local = np.c_[xy, np.ones(len(xy))] @ np.linalg.inv(camera0.K).T * depth[:, None]
    world = (local - camera0.world_to_camera[:3, 3]) @ camera0.world_to_camera[:3, :3]
    place, z = project(camera1, world)
    return place, z, ray_depth(scene, camera1, place)


def test_rendered_depth_is_exact(room: tuple) -> None:
    scene, camera0, camera1, pair = room
    for camera, depth in ((camera0, pair.depth0), (camera1, pair.depth1)):
        width, height = camera.size
        xy = pixel_grid(height, width, 1).numpy().astype(np.float64)
        np.testing.assert_allclose(depth.reshape(-1), ray_depth(scene, camera, xy), rtol=1e-6)


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("augmented", [False, True])
def test_the_truth_of_a_room(
    room: tuple, lookup: Literal["nearest", "bilinear"], augmented: bool
) -> None:
    scene, camera0, camera1, pair = room
    options = AugmentOptions(
        box=(200, 152) if augmented else (160, 120),
        train=augmented,
        homography=1.0,
        flip_horizontal=0.5,
        photometric="none",
    )
    samples = [
        make_sample(pair, options, np.random.default_rng(seed), dataset="room")
        for seed in range(4 if augmented else 1)
    ]
    batch = collate(samples)
    original = pixel_grid(120, 160, 1).numpy().astype(np.float64)
    place, z, seen = true_places(scene, camera0, camera1, original)
    for sample in samples:
        # The network pixels at which the original's pixel centres lie: depth is exact there.
        to0, to1 = sample.to_original0.numpy(), sample.to_original1.numpy()
        xy = apply_homography(np.linalg.inv(to0), original)
        expected = apply_homography(np.linalg.inv(to1), place)
        got, valid = warp_points(
            collate([sample]),
            torch.from_numpy(xy.astype(np.float32))[None],
            source=0,
            lookup=lookup,
        )
        chosen = valid[0].numpy()
        error = np.abs(got[0].numpy() - expected)[chosen]
        assert chosen.sum() > 300
        # Bilinear weights of positions in float32 are not quite 0 and 1, which shows at edges.
        assert np.quantile(error, 0.99) < 1e-3
        assert error.max() < (1e-3 if lookup == "nearest" else 0.05)
        # Who is valid: nothing hidden, nothing outside the valid areas, and all that is clear.
        on0, on1 = (
            self_valid(area.numpy(), points)
            for area, points in ((sample.valid0, xy), (sample.valid1, expected))
        )
        inside = ((place > 0.01) & (place < np.array([159, 119]) - 0.01)).all(1) & (z > 1e-3)
        agree = np.abs(seen - z) / seen
        if lookup == "nearest":
            hidden = agree > 0.25
            assert hidden[on0 & on1 & inside].sum() > 20
            assert chosen[hidden].sum() < 0.06 * chosen.sum()  # at edges, half a pixel decides
            clear = on0 & on1 & inside & (agree < 0.02)
            assert chosen[clear].mean() > 0.97
        else:
            assert chosen[on0 & on1 & inside].mean() > 0.99
        assert not chosen[~on0].any()
        assert on1[chosen].all()
    assert batch.has_depth.all()


def self_valid(area: np.ndarray, xy: np.ndarray) -> np.ndarray:
    pixel = np.floor(np.nan_to_num(xy, nan=-9.0).clip(-9, 9999) + 0.5).astype(int)
    inside = ((pixel >= 0) & (pixel < [area.shape[1], area.shape[0]])).all(1)
    result = np.zeros(len(xy), dtype=bool)
    result[inside] = area[pixel[inside, 1], pixel[inside, 0]]
    return result


def test_there_and_back(room: tuple) -> None:
    _, _, _, pair = room
    options = AugmentOptions(box=(160, 120), homography=1.0, photometric="none")
    batch = collate([make_sample(pair, options, np.random.default_rng(3), dataset="room")])
    xy = pixel_grid(120, 160, 1)[None]
    there, valid = warp_points(batch, xy, source=0, lookup="bilinear")
    back, valid_back = warp_points(batch, there, source=1, lookup="bilinear")
    both = valid & valid_back
    error = (back - xy)[both].norm(dim=1)
    assert both.sum() > 500
    assert error.median() < 0.02
    assert (error < 1).float().mean() > 0.5  # the others are hidden there, which is not tested
