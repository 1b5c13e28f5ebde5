"""What other programs left among the images is passed over; images of the user never are."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from gim_hloc.images import scan

OWN = ("a.jpg", "b.jpg")


def put(root: Path, *names: str, size: tuple[int, int] = (160, 120), mode: str = "RGB") -> None:
    """Write pictures that all differ."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(name.encode())
        pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)


def check(root: Path, caplog: pytest.LogCaptureFixture, *own: str) -> str:
    with caplog.at_level(logging.WARNING):
        found = scan(root)
    assert found.names == sorted(own)
    assert found.rejected == ()
    return caplog.text


@pytest.mark.parametrize("base", ["", "images/"])
@pytest.mark.parametrize(
    "products",
    [
        ("images_2/a.jpg", "images_2/b.png", "images_4/a.jpg", "images_8/a.jpg"),
        ("masks/a.png", "masks/b.jpg.png"),
        ("depths/a.png", "depths_2/b.png"),
        ("normal_maps/a_normal.png",),
        ("segmentation/depth_a.png",),
    ],
)
def test_copies_maps_and_masks_of_images_here_are_passed_over(tmp_path, caplog, base, products):
    own = [base + name for name in OWN]
    put(tmp_path, *own)
    for name in products:
        factor = int(name[7]) if name.startswith("images_") else 1
        put(tmp_path, name, size=(max(160 // factor, 64), max(120 // factor, 64)))
    if products[0].startswith("images_"):
        (tmp_path / "images_4/a.jpg").unlink()  # 160 x 120 would be below the least size
        (tmp_path / "images_8/a.jpg").unlink()
        put(tmp_path, *own, size=(1280, 960))
        for factor in (2, 4, 8):
            for name in ("a.jpg", "b.png"):
                put(tmp_path, f"images_{factor}/{name}", size=(1280 // factor, 960 // factor))
    text = check(tmp_path, caplog, *own)
    folder = products[0].split("/")[0]
    assert f"in {folder}: " in text
    assert "give that folder as IMAGES" in text


def test_files_beside_the_images(tmp_path, caplog):
    put(tmp_path, "x/a.jpg", "x/a.jpg.png", "x/a_mask.png", "x/dynamic_mask_a.png")
    put(tmp_path, "seq/frame-0.color.png", "seq/frame-0.depth.png")
    text = check(tmp_path, caplog, "x/a.jpg", "seq/frame-0.color.png")
    assert "Passed over 3 pictures beside the images, such as seq/frame-0.depth.png: " in text
    assert "Passed over 1 picture beside the images, such as x/a.jpg.png: masks" in text


@pytest.mark.parametrize("place", ["dense", "colmap/dense/0", "."])
def test_undistorted_copies_of_colmap(tmp_path, caplog, place):
    put(tmp_path, "input/cam0/a.jpg", "input/cam1/a.jpg")
    put(tmp_path, *(f"{place}/images/cam{i}/a.jpg" for i in (0, 1)), size=(158, 119))
    (tmp_path / place / "stereo").mkdir()
    assert "COLMAP" in check(tmp_path, caplog, "input/cam0/a.jpg", "input/cam1/a.jpg")


def test_undistorted_images_alone_are_images(tmp_path, caplog):
    put(tmp_path, "dense/images/a.jpg", "dense/images/b.jpg")
    (tmp_path / "dense" / "stereo").mkdir()
    assert check(tmp_path, caplog, "dense/images/a.jpg", "dense/images/b.jpg") == ""


def test_a_run_of_ours_inside_the_images(tmp_path, caplog):
    put(tmp_path, "a.jpg", "out/dense/images/a.jpg", "out/export/0/3dgs/images/cam0_a.jpg")
    put(tmp_path.parent / "elsewhere", "b.jpg")
    (tmp_path / "out" / "images").mkdir()
    (tmp_path / "out" / "images" / "b.jpg").symlink_to(tmp_path.parent / "elsewhere" / "b.jpg")
    for marker in ("run.yaml", "database.db"):
        (tmp_path / "out" / marker).touch()
    assert "out/export" in check(tmp_path, caplog, "a.jpg")


def test_photographs_in_the_folder_of_a_run_stay(tmp_path, caplog):
    put(tmp_path, "day1/images/a.jpg", "day2/images/a.jpg")
    for marker in ("run.yaml", "database.db", "sparse"):
        (tmp_path / "day1" / marker).touch()
    assert check(tmp_path, caplog, "day1/images/a.jpg", "day2/images/a.jpg") == ""


@pytest.mark.parametrize(
    "own",
    [
        ("cam0/1.jpg", "cam0/2.jpg", "cam1/1.jpg", "cam1/2.jpg"),
        ("images/1.jpg", "images_2/1.jpg"),  # a second walk, not half as large
        ("images_1/1.jpg", "images_2/1.jpg"),
        ("images_4/1.jpg", "images_4/2.jpg"),
        ("masks/1.jpg", "masks/2.jpg"),  # of a carnival
        ("depths/1.jpg", "faces/2.jpg"),
        ("normal/1.jpg", "thermal/1.jpg", "normal_photos/1.jpg", "masked_men/1.jpg"),
        ("1.jpg", "1.2.jpg", "1.jpeg"),
        ("unmask.jpg", "a_mask.jpg"),
        ("dense/1.jpg", "export/2.jpg", "1.jpg"),
    ],
)
def test_images_of_the_user_stay(tmp_path, caplog, own):
    put(tmp_path, *own)
    assert check(tmp_path, caplog, *own) == ""


def test_depth_maps_under_names_of_their_own(tmp_path, caplog):
    put(tmp_path, "rgb/1.01.png", "rgb/2.02.png")
    (tmp_path / "depth").mkdir()
    depth = np.random.default_rng(0).integers(500, 9000, (120, 160)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "depth" / "1.03.png"), depth)
    assert "1 picture in depth: masks or maps" in check(
        tmp_path, caplog, "rgb/1.01.png", "rgb/2.02.png"
    )


def test_pictures_of_gim_match(tmp_path, caplog):
    put(tmp_path, "a.jpg", "b.jpg", "a_b_sift_match.png", "c_match.png")
    (tmp_path / "a_b_sift_matches.npz").touch()
    assert "gim-match" in check(tmp_path, caplog, "a.jpg", "b.jpg", "c_match.png")
