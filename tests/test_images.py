from __future__ import annotations

import csv
import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from gim_hloc import images
from gim_hloc.errors import InputError
from gim_hloc.images import (
    Exif,
    ImageRecord,
    doubtful_focal,
    focal_prior,
    load,
    network_size,
    orientation_affine,
    read_rgb,
    require_usable,
    scan,
)
from gim_hloc.types import ImageOptions, apply_affine, invert_affine

SHARED = Path(__file__).parents[2] / "shared" / "data"
ODD = SHARED / "odd"
needs_odd = pytest.mark.skipif(not ODD.is_dir(), reason="shared/data/odd is not here")

FULL = ImageOptions(max_size=None)
ORIENTATIONS = range(1, 9)
TURNS = (1, 3, 6, 8)  # orientations that do not mirror
MIRRORED = (2, 4, 5, 7)


def photo(width: int = 160, height: int = 120, seed: int = 0) -> np.ndarray:
    """A smooth colour picture that survives JPEG, uint8 (H, W, 3)."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    low, high = smooth.min(), smooth.max()
    return ((smooth - low) / (high - low) * 255).astype(np.uint8)


def save(path: Path, array: np.ndarray, *, orientation: int | None = None, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if orientation is not None and path.suffix == ".tif":
        kwargs["tiffinfo"] = {274: orientation}
    elif orientation is not None:
        exif = Image.Exif()
        exif[274] = orientation
        kwargs["exif"] = exif.tobytes()
    image.save(path, **kwargs)
    return path


def only(root: Path, name: str) -> ImageRecord:
    return scan(root)[name]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def centroid(channel: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y) in hloc's frame."""
    ys, xs = np.mgrid[: channel.shape[0], : channel.shape[1]]
    return np.array([(xs * channel).sum(), (ys * channel).sum()]) / channel.sum()


# ------------------------------------------------------------------------------------------ listing


def test_finds_every_suffix_at_any_depth_by_posix_name(tmp_path):
    names = [
        "a.JPG",
        "b.Jpeg",
        "c.png",
        "deep/er still/雪 ünï (1).tif",
        "deep/c.png",
        "e.TIFF",
        "f.bmp",
        "g.webp",
    ]
    for seed, name in enumerate(names):
        save(tmp_path / name, photo(seed=seed))
    for name in (
        "x.txt",
        "x.mp4",
        "._a.jpg",
        ".hidden/a.jpg",
        "Thumbs.db",
        "__MACOSX/b.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    found = scan(tmp_path)
    assert found.names == sorted(names)
    assert found.rejected == ()
    assert found["deep/c.png"].path == tmp_path / "deep" / "c.png"


def test_pictures_in_formats_that_are_not_read_are_named(tmp_path):
    save(tmp_path / "a.jpg", photo(seed=1))
    for name in ("a.NEF", "sub/b.nef", "c.GIF"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GIF89a")
    found = scan(tmp_path)
    assert found.names == ["a.jpg"]  # a.NEF is its raw file
    assert [str(r) for r in found.rejected] == [
        "c.GIF: unreadable (GIF is not read; save it as PNG or JPEG)",
        "sub/b.nef: unreadable (NEF is not read; save it as PNG or JPEG)",
    ]


def test_bad_files_are_named_with_a_reason_and_the_rest_goes_on(tmp_path):
    save(tmp_path / "m.jpg", photo(seed=1))
    save(tmp_path / "z.jpg", photo(seed=2))
    save(tmp_path / "tiny.png", photo(63, 200))
    save(tmp_path / "just.png", photo(64, 64))
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "m.jpg").read_bytes())
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    for suffix in ("jpg", "png", "webp", "tif", "bmp"):
        whole = save(tmp_path / f"cut.{suffix}", photo(seed=3)).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) * 2 // 5])
    found = scan(tmp_path)
    assert found.names == ["copy.jpg", "just.png", "z.jpg"]
    reasons = {rejected.name: rejected.reason for rejected in found.rejected}
    cut = {f"cut.{suffix}": "unreadable" for suffix in ("jpg", "png", "webp", "tif", "bmp")}
    assert reasons == {
        **cut,
        "empty.jpg": "empty",
        "m.jpg": "duplicate",
        "text.jpg": "unreadable",
        "tiny.png": "tiny",
    }
    details = {rejected.name: rejected.detail for rejected in found.rejected}
    assert details["m.jpg"] == "same bytes as copy.jpg"
    assert details["tiny.png"] == "63 x 200 pixels, below 64"
    assert details["cut.jpg"].startswith("JPEG: ")
    assert "truncated" in details["cut.jpg"]


def test_result_does_not_depend_on_threads(tmp_path):
    for i in range(12):
        save(tmp_path / f"{i:02}.png", photo(80, 70, seed=i // 2))
    one, many = scan(tmp_path, workers=1), scan(tmp_path, workers=5)
    assert one == many
    assert one.names == [f"{i:02}.png" for i in range(0, 12, 2)]


@pytest.mark.skipif(os.name == "nt", reason="Windows forbids such names")
def test_names_that_no_text_file_can_hold_are_rejected(tmp_path):
    good = save(tmp_path / "good.png", photo())
    for name in (b"tab\there.png", b"new\nline.png", b"latin\xe9.png"):
        try:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(good.read_bytes())
        except OSError:
            pytest.skip("this file system refuses such names")
    found = scan(tmp_path)
    assert found.names == ["good.png"]
    assert sorted(r.name for r in found.rejected) == [
        "latin\\udce9.png",
        "new\\x0aline.png",
        "tab\\x09here.png",
    ]
    assert all(r.reason == "unreadable" and "rename" in r.detail for r in found.rejected)


def test_masks_beside_images_and_excluded_folders_are_no_images(tmp_path):
    for seed, name in enumerate(("a.jpg", "a.jpg.png", "b.png.png", "out/thumb.jpg")):
        save(tmp_path / name, photo(seed=seed))
    assert scan(tmp_path, exclude=[tmp_path / "out"]).names == ["a.jpg", "b.png.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_folders_are_followed_once(tmp_path):
    save(tmp_path / "images" / "a.jpg", photo(seed=1))
    save(tmp_path / "elsewhere" / "b.jpg", photo(seed=2))
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    found = scan(tmp_path / "images")
    assert found.names == ["a.jpg", "link/b.jpg"]
    assert found.rejected == ()  # no file twice


def test_given_names_are_taken_and_missing_ones_refused(tmp_path):
    for seed, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        save(tmp_path / name, photo(seed=seed))
    assert scan(tmp_path, names=["c.jpg", "a.jpg", "c.jpg"]).names == ["a.jpg", "c.jpg"]
    with pytest.raises(InputError, match=r"d\.jpg"):
        scan(tmp_path, names=["a.jpg", "d.jpg"])
    for name in ("../a.jpg", str(tmp_path / "a.jpg"), "./a.jpg"):
        with pytest.raises(InputError, match="relative"):
            scan(tmp_path, names=[name])


def test_root_must_be_a_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        scan(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        scan(tmp_path / "file")


def test_too_few_images_is_an_error_that_names_the_rest(tmp_path):
    with pytest.raises(InputError, match=r"0 usable images; 2 are needed.*jpeg"):
        require_usable(scan(tmp_path))
    save(tmp_path / "a.jpg", photo())
    (tmp_path / "empty.jpg").touch()
    found = scan(tmp_path)
    with pytest.raises(InputError, match=r"1 usable image; 2(?s:.*)empty\.jpg: empty") as caught:
        require_usable(found)
    assert caught.value.exit_code == 2
    require_usable(found, minimum=1)


@needs_odd
def test_odd_files():
    found = scan(ODD)
    rejected = {r.name: r.reason for r in found.rejected}
    assert rejected == {
        "animated.gif": "unreadable",
        "still.gif": "unreadable",
        "empty.jpg": "empty",
        "header_only.jpg": "unreadable",
        "identical_b.jpg": "duplicate",
        "nested/cam1/a.jpg": "duplicate",  # of PHOTO.JPEG
        "odd_size_639x51.jpg": "tiny",
        "one_pixel.png": "tiny",
        "text.jpg": "unreadable",
        "tiny.jpg": "tiny",
        "truncated.jpg": "unreadable",
    }
    with open(ODD / "manifest.csv", encoding="utf-8") as file:
        listed = {row["file"] for row in csv.DictReader(file)}
    not_images = {name for name in listed if name.endswith((".mp4", ".db"))}
    not_images.add("nested/._a.jpg")
    assert set(found.names) | set(rejected) == listed - not_images
    for record in found:
        data = load(record, ImageOptions(max_size=320, multiple_of=8))
        assert data.image.shape[0] == 3
        assert max(data.network_size) == 320
        assert data.image.isfinite().all()


# ------------------------------------------------------------------------------------ kinds of file


def test_all_kinds_of_8_bit_files_give_the_same_rgb(tmp_path):
    rgb = photo()
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    gray3 = np.repeat(gray[..., None], 3, axis=2)
    save(tmp_path / "rgb.png", rgb)
    save(tmp_path / "rgb.tif", rgb, compression="tiff_lzw")
    save(tmp_path / "rgb.bmp", rgb)
    save(tmp_path / "rgb.webp", rgb, lossless=True)
    save(tmp_path / "gray.png", gray)
    save(tmp_path / "gray.tif", gray)
    Image.fromarray(gray).convert("P").save(tmp_path / "palette.png")
    (tmp_path / "png_named.jpg").write_bytes(save(tmp_path / "rgb.png", rgb).read_bytes())
    for name in ("rgb.png", "rgb.tif", "rgb.bmp", "rgb.webp", "png_named.jpg"):
        np.testing.assert_array_equal(read_rgb(tmp_path / name), rgb, err_msg=name)
    for name in ("gray.png", "gray.tif", "palette.png"):
        np.testing.assert_array_equal(read_rgb(tmp_path / name), gray3, err_msg=name)
    save(tmp_path / "progressive.jpg", rgb, quality=95, subsampling=0, progressive=True)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert psnr(read_rgb(tmp_path / "progressive.jpg"), rgb) > 40
    assert psnr(read_rgb(tmp_path / "cmyk.jpg"), rgb) > 38


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("colour", [False, True])
def test_deep_images_look_like_8_bit_ones(tmp_path, suffix, bits, colour):
    rgb = photo()
    want = rgb if colour else np.repeat(rgb[..., :1], 3, axis=2)
    deep = (want.astype(np.float64) * ((1 << bits) - 1) / 255).round().astype(np.uint16)
    path = tmp_path / f"deep.{suffix}"
    cv2.imwrite(str(path), deep[..., ::-1] if colour else deep[..., 0])
    np.testing.assert_array_equal(read_rgb(path), want)
    assert only(tmp_path, path.name).size == (160, 120)


def test_deep_image_with_a_narrow_range_or_a_hot_pixel_is_stretched(tmp_path):
    truth = photo()[..., 0]
    thermal = truth.astype(np.uint16) * 2 + 7000
    cv2.imwrite(str(tmp_path / "thermal.png"), thermal)
    hot = truth.astype(np.uint16) * 4
    hot[5, 5] = 65535
    cv2.imwrite(str(tmp_path / "hot.png"), hot)
    for name in ("thermal.png", "hot.png"):
        got = read_rgb(tmp_path / name)[..., 0].astype(float)
        assert np.corrcoef(got.ravel(), truth.ravel())[0, 1] > 0.98, name
        assert got.std() > 0.8 * truth.std(), name


def test_floating_point_tiff(tmp_path):
    truth = photo()[..., 0]
    unit = np.clip(truth / 255.0, 0, 1).astype(np.float32)
    Image.fromarray(unit).save(tmp_path / "unit.tif")
    np.testing.assert_array_equal(read_rgb(tmp_path / "unit.tif")[..., 0], truth)
    wide = unit * 5000 - 1000
    wide[0, 0] = np.nan
    Image.fromarray(wide).save(tmp_path / "wide.tif")
    got = read_rgb(tmp_path / "wide.tif")[..., 0].astype(float)
    assert np.corrcoef(got[1:].ravel(), truth[1:].ravel())[0, 1] > 0.999


def test_transparent_pixels_keep_their_colour_and_give_no_keypoints(tmp_path):
    rgb = photo()
    alpha = np.full((120, 160), 255, np.uint8)
    alpha[:, :40] = 0
    alpha[:, 40:60] = 7
    save(tmp_path / "rgba.png", np.dstack([rgb, alpha]))
    save(tmp_path / "opaque.png", np.dstack([rgb, np.full_like(alpha, 255)]))
    np.testing.assert_array_equal(read_rgb(tmp_path / "rgba.png"), rgb)
    images = scan(tmp_path)
    assert load(images["opaque.png"], FULL).mask is None
    mask = load(images["rgba.png"], FULL).mask
    np.testing.assert_array_equal(mask.numpy(), alpha > 0)
    half = load(images["rgba.png"], ImageOptions(max_size=80)).mask
    np.testing.assert_array_equal(half.numpy(), alpha[::2, ::2] > 0)


@needs_odd
def test_odd_16_bit_and_cmyk_show_the_same_picture_as_8_bit():
    photo_8bit = read_rgb(ODD / "exif_orientation6.jpg")
    assert psnr(read_rgb(ODD / "cmyk.jpg"), photo_8bit) > 30
    a, b = read_rgb(ODD / "gray16.png"), read_rgb(ODD / "gray16_10bit.png")
    assert psnr(a, b) > 40
    for picture in (a, b):
        assert 60 < picture.mean() < 160
        assert picture.std() > 25
        assert np.mean((picture == 0) | (picture == 255)) < 0.01


def test_heif(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    rgb = photo()
    pillow_heif.from_pillow(Image.fromarray(rgb)).save(tmp_path / "a.HEIC", quality=95)
    record = only(tmp_path, "a.HEIC")
    assert record.size == (160, 120)
    assert psnr(read_rgb(record), rgb) > 30
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    (rejected,) = scan(tmp_path).rejected
    assert rejected.reason == "unreadable"
    assert "gim-hloc[heif]" in rejected.detail


# --------------------------------------------------------------------------------------------- EXIF


def save_with_exif(path: Path, photo_ifd: dict, gps: dict | None = None) -> Path:
    exif = Image.Exif()
    exif[271], exif[272] = "Maker\0", "Model 1"
    exif.get_ifd(0x8769).update(photo_ifd)
    if gps:
        exif.get_ifd(0x8825).update(gps)
    Image.fromarray(photo(400, 300)).save(path, exif=exif.tobytes())
    return path


def test_exif_values_and_focal_priors(tmp_path):
    gps = {1: "S", 2: (48.0, 30.0, 36.0), 3: "E", 4: (11.0, 15.0, 0.0), 5: b"\x01", 6: 12.5}
    save_with_exif(tmp_path / "film.jpg", {37386: 7.0, 41989: 26}, gps)
    sensor = {37386: 10.0, 41486: 2540.0, 41488: 2, 40962: 2000, 40963: 1500}
    save_with_exif(tmp_path / "sensor.jpg", sensor)
    save_with_exif(tmp_path / "neither.jpg", {37386: 10.0, 41989: 0})
    images = scan(tmp_path)
    film = images["film.jpg"]
    assert (film.exif.make, film.exif.model) == ("Maker", "Model 1")
    assert film.exif.gps == pytest.approx((-48.51, 11.25, -12.5))
    assert focal_prior(film) == pytest.approx(26 / 43.27 * 500)
    assert images["sensor.jpg"].exif.sensor_mm == pytest.approx(20.0)
    assert focal_prior(images["sensor.jpg"]) == pytest.approx(10 / 20 * 400)
    assert images["neither.jpg"].exif.focal_35mm is None
    assert focal_prior(images["neither.jpg"]) is None
    assert [doubtful_focal(image) for image in images] == [None, None, None]


@pytest.mark.parametrize(
    ("exif", "focal_px", "doubt"),
    [
        ({41989: 1}, None, "1 mm on 35 mm film, a field of view of 173 degrees"),
        ({41989: 65535}, None, "65535 mm on 35 mm film, a field of view of 0.0"),
        ({37386: 4.3, 41989: 4}, None, "4 mm on 35 mm film, a field of view of 15"),
        # What is left is used: 4.3 mm on a sensor of 6 mm.
        (
            {41989: 4, 37386: 4.3, 41486: 2540.0, 41488: 2, 40962: 600, 40963: 450},
            4.3 / 6 * 400,
            "4 mm on 35 mm film",
        ),
        (
            {37386: 28.0, 41486: 40000.0, 41488: 3, 40962: 2880, 40963: 2160},
            None,
            "28 mm on a sensor of 0.72 mm, which no camera has",
        ),
        # The resolution is of before resizing: 35 mm film says otherwise.
        (
            {37386: 28.0, 41989: 28, 41486: 111.1, 41488: 4, 40962: 800, 40963: 600},
            None,
            "28 mm on 35 mm film but 28 mm on a sensor of 7.2 mm",
        ),
        ({41989: 26, 40962: 4000, 40963: 2250}, None, "before it was cropped"),
        ({41989: 26, 40962: 3000, 40963: 4000}, 26 / 43.27 * 500, None),  # turned, not cropped
        ({41989: 9}, 9 / 43.27 * 500, None),
        ({41989: 400}, 400 / 43.27 * 500, None),
    ],
)
def test_implausible_focal_lengths_are_no_prior(tmp_path, exif, focal_px, doubt):
    save_with_exif(tmp_path / "a.jpg", exif)
    record = only(tmp_path, "a.jpg")
    assert focal_prior(record) == (None if focal_px is None else pytest.approx(focal_px, rel=1e-3))
    if doubt is None:
        assert doubtful_focal(record) is None
    else:
        assert doubt in doubtful_focal(record)


def test_damaged_exif_does_not_spoil_the_image(tmp_path):
    data = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photo()).save(data, "JPEG", exif=exif.tobytes())
    broken = bytearray(data.getvalue())
    at = broken.index(b"Exif\0\0") + 6
    broken[at + 4 : at + 8] = b"\xff\xff\xff\xff"  # the first directory lies outside the file
    (tmp_path / "a.jpg").write_bytes(bytes(broken))
    record = only(tmp_path, "a.jpg")
    assert record.exif == Exif()


def test_colmap_reads_the_same_size_focal_length_and_position(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    gps = {1: "N", 2: (48.0, 30.0, 36.0), 3: "W", 4: (11.0, 15.0, 0.0), 5: b"\0", 6: 12.5}
    save_with_exif(tmp_path / "a.jpg", {37386: 7.0, 41989: 26}, gps)
    save(tmp_path / "b.jpg", photo(), orientation=6)
    save(tmp_path / "c.tif", photo(seed=1), orientation=8)
    save(tmp_path / "d.png", photo(seed=2), orientation=3)
    for record in scan(tmp_path):
        bitmap = pycolmap.Bitmap.read(str(record.path), True)
        assert record.size == (bitmap.width, bitmap.height), record.name
        colours = read_rgb(record, upright=False)
        assert psnr(colours + 0.1, bitmap.to_array()) > 40, record.name
        if record.name == "a.jpg":
            assert focal_prior(record) == pytest.approx(bitmap.exif_focal_length(), rel=1e-4)
            latitude, longitude, altitude = record.exif.gps
            assert latitude == pytest.approx(bitmap.exif_latitude(), abs=1e-6)
            assert longitude == pytest.approx(bitmap.exif_longitude(), abs=1e-6)
            assert altitude == pytest.approx(bitmap.exif_altitude(), abs=1e-6)


# ------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_pixel_found_upright_maps_back_to_its_stored_place(tmp_path, suffix, orientation):
    stored = np.zeros((70, 90, 3), np.uint8)
    marks = {0: (3, 5), 1: (80, 11), 2: (41, 66)}  # channel -> stored x, y
    for channel, (x, y) in marks.items():
        stored[y, x, channel] = 255
    path = tmp_path / f"a.{suffix}"
    save(path, stored, orientation=orientation, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_rgb(path), upright)
    np.testing.assert_array_equal(read_rgb(path, upright=False), stored)
    found = scan(tmp_path)
    if orientation in MIRRORED:
        (rejected,) = found.rejected
        assert rejected.reason == "mirrored"
        assert f"EXIF orientation {orientation}" in rejected.detail
        assert "-auto-orient" in rejected.detail
        assert scan(tmp_path, upright=False)[path.name].exif.orientation == 1
        return
    record = found[path.name]
    assert record.size == (90, 70)
    assert record.exif.orientation == orientation
    data = load(record, FULL)
    assert data.network_size == record.upright_size
    np.testing.assert_array_equal(data.to_original, record.upright_to_stored)
    for channel, mark in marks.items():
        y, x = np.unravel_index(int(data.image[channel].argmax()), data.image.shape[1:])
        np.testing.assert_array_equal(data.to_original @ [x, y, 1], mark)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_deep_tiff_is_turned_once(tmp_path, orientation):
    deep = (photo()[..., 0].astype(np.uint16) * 257)[:, :100]
    rgb = np.dstack([deep, deep // 2, deep // 3])
    cv2.imwrite(str(tmp_path / "a.tif"), rgb[..., ::-1])
    data = bytearray((tmp_path / "a.tif").read_bytes())
    # An unused tag of the file becomes its orientation.
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[339] is not None
    (start,) = np.frombuffer(data, "<u4", 1, 4)
    (count,) = np.frombuffer(data, "<u2", 1, int(start))
    for entry in range(int(start) + 2, int(start) + 2 + 12 * int(count), 12):
        if data[entry : entry + 2] == b"\x53\x01":
            data[entry : entry + 12] = np.array([274, 3, 1, 0, orientation, 0], "<u2").tobytes()
    (tmp_path / "a.tif").write_bytes(data)
    record = only(tmp_path, "a.tif")
    assert record.exif.orientation == orientation
    assert record.size == (100, 120)
    np.testing.assert_array_equal(read_rgb(record, upright=False)[..., 0], deep // 257)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1003, 761), ImageOptions(max_size=640)),
        ((1003, 761), ImageOptions(max_size=400, multiple_of=32, grayscale=True)),
        ((301, 227), ImageOptions(max_size=640, upsample=True, multiple_of=8)),
        # A JPEG decoder gives 1/4 of this one: 501 x 376, whose last column and row are cut.
        ((2003, 1501), ImageOptions(max_size=490)),
        ((2003, 1501), ImageOptions(max_size=240, multiple_of=14)),
    ],
)
def test_a_blob_maps_back_to_where_it_was_drawn(tmp_path, orientation, size, options):
    width, height = size
    true = np.array([0.31 * width + 0.37, 0.62 * height - 0.21])
    xs, ys = np.arange(width) - true[0], np.arange(height) - true[1]
    sigma = 0.05 * width
    blob = 250 * np.exp(-0.5 * (ys[:, None] ** 2 + xs**2) / sigma**2)
    array = np.repeat(np.rint(blob).astype(np.uint8)[..., None], 3, axis=2)
    save(tmp_path / "a.jpg", array, orientation=orientation, quality=98)
    data = load(only(tmp_path, "a.jpg"), options)
    channel = data.image[0].double().numpy()
    channel = np.clip(channel - 0.02, 0, None)  # what JPEG leaves in the dark
    found = data.to_original @ [*centroid(channel), 1]
    np.testing.assert_allclose(found, true, atol=0.02)


@given(
    orientation=st.sampled_from(ORIENTATIONS),
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
)
def test_orientation_affine_is_a_bijection_of_the_pixels(orientation, width, height):
    upright = (height, width) if orientation >= 5 else (width, height)
    matrix = orientation_affine(orientation, width, height)
    corners = np.array([[0, 0], [upright[0] - 1, 0], [0, upright[1] - 1]], float)
    mapped = corners @ matrix[:, :2].T + matrix[:, 2]
    assert set(mapped.ravel()) <= {0.0, width - 1.0, height - 1.0}
    assert (mapped >= 0).all()
    assert (mapped <= [width - 1, height - 1]).all()
    assert abs(np.linalg.det(matrix[:, :2])) == pytest.approx(1)
    back = mapped @ invert_affine(matrix)[:, :2].T + invert_affine(matrix)[:, 2]
    np.testing.assert_allclose(back, corners, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    width=st.integers(64, 300),
    height=st.integers(64, 300),
    max_size=st.one_of(st.none(), st.integers(40, 400)),
    multiple_of=st.sampled_from([1, 8, 14, 32]),
    upsample=st.booleans(),
)
def test_network_corners_cover_the_stored_image(
    tmp_path_factory, orientation, width, height, max_size, multiple_of, upsample
):
    root = tmp_path_factory.mktemp("images")
    save(root / "a.bmp", np.zeros((height, width, 3), np.uint8))
    record = only(root, "a.bmp")
    record = ImageRecord(**{**vars(record), "exif": Exif(orientation=orientation)})
    options = ImageOptions(max_size=max_size, multiple_of=multiple_of, upsample=upsample)
    data = load(record, options)
    w, h = data.network_size
    assert (w, h) == network_size(*record.upright_size, options)
    assert w % multiple_of == h % multiple_of == 0
    if max_size is not None:
        assert max(w, h) <= max(max_size, multiple_of)
    # The outer edges of the tensor are those of the stored image, but for what a reduction by
    # 2, 4 or 8 leaves over on the right and at the bottom.
    edges = np.array([[-0.5, -0.5], [w - 0.5, h - 0.5]])
    mapped = edges @ data.to_original[:, :2].T + data.to_original[:, 2]
    low, high = mapped.min(axis=0), mapped.max(axis=0)
    np.testing.assert_allclose(low, -0.5, atol=1e-9)
    assert (high <= np.array([width, height]) - 0.5 + 1e-9).all()
    assert (high > np.array([width, height]) - 0.5 - 8).all()
    if max_size is None or max(width, height) < 2 * max(w, h):
        np.testing.assert_allclose(high, np.array([width, height]) - 0.5, atol=1e-9)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("max_size", [None, 150, 77])
def test_mask_and_image_move_together(tmp_path, orientation, max_size):
    allowed = np.zeros((201, 303), bool)
    allowed[30:150, 20:170] = True
    array = np.repeat(allowed[..., None] * np.uint8(255), 3, axis=2)
    save(tmp_path / "a.png", array, orientation=orientation)
    data = load(only(tmp_path, "a.png"), ImageOptions(max_size=max_size), mask=allowed)
    value = data.image[0].numpy()
    whole = (value < 0.01) | (value > 0.99)  # not on the edge, where a network pixel is part in
    np.testing.assert_array_equal(data.mask.numpy()[whole], value[whole] > 0.5)
    assert whole.mean() > 0.95


def test_mask_of_another_size_is_refused(tmp_path):
    save(tmp_path / "a.png", photo(160, 120))
    with pytest.raises(InputError, match="120 x 160 pixels, the image has 160 x 120"):
        load(only(tmp_path, "a.png"), FULL, mask=np.ones((160, 120), bool))


def test_gray_and_reduced_reading(tmp_path):
    rgb = photo(640, 480)
    save(tmp_path / "a.png", rgb)
    record = only(tmp_path, "a.png")
    gray = load(record, ImageOptions(max_size=None, grayscale=True)).image
    want = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    np.testing.assert_allclose(gray[0].numpy() * 255, want, atol=1e-4)
    small = load(record, ImageOptions(max_size=160)).image.permute(1, 2, 0).numpy() * 255
    boxes = rgb.reshape(120, 4, 160, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(small, boxes, atol=0.6)
    assert read_rgb(record, max_size=100).shape == (75, 100, 3)
    assert read_rgb(record, max_size=9999).shape == (480, 640, 3)


def test_a_jpeg_decoded_at_a_fraction_shows_the_same_picture(tmp_path):
    save(tmp_path / "a.jpg", photo(1601, 1203), quality=95)
    record = only(tmp_path, "a.jpg")
    small = load(record, ImageOptions(max_size=300))
    whole = load(record, FULL)
    points = np.stack(np.meshgrid(np.arange(5, 290, 7), np.arange(5, 220, 7)), -1).reshape(-1, 2)
    stored = points @ small.to_original[:, :2].T + small.to_original[:, 2]
    blurred = cv2.blur(whole.image.permute(1, 2, 0).numpy(), (5, 5))
    columns, rows = stored.astype(np.float32).T[..., None]
    there = cv2.remap(blurred, columns, rows, cv2.INTER_LINEAR)
    here = small.image.permute(1, 2, 0).numpy()[points[:, 1], points[:, 0]]
    assert psnr(here * 255, there[:, 0] * 255) > 38


def test_a_file_that_changed_after_the_scan_is_an_error(tmp_path):
    path = save(tmp_path / "a.png", photo(160, 120))
    record = only(tmp_path, "a.png")
    save(path, photo(120, 160))
    with pytest.raises(InputError, match="changed"):
        load(record, FULL)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"a\.png cannot be read: PNG"):
        load(record, FULL)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        load(record, FULL)


def test_apply_affine_agrees_with_the_record(tmp_path):
    torch = pytest.importorskip("torch")
    save(tmp_path / "a.png", photo(90, 70), orientation=6)
    data = load(only(tmp_path, "a.png"), FULL)
    corner = apply_affine(data.to_original, torch.tensor([[0.0, 0.0], [69.0, 89.0]]))
    assert corner.tolist() == [[0.0, 69.0], [89.0, 0.0]]


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_huge_images_are_decoded_one_at_a_time(tmp_path):
    pixels = 6200 * 5500
    save(tmp_path / "a.png", np.full((5500, 6200, 3), (10, 200, 30), np.uint8), compress_level=1)
    data = (tmp_path / "a.png").read_bytes()
    for name in "bc":
        (tmp_path / f"{name}.png").write_bytes(data + name.encode())
    code = f"""
import warnings
import torch
from PIL import Image
warnings.simplefilter("error", Image.DecompressionBombWarning)
from gim_hloc.images import load, scan
from gim_hloc.types import ImageOptions
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1e3
limit = Image.MAX_IMAGE_PIXELS
base = peak()
images = scan({str(tmp_path)!r}, workers=3)
assert images.names == ["a.png", "b.png", "c.png"], images
image = load(images["a.png"], ImageOptions(max_size=1024)).image
assert max(image.shape) == 1024
assert Image.MAX_IMAGE_PIXELS == limit
print(peak() - base)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # else glibc keeps some freed MB a thread
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # One decoded image at 4 bytes a pixel and some room, but not two.
    assert float(done.stdout) < 1.7 * 4 * pixels / 1e6


def test_more_pixels_than_the_limit_are_refused_before_decoding(tmp_path):
    header = save(tmp_path / "a.png", photo()).read_bytes()
    size = b"IHDR" + struct.pack(">II", 40000, 40000) + header[24:29]
    patched = header[:12] + size + struct.pack(">I", zlib.crc32(size)) + header[33:]
    (tmp_path / "a.png").write_bytes(patched)
    (rejected,) = scan(tmp_path).rejected
    assert "more than the limit" in rejected.detail


@pytest.mark.parametrize("orientation", [1, 6, 3, 8])
def test_quarter_turns_turn_what_is_shown(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    record = images.scan(tmp_path)["a.png"]
    shown = images.read_rgb(record)
    for turns in range(-1, 5):
        expected = np.rot90(shown, -turns)  # clockwise
        assert np.array_equal(images.read_rgb(images.turned(record, turns)), expected)


# ----------------------------------------------------------------------------------- hostile files


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_pipes_devices_and_dangling_links_are_named_without_waiting(tmp_path):
    save(tmp_path / "a.jpg", photo(seed=1))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.getcwd()
        os.chdir(tmp_path)  # such addresses are at most 107 characters
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(folder)
        found = scan(tmp_path)
    assert found.names == ["a.jpg"]
    details = {rejected.name: rejected.detail for rejected in found.rejected}
    assert details.keys() == {"pipe.jpg", "zero.png", "gone.jpg", "loop.jpg", "socket.jpg"}
    assert "pipe or device" in details["pipe.jpg"]
    assert "pipe or device" in details["zero.png"]
    assert "No such file" in details["gone.jpg"]
    with pytest.raises(InputError, match=r"pipe\.jpg cannot be read: it is a folder, pipe"):
        read_rgb(tmp_path / "pipe.jpg")


def test_a_file_of_more_bytes_than_the_limit_is_not_read(tmp_path):
    path = save(tmp_path / "a.jpg", photo())
    os.truncate(path, 2**40)  # a hole; nothing is written
    (rejected,) = scan(tmp_path).rejected
    assert "more than the limit" in rejected.detail


def tiff(tags: dict[int, int], data: bytes) -> bytes:
    """A little-endian TIFF of one directory; tags 273, 279, 324 and 325 as they come."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def bomb(kind: str) -> bytes:
    gray = {258: 8, 259: 8, 262: 1, 277: 1}
    flat = zlib.compress(bytes(30000), 9)
    start = 8 + 2 + 4
    if kind == "tiles":
        tags = {
            **gray,
            256: 200,
            257: 200,
            322: 65520,
            323: 65520,
            324: start + 120,
            325: len(flat),
        }
    else:
        size = {"pixels": 30000, "limit": 40000}[kind]
        tags = {**gray, 256: size, 257: size, 273: start + 108, 278: size, 279: len(flat)}
    return tiff(tags, flat)


@pytest.mark.parametrize(
    ("kind", "says"), [("tiles", "tiles of 65520"), ("pixels", "cannot be in"), ("limit", "limit")]
)
def test_tiff_bombs_are_refused_before_decoding(tmp_path, kind, says):
    (tmp_path / "a.tif").write_bytes(bomb(kind))
    (rejected,) = scan(tmp_path).rejected
    assert says in rejected.detail


def test_a_tiff_is_not_held_to_pillows_smaller_limit(tmp_path, monkeypatch):
    rgb = photo()
    for name, options in {"raw": {}, "lzw": {"compression": "tiff_lzw"}}.items():
        save(tmp_path / f"{name}.tif", rgb, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert scan(tmp_path).names == ["lzw.tif", "raw.tif"]
    np.testing.assert_array_equal(read_rgb(tmp_path / "lzw.tif"), rgb)
    np.testing.assert_array_equal(read_rgb(tmp_path / "raw.tif"), rgb)
