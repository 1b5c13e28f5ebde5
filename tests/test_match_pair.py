"""Matching two images: geometry on scenes whose answer is known, files, pictures, the command."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import gim_hloc
from gim_hloc import pair_pictures, store
from gim_hloc.cli import match as command
from gim_hloc.errors import InputError
from gim_hloc.geometry.warp import Warp, cell_centres, inverse, transform
from gim_hloc.matchers.dense import DenseEncoding, DenseMatcher, DenseOptions
from gim_hloc.options import FitOptions
from gim_hloc.pipelines.match_pair import MatchResult, match
from gim_hloc.two_view import fit_geometry
from gim_hloc.types import ImageData, ImageOptions, MatcherInfo

WIDTH, HEIGHT = 480, 360
TILT = np.array([[0.9, 0.15, 20.0], [-0.1, 0.95, 30.0], [1e-4, 5e-5, 1.0]])
"""Pixels of image 0 -> pixels of image 1."""


def texture(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """Blobs of all sizes and colours, (height, width, 3) uint8."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for sigma in (2, 4, 9, 20):
        noise = cv2.GaussianBlur(random.normal(size=picture.shape), (0, 0), sigma)
        picture += noise / noise.std()
    return np.clip(128 + 40 * picture, 10, 245).astype(np.uint8)


def seen_through(homography: np.ndarray, picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return cv2.warpPerspective(
        picture, homography, (width, height), flags=cv2.INTER_CUBIC, borderValue=(90, 90, 90)
    )


def read_keypoints(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file[name]["keypoints"])


def save(path: Path, picture: np.ndarray, orientation: int = 1) -> Path:
    """Write an image; with orientation 6 turned in storage, so that EXIF turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(picture) if orientation == 6 else picture
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    return path


def project(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    homogeneous = np.c_[xy, np.ones(len(xy))] @ matrix.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    picture, folder = texture(), tmp_path_factory.mktemp("pair")
    return save(folder / "a.png", picture), save(folder / "b.png", seen_through(TILT, picture))


@pytest.fixture(scope="module")
def matched(pair: tuple[Path, Path]) -> MatchResult:
    return match(*pair, matcher="sift")


def matches_of(result: MatchResult) -> np.ndarray:
    return pair_pictures.draw_inliers(
        result.images, result.keypoints0, result.keypoints1, result.fit
    )


def projection(result: MatchResult) -> np.ndarray | None:
    return pair_pictures.draw_projection(result.images, result.keypoints0, result.fit, result.warp)


# ----------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("orientation", [1, 6])
def test_plane(tmp_path: Path, orientation: int) -> None:
    picture = texture()
    a = save(tmp_path / "a.png", picture)
    b = save(tmp_path / "b.png", seen_through(TILT, picture), orientation)
    result = gim_hloc.match(a, b, matcher="sift")
    assert isinstance(result, MatchResult)
    assert result.images[1].size == ((WIDTH, HEIGHT) if orientation == 1 else (HEIGHT, WIDTH))
    to_stored = np.vstack([result.images[1].upright_to_stored, [0, 0, 1]])
    truth = to_stored @ TILT

    error = np.linalg.norm(project(truth, result.keypoints0) - result.keypoints1, axis=1)
    assert result.inliers.sum() > 200
    assert np.median(error[result.inliers]) < 0.3
    assert result.fit is not None
    assert (error[result.fit.homography_inliers] < 8).all()
    corners = np.array([[60, 60], [400, 60], [400, 300], [60, 300.0]])
    assert result.homography is not None
    back = project(result.homography, project(truth, corners))
    assert np.abs(back - corners).max() < 1

    assert result.fundamental is not None
    inliers = result.inliers
    lines = np.c_[result.keypoints0[inliers], np.ones(inliers.sum())] @ result.fundamental.T
    distance = np.abs((lines * np.c_[result.keypoints1[inliers], np.ones(inliers.sum())]).sum(1))
    assert np.median(distance / np.linalg.norm(lines[:, :2], axis=1)) < 0.5


def two_views(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Exact projections of a cloud of points, 1000 x 800 pixels."""
    random = np.random.default_rng(seed)
    cloud = random.uniform([-2, -1.5, 4], [2, 1.5, 9], (count, 3))
    camera = np.array([[900, 0, 500], [0, 900, 400], [0, 0, 1.0]])
    turned = cloud @ cv2.Rodrigues(np.array([0.05, -0.2, 0.1]))[0].T + [0.8, 0.1, 0.2]
    seen0, seen1 = (points / points[:, 2:] @ camera.T for points in (cloud, turned))
    return seen0[:, :2], seen1[:, :2]


def test_outliers_are_found() -> None:
    xy0, xy1 = two_views()
    wrong = np.arange(400) >= 280
    xy1[wrong] = np.random.default_rng(1).uniform(0, 800, (120, 2))
    found = fit_geometry(xy0, xy1, FitOptions())
    assert found.problem is None
    assert found.inliers[~wrong].all()
    assert found.inliers[wrong].mean() < 0.05
    again = fit_geometry(xy0, xy1, FitOptions())
    assert np.array_equal(found.inliers, again.inliers)
    assert np.array_equal(found.fundamental, again.fundamental)


def test_threshold_counts_pixels_of_the_reduced_image() -> None:
    """Images of 8000 pixels matched at 1000: noise of half a pixel there is 4 stored pixels."""
    xy0, xy1 = two_views()
    random = np.random.default_rng(2)
    xy0, xy1 = (8 * (xy + random.normal(scale=0.3, size=xy.shape)) for xy in (xy0, xy1))
    strict = fit_geometry(xy0, xy1, FitOptions())
    fair = fit_geometry(xy0, xy1, FitOptions(), scale0=8, scale1=8)
    assert strict.inliers.mean() < 0.5
    assert fair.inliers.mean() > 0.9
    assert fair.fundamental is not None
    lines = np.c_[xy0, np.ones(400)] @ fair.fundamental.T
    distance = np.abs((lines * np.c_[xy1, np.ones(400)]).sum(1)) / np.linalg.norm(
        lines[:, :2], axis=1
    )
    assert np.median(distance) < 4


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_matches(count: int) -> None:
    xy0, xy1 = two_views(8)
    found = fit_geometry(xy0[:count], xy1[:count], FitOptions())
    assert found.fundamental is None
    assert found.homography is None
    assert found.inliers.shape == (count,)
    assert found.problem == f"{count} matches, and a fundamental matrix needs 8"


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((20, 2)),
        np.full((20, 2), 7.5),
        np.arange(40.0).reshape(20, 2),
        np.full((20, 2), np.nan),
    ],
    ids=["zeros", "one spot", "a line", "nan"],
)
def test_degenerate_matches(points: np.ndarray) -> None:
    found = fit_geometry(points, points, FitOptions())
    assert found.inliers.shape == found.homography_inliers.shape == (20,)
    for matrix, inliers in (
        (found.fundamental, found.inliers),
        (found.homography, found.homography_inliers),
    ):
        assert (matrix is None) == (not inliers.any())
        assert matrix is None or np.isfinite(matrix).all()


def test_thresholds_are_checked() -> None:
    with pytest.raises(InputError, match=r"fit\.fundamental_px is 0; it must be above 0"):
        FitOptions(fundamental_px=0)


# ----------------------------------------------------------------------------------- dense matchers


class Exact(DenseMatcher):
    """A dense matcher that knows the homography between upright images; left half certain."""

    def __init__(self, truth: np.ndarray) -> None:
        super().__init__(
            info=MatcherInfo(
                name="exact",
                kind="dense",
                checkpoint=(),
                licence="-",
                commercial=True,
                colour="rgb",
                summary="-",
            ),
            options=DenseOptions(
                size=(HEIGHT // 2, WIDTH // 2), upsample_size=(HEIGHT, WIDTH), num_matches=500
            ),
            image_options=ImageOptions(max_size=None),
            device=torch.device("cpu"),
        )
        self.truth = truth

    def encode(self, image: ImageData) -> DenseEncoding:
        _, frame, valid = self.place(image)
        return DenseEncoding(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            frame=frame,
            valid=valid,
            features={"to_upright": inverse(image.to_original)},
        )

    def warp_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Warp]:
        warps = []
        for a, b in pairs:
            flow = []
            for here, there, truth in ((a, b, self.truth), (b, a, np.linalg.inv(self.truth))):
                grid = cell_centres(*self.grid_size).reshape(-1, 2)
                upright = transform(here.features["to_upright"], transform(here.frame, grid))
                moved = project(truth, upright.double().numpy())
                stored = transform(inverse(there.features["to_upright"]), torch.from_numpy(moved))
                flow.append(transform(inverse(there.frame), stored).view(*self.grid_size, 2))
            certainty = torch.ones(2, *self.grid_size)
            certainty[0, :, WIDTH // 2 :] = 0
            warps.append(self.finish(a, b, torch.stack(flow), certainty))
        return warps


@pytest.mark.parametrize("orientation", [1, 6])
def test_dense_warp_projects(tmp_path: Path, orientation: int) -> None:
    picture = texture()
    a = save(tmp_path / "a.png", picture)
    b = save(tmp_path / "b.png", seen_through(TILT, picture), orientation)
    result = match(a, b, matcher=Exact(TILT))
    assert result.warp is not None
    assert len(result) == 500
    to_stored = np.vstack([result.images[1].upright_to_stored, [0, 0, 1]])
    error = project(to_stored @ TILT, result.keypoints0) - result.keypoints1
    assert np.abs(error).max() < 0.1
    assert result.inliers.mean() > 0.95

    drawn = projection(result)
    assert drawn is not None
    assert drawn.shape == (HEIGHT + 4, 3 * WIDTH + 8, 3)
    shown, projected, blend = (
        drawn[2:-2, 2 + i * (WIDTH + 2) : 2 + i * (WIDTH + 2) + WIDTH].astype(float)
        for i in range(3)
    )
    assert np.array_equal(shown, picture)
    inner = np.s_[40:-80, 40 : WIDTH // 2 - 10]
    assert np.abs(projected - shown)[inner].mean() < 4
    assert np.abs(blend - shown)[inner].mean() < 3
    uncertain = np.s_[:, WIDTH // 2 + 10 :]
    assert (projected[uncertain] == 255).all()
    assert np.array_equal(blend[uncertain], shown[uncertain])


# ----------------------------------------------------------------------------------------- pictures


def test_projection_by_homography(matched: MatchResult) -> None:
    drawn = projection(matched)
    assert drawn is not None
    projected = drawn[2:-2, WIDTH + 4 : 2 * WIDTH + 4].astype(float)
    inner = np.s_[60:-90, 60:-90]
    assert np.abs(projected - texture())[inner].mean() < 5


def test_projection_stops_at_the_horizon(matched: MatchResult) -> None:
    """Below a horizon through the middle of image 0, nothing of image 1 may be shown."""
    result = copy.deepcopy(matched)
    assert result.fit is not None
    to_other = np.array([[100.0, 0, 0], [0, 100.0, 0], [0, -1, HEIGHT / 2]])
    result.fit.homography = np.linalg.inv(to_other)
    upper = result.keypoints0[:, 1] < HEIGHT / 2 - 20
    result.fit.homography_inliers = upper
    stored = np.array([[[200.0, 100], [200, 300]]])
    target, visible = pair_pictures.by_homography(result.fit, result.keypoints0, stored)
    assert visible.tolist() == [[1.0, 0.0]]
    assert np.allclose(target[0, 0], [200 * 100 / 80, 100 * 100 / 80])
    result.fit.homography *= -1  # means the same
    assert np.array_equal(
        pair_pictures.by_homography(result.fit, result.keypoints0, stored)[1], visible
    )


@pytest.mark.parametrize("orientation", [1, 6])
def test_picture_of_matches(tmp_path: Path, orientation: int) -> None:
    picture = texture()
    a = save(tmp_path / "a.png", picture[:300])
    b = save(tmp_path / "b.png", seen_through(TILT, picture), orientation)
    result = match(a, b, matcher="sift")
    drawn = matches_of(result)
    assert drawn.shape == (2 * HEIGHT + 6, 2 * WIDTH + 6, 3)
    assert np.array_equal(drawn[2 : 2 + 300, 2 : 2 + WIDTH], picture[:300])
    upper = drawn[2 : 2 + HEIGHT, WIDTH + 4 : -2].astype(float)
    assert np.abs(upper - seen_through(TILT, picture)).max() == 0
    assert (drawn[2 + 300 : 2 + HEIGHT, 2 : 2 + WIDTH] == 255).all(), "white below a lower image"
    # Where an upright pixel of image 1 must have its dot, without going through the drawing code.
    upright = project(TILT, result.keypoints0[result.inliers])
    green = (drawn == (0, 255, 0)).all(2)
    for x, y in (
        *(result.keypoints0[result.inliers] + np.array([2, HEIGHT + 4])),
        *(upright + np.array([WIDTH + 4, HEIGHT + 4])),
    ):
        assert green[round(y), round(x)]
    assert not green[: HEIGHT + 2].any()


def test_large_and_small_images_are_fitted(tmp_path: Path) -> None:
    large = cv2.resize(texture(), (2000, 1500), interpolation=cv2.INTER_CUBIC)
    a = save(tmp_path / "a.png", large)
    b = save(tmp_path / "b.png", texture())
    result = match(a, b, matcher="sift", max_size=600)
    drawn = matches_of(result)
    assert drawn.shape == (2 * 1200 + 6, 1600 + 800 + 6, 3)
    green = (drawn == (0, 255, 0)).all(2)
    points = (result.keypoints0[result.inliers] + 0.5) * 1600 / 2000 - 0.5 + [2, 1204]
    assert len(points) > 100
    assert all(green[round(y), round(x)] for x, y in points)
    projected = projection(result)
    assert projected is not None
    assert projected.shape == (904, 3608, 3)
    shown, seen = (
        projected[2:-2, 2 + i * 1202 : 1202 + i * 1202][50:-50, 50:-50].astype(float)
        for i in range(2)
    )
    assert np.abs(shown - seen).mean() < 6


# -------------------------------------------------------------------------------------------- files


def test_files_agree(matched: MatchResult, tmp_path: Path) -> None:
    result = matched
    written = result.save(tmp_path / "new" / "out", formats=("npz", "csv", "h5"))
    names = ["matches.npz", "matches.csv", "features.h5", "matches.h5", "match.png", "warp.png"]
    assert [path.name for path in written] == [f"a_b_sift_{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(
        path.name for path in written
    )
    npz = np.load(written[0])
    for name in ("keypoints0", "keypoints1", "scores", "inliers", "fundamental", "homography"):
        assert np.array_equal(npz[name], getattr(result, name)), name
    assert npz["names"].tolist() == ["a.png", "b.png"]
    assert npz["sizes"].tolist() == [[WIDTH, HEIGHT]] * 2
    with written[1].open() as file:
        rows = list(csv.DictReader(file))
    table = np.array([[float(row[key]) for key in ("x0", "y0", "x1", "y1")] for row in rows])
    assert np.allclose(table, np.c_[result.keypoints0, result.keypoints1], atol=1e-4)
    assert [row["inlier"] == "1" for row in rows] == result.inliers.tolist()
    keypoints = [read_keypoints(written[2], name) for name in ("a.png", "b.png")]
    indices, scores = store.read_matches(written[3], "a.png", "b.png")
    assert len(indices) == len(result)
    expected = {
        tuple(row) for row in np.c_[result.keypoints0, result.keypoints1, result.scores].tolist()
    }
    pairs = np.c_[keypoints[0][indices[:, 0]], keypoints[1][indices[:, 1]], scores]
    assert {tuple(row) for row in pairs.tolist()} == expected
    for path in written[4:]:
        with Image.open(path) as picture:
            picture.load()


def test_dense_matches_in_hlocs_layout(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = match(*pair, matcher=Exact(TILT))
    features, matches = result.save(tmp_path / "out", formats=("h5",), pictures=False)
    indices, _ = store.read_matches(matches, "a.png", "b.png")
    assert np.array_equal(indices, np.arange(500)[:, None].repeat(2, 1))
    assert np.array_equal(read_keypoints(features, "a.png"), result.keypoints0)


def test_images_of_one_name(tmp_path: Path) -> None:
    for folder, seed in (("cam0", 0), ("cam1", 1)):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.png", texture(seed=seed))
    result = match(tmp_path / "cam0" / "a.png", tmp_path / "cam1" / "a.png", matcher="sift")
    assert [record.name for record in result.images] == ["cam0/a.png", "cam1/a.png"]
    features, matches, *_ = result.save(tmp_path, formats=("h5",))
    assert len(read_keypoints(features, "cam1/a.png")) > 100
    indices, _ = store.read_matches(matches, "cam0/a.png", "cam1/a.png")
    assert len(indices) == len(result)


def test_without_a_fit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = match(*pair, matcher="sift", fit=None)
    assert result.fit is None
    assert result.inliers.all()
    assert result.remark is None
    written = result.save(tmp_path / "out")
    assert [path.suffix for path in written] == [".npz", ".png"]
    assert "fundamental" not in np.load(written[0])


def test_unknown_format(matched: MatchResult, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'xml'"):
        matched.save(tmp_path / "out", formats=("xml",))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- inputs


def test_masks(pair: tuple[Path, Path], matched: MatchResult, tmp_path: Path) -> None:
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:, : WIDTH // 2] = 0
    Image.fromarray(mask).save(tmp_path / "right.png")
    masked = match(*pair, matcher="sift", fit=None, mask0=tmp_path / "right.png")
    assert (matched.keypoints0[:, 0] < WIDTH / 2).any()
    assert len(masked) > 50
    assert (masked.keypoints0[:, 0] >= WIDTH / 2).all()
    other = match(*pair, matcher="sift", fit=None, mask1=tmp_path / "right.png")
    assert (other.keypoints1[:, 0] >= WIDTH / 2).all()
    with pytest.raises(InputError, match="There is no mask"):
        match(*pair, matcher="sift", mask0=tmp_path / "left.png")
    Image.fromarray(mask[:100]).save(tmp_path / "low.png")
    with pytest.raises(InputError, match=r"low\.png has 480 x 100 pixels"):
        match(*pair, matcher="sift", mask0=tmp_path / "low.png")
    Image.fromarray(0 * mask).save(tmp_path / "black.png")
    with pytest.raises(InputError, match=r"black\.png leaves nothing of it"):
        match(*pair, matcher="sift", mask1=tmp_path / "black.png")


def test_a_mirrored_image_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 5
    with Image.open(pair[0]) as image:
        image.save(tmp_path / "mirrored.png", exif=exif)
    with pytest.raises(
        InputError, match=r"mirrored\.png cannot be used: mirrored, EXIF orient.* 5"
    ):
        match(tmp_path / "mirrored.png", pair[1], matcher="sift")


def test_loaded_matcher_has_its_own_options(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="max_size is new"):
        match(*pair, matcher=Exact(TILT), max_size=100)


def test_command(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [*map(str, pair), "--out", str(out), "--matcher", "sift", "--format", "npz", "csv"]
    assert command.main(arguments) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("a.png - b.png: ")
    assert "inliers of the fundamental matrix" in told[0]
    assert told[1:] == [str(path) for path in (
        out / "a_b_sift_matches.npz", out / "a_b_sift_matches.csv",
        out / "a_b_sift_match.png", out / "a_b_sift_warp.png",
    )]  # fmt: skip
    assert command.main([*arguments, "--no-ransac", "--no-pictures"]) == 0
    assert "inliers" not in capsys.readouterr().out


def test_nothing_in_common(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No matches: said so, exit code 0, and no projection of an earlier run is left."""
    out = tmp_path / "out"
    (tmp_path / "blank").mkdir()
    blank = save(tmp_path / "blank" / "b.png", np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    assert command.main([*map(str, pair), "--out", str(out), "--matcher", "sift"]) == 0
    assert (out / "a_b_sift_warp.png").is_file()
    capsys.readouterr()
    assert command.main([str(pair[0]), str(blank), "--out", str(out), "--matcher", "sift"]) == 0
    told = capsys.readouterr().out
    assert "0 matches, and a fundamental matrix needs 8" in told
    assert "are drawn" not in told  # there is nothing to draw
    assert not (out / "a_b_sift-2_warp.png").exists()
    assert (out / "a_b_sift_warp.png").exists()  # of other images of these names
    with Image.open(out / "a_b_sift-2_match.png") as picture:
        assert picture.size[0] == 2 * WIDTH + 6
        assert picture.size[1] > 2 * HEIGHT + 40  # names and counts below
    again = [*map(str, pair), "--out", str(out), "--matcher", "sift", "--no-ransac"]
    assert command.main(again) == 0
    assert not (out / "a_b_sift_warp.png").exists()
    assert len(list(out.iterdir())) == 4


def test_results_that_nobody_can_tell_apart_are_kept_both(
    matched: MatchResult, tmp_path: Path
) -> None:
    arrays = [texture(seed=seed) for seed in (0, 1)]
    for result in (matched, match(*arrays, matcher="sift"), match(*arrays, matcher="sift")):
        for _ in range(2):
            result.save(tmp_path, formats=("csv",), pictures=False)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "a_b_sift-2_matches.csv", "a_b_sift_matches.csv", "image0_image1_sift-2_matches.csv",
        "image0_image1_sift-3_matches.csv", "image0_image1_sift-4_matches.csv",
        "image0_image1_sift_matches.csv",
    ]  # fmt: skip


@pytest.mark.weights
def test_an_image_that_is_stored_turned_is_matched_upright(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    turned = save(tmp_path / "b.png", np.rot90(seen_through(TILT, texture())))
    plain = match(pair[0], turned, matcher="xfeat", rotations="none")
    result = match(pair[0], turned, matcher="xfeat")
    assert (plain.rotated_degrees, result.rotated_degrees) == (0, 90)
    assert result.inliers.sum() > 5 * plain.inliers.sum()
    x, y = project(TILT, result.keypoints0[result.inliers]).T
    error = np.linalg.norm(np.c_[y, WIDTH - 1 - x] - result.keypoints1[result.inliers], axis=1)
    assert np.median(error) < 1
    assert "b.png turned by 90°" in result.summary()


@pytest.mark.parametrize("count", [20, 3000])
def test_matches_at_random_are_remarked_upon(matched: MatchResult, count: int) -> None:
    assert matched.remark is None
    random = np.random.default_rng(3)
    xy0, xy1 = random.uniform(0, 1000, (2, count, 2)).astype(np.float32)
    found = fit_geometry(xy0, xy1, FitOptions())
    assert found.problem is None
    assert found.remark is not None
    assert f"of {count} matches" in found.remark


def content(path: Path, kind: str) -> Path:
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pixel":
        save(path, np.zeros((1, 1, 3), np.uint8))
    elif kind == "cut":
        Image.fromarray(texture()).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("kind", "told", "first"),
    [
        ("missing", "There is no image", True),
        ("missing", "There is no image", False),
        ("folder", "is a folder", True),
        ("pipe", "pipe or device", False),
        ("text", "unreadable", True),
        ("empty", "empty", False),
        ("pixel", "tiny", True),
        ("cut", "unreadable", False),
    ],
)
def test_bad_images(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    told: str,
    first: bool,
) -> None:
    bad = content(tmp_path / "bad.png", kind)
    images = [bad, pair[1]] if first else [pair[0], bad]
    out = tmp_path / "out"
    assert command.main([*map(str, images), "--out", str(out), "--matcher", "sift"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert told in message
    assert "bad.png" in message
    assert not out.exists()


def test_one_image_twice(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    link = pair[0].with_name("link.png")
    link.symlink_to(pair[0])
    for other in (pair[0], link):
        assert command.main([str(pair[0]), str(other), "--matcher", "sift"]) == 2
        assert "give two different ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--matcher", "siift"], "Did you mean 'sift'"),
        (["--matcher", "sift", "--device", "nonsense"], "nonsense"),
        (["--matcher", "sift", "--out", "FILE"], "Cannot write"),
        (["--matcher", "gim_dkm"], "gim-weights download gim_dkm_100h.ckpt"),
    ],
)
def test_bad_options(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    told: str,
) -> None:
    from gim_hloc import downloads

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no network in this test")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GIM_HLOC_WEIGHTS", raising=False)
    monkeypatch.setattr(downloads, "_open", unreachable)
    (tmp_path / "file").write_text("in the way")
    arguments = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    assert command.main([*map(str, pair), *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.weights
def test_real_pair(data: Path, tmp_path: Path) -> None:
    folder = data / "pairs" / "homography" / "graf"
    result = match(folder / "img1.png", folder / "img2.png", quality="fast")
    truth = np.loadtxt(folder / "H1to2p")
    inliers = result.inliers
    error = project(truth, result.keypoints0[inliers]) - result.keypoints1[inliers]
    assert inliers.sum() > 300
    assert np.median(np.linalg.norm(error, axis=1)) < 2.0
