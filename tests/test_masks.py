from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gim_hloc.errors import InputError
from gim_hloc.images import Exif, ImageRecord, load, scan
from gim_hloc.masks import MaskFolder
from gim_hloc.types import ImageOptions


def record(name: str, width: int = 100, height: int = 80, orientation: int = 1) -> ImageRecord:
    return ImageRecord(
        name=name,
        path=Path(name),
        width=width,
        height=height,
        sha256="0" * 64,
        exif=Exif(orientation=orientation),
    )


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def half(width: int = 100, height: int = 80) -> np.ndarray:
    """Right half white."""
    array = np.zeros((height, width), np.uint8)
    array[:, width // 2 :] = 255
    return array


def test_finds_colmaps_name_first(tmp_path):
    masks = MaskFolder(tmp_path)
    assert masks.find("cam 0/雪.JPG") is None
    beside = save(tmp_path / "cam 0" / "雪.png", half())
    assert masks.find("cam 0/雪.JPG") == beside
    colmap = save(tmp_path / "cam 0" / "雪.JPG.png", half())
    assert masks.find("cam 0/雪.JPG") == colmap
    assert masks.find("雪.JPG") is None
    save(tmp_path / "a.b.png", half())
    assert masks.find("a.b.jpg") == tmp_path / "a.b.png"
    assert masks.find("a.jpg") is None


def test_beside_the_images_a_png_is_an_image(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg", "b.jpg.png"):
        save(
            tmp_path / name,
            np.random.default_rng(len(name)).integers(0, 255, (80, 100)).astype("u1"),
        )
    masks = MaskFolder(tmp_path, image_root=tmp_path / ".")
    assert masks.find("a.jpg") is None
    assert masks.find("b.jpg") == tmp_path / "b.jpg.png"
    assert MaskFolder(tmp_path, image_root=tmp_path.parent).find("a.jpg") == tmp_path / "a.png"


def test_black_is_ignored_and_eroded_but_not_at_the_borders(tmp_path):
    save(tmp_path / "a.png", half())
    sharp = MaskFolder(tmp_path, erode_px=0).load(record("a.jpg"))
    np.testing.assert_array_equal(sharp, half() > 0)
    eroded = MaskFolder(tmp_path, erode_px=4).load(record("a.jpg"))
    want = np.zeros((80, 100), bool)
    want[:, 54:] = True
    np.testing.assert_array_equal(eroded, want)
    assert MaskFolder(tmp_path).load(record("b.jpg")) is None


def test_erosion_is_round(tmp_path):
    array = np.full((80, 100), 255, np.uint8)
    array[40, 50] = 0
    save(tmp_path / "a.png", array)
    ignored = ~MaskFolder(tmp_path, erode_px=6).load(record("a.jpg"))
    ys, xs = np.nonzero(ignored)
    distance = np.hypot(xs - 50, ys - 40)
    assert distance.max() < 7
    assert ignored.sum() == pytest.approx(np.pi * 6.5**2, rel=0.2)


@pytest.mark.parametrize("kind", ["bool", "rgb", "palette", "rgba", "16 bit"])
def test_any_kind_of_png(tmp_path, kind):
    array = half()
    image = {
        "bool": lambda: Image.fromarray(array > 0),
        "rgb": lambda: Image.fromarray(np.dstack([array * 0, array * 0, array // 255])),
        "rgba": lambda: Image.fromarray(np.dstack([array, array, array, 255 - array])),
        "16 bit": lambda: Image.fromarray((array // 255).astype(np.uint16)),
        "palette": lambda: Image.fromarray(1 - array // 255, mode=None),
    }[kind]()
    if kind == "palette":
        image = image.convert("L")
        image.putpalette([200, 0, 0, 0, 0, 0])  # index 0 is red, index 1 black
    image.save(tmp_path / "a.png")
    got = MaskFolder(tmp_path, erode_px=0).load(record("a.jpg"))
    np.testing.assert_array_equal(got, array > 0)


def test_same_shape_is_resized_with_a_warning_and_another_refused(tmp_path, caplog):
    save(tmp_path / "a.png", half(50, 40))
    masks = MaskFolder(tmp_path, erode_px=0)
    with caplog.at_level(logging.WARNING):
        got = masks.load(record("a.jpg"))
    np.testing.assert_array_equal(got, half() > 0)
    assert "50 x 40" in caplog.text
    assert "100 x 80" in caplog.text
    with pytest.raises(InputError, match=r"50 x 40 pixels, its image a.jpg has 100 x 90"):
        masks.load(record("a.jpg", 100, 90))
    with pytest.raises(InputError, match="upright"):
        masks.load(record("a.jpg", 40, 50, orientation=6))
    with pytest.raises(InputError, match="from the very image"):
        masks.load(record("a.jpg", 40, 50))


def test_hash_tells_content_and_erosion(tmp_path):
    masks = MaskFolder(tmp_path)
    assert masks.sha("a.jpg") is None
    path = save(tmp_path / "a.png", half())
    first = masks.sha("a.jpg")
    assert first == masks.sha("a.jpg")
    assert first != MaskFolder(tmp_path, erode_px=5).sha("a.jpg")
    save(path, 255 - half())
    assert first != masks.sha("a.jpg")


def test_check_describes_what_does_not_fit(tmp_path):
    masks = MaskFolder(tmp_path)
    assert masks.check([]) == []
    (alone,) = masks.check(["x/a.jpg"])
    assert "No image has a mask" in alone
    assert "a.jpg.png" in alone
    save(tmp_path / "a.png", half())
    assert masks.check(["a.jpg"]) == []
    save(tmp_path / "stray" / "s.png", half())
    missing, shared, unused = masks.check(["a.jpg", "a.tif", "b.jpg"])
    assert missing == "1 of 3 images have no mask and are used whole: b.jpg."
    assert "a.jpg, a.tif" in shared
    assert unused == "1 masks belong to no image: stray/s.png."


def test_unusable_folder_or_file_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        MaskFolder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="eroded"):
        MaskFolder(tmp_path, erode_px=-1)
    path = save(tmp_path / "a.png", half())
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        MaskFolder(tmp_path).load(record("a.jpg"))


@pytest.mark.parametrize("orientation", [1, 6])
def test_mask_reaches_the_network_frame(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    array = np.random.default_rng(0).integers(0, 255, (80, 100, 3)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(array).save(tmp_path / "images" / "a.jpg", exif=exif.tobytes())
    save(tmp_path / "masks" / "a.jpg.png", half())
    image = scan(tmp_path / "images")["a.jpg"]
    mask = MaskFolder(tmp_path / "masks", erode_px=0).load(image)
    data = load(image, ImageOptions(max_size=50), mask=mask)
    assert tuple(data.mask.shape) == tuple(data.image.shape[1:])
    ys, xs = np.nonzero(data.mask.numpy())
    stored = np.stack([xs, ys], 1) @ data.to_original[:, :2].T + data.to_original[:, 2]
    assert stored[:, 0].min() > 49.5
    assert len(stored) == data.mask.numel() / 2


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
@pytest.mark.parametrize("colour", [0, 255])
def test_masks_in_alpha_alone(tmp_path, mode, colour):
    keep = half()
    image = Image.merge("LA", [Image.new("L", (100, 80), colour), Image.fromarray(keep)])
    if mode != "PA":
        image.convert(mode).save(tmp_path / "a.png")
    else:  # a palette with a transparent entry
        palette = Image.fromarray(keep // 255)
        palette.putpalette([colour] * 6)
        palette.save(tmp_path / "a.png", transparency=0)
    got = MaskFolder(tmp_path, erode_px=0).load(record("a.jpg"))
    np.testing.assert_array_equal(got, keep > 0)


def test_a_cut_out_photograph_is_a_mask_by_its_alpha(tmp_path):
    colours = np.random.default_rng(0).integers(1, 255, (80, 100, 3)).astype(np.uint8)
    save(tmp_path / "a.png", np.dstack([colours, half()]))
    got = MaskFolder(tmp_path, erode_px=0).load(record("a.jpg"))
    np.testing.assert_array_equal(got, half() > 0)


def test_a_mask_that_leaves_nothing_is_named(tmp_path):
    save(tmp_path / "a.png", np.zeros((80, 100), np.uint8))
    thin = np.zeros((80, 100), np.uint8)
    thin[:, 40:44] = 255
    save(tmp_path / "b.png", thin)
    masks = MaskFolder(tmp_path, erode_px=4)
    assert str(tmp_path / "a.png") in masks.nothing_left(record("a.jpg"))
    assert "erosion by 4 px" in masks.nothing_left(record("b.jpg"))
    assert MaskFolder(tmp_path, erode_px=1).nothing_left(record("b.jpg")) is None
    assert masks.nothing_left(record("c.jpg")) is None


@pytest.mark.skipif(os.name == "nt", reason="makes a pipe")
def test_a_pipe_is_no_mask(tmp_path):
    os.mkfifo(tmp_path / "a.jpg.png")
    assert MaskFolder(tmp_path).load(record("a.jpg")) is None


@pytest.mark.parametrize("excluded", [".", "../images", "link"])
def test_masks_beside_the_images_leave_the_images(tmp_path, excluded):
    folder = tmp_path / "images"
    for i, name in enumerate(("a.jpg", "b.jpg")):
        save(folder / name, np.random.default_rng(i).integers(0, 255, (80, 100)).astype("u1"))
    save(folder / "a.jpg.png", half())
    (tmp_path / "link").symlink_to(folder)
    where = folder / excluded if excluded != "link" else tmp_path / "link"
    assert scan(folder, exclude=[where]).names == ["a.jpg", "b.jpg"]
