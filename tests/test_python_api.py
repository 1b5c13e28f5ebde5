"""The Python interface: types that checkers see, images in memory, results in notebooks."""

from __future__ import annotations

import dataclasses
import io
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import cv2
import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

import gim_hloc
from gim_hloc.errors import InputError
from gim_hloc.keywords import LocalizeKeywords, ReconstructKeywords
from gim_hloc.options import CameraOptions
from gim_hloc.pipelines.options import LocalizeOptions, ReconstructOptions
from gim_hloc.pipelines.reconstruct import ReconstructResult

# ---------------------------------------------------------------------------------------- keywords


def plain(hint: Any) -> Any:
    """A type of options without its bounds; paths may be texts."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(plain, get_args(hint)))]  # noqa: UP007 - of parts found here
    if get_origin(hint) is tuple:
        return tuple[tuple(map(plain, get_args(hint)))]  # type: ignore[misc]
    return Union[Path, str] if hint is Path else hint  # noqa: UP007


def fields(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: plain(hints[f.name]) for f in dataclasses.fields(kind)}


def test_keywords_are_the_fields_of_the_options() -> None:
    assert get_type_hints(LocalizeKeywords) == fields(LocalizeOptions)
    assert get_type_hints(ReconstructKeywords) == {
        **fields(ReconstructOptions),
        **fields(CameraOptions),
    }


# ---------------------------------------------------------------------------------------- keywords


# --------------------------------------------------------------------------------- images in memory


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files that a homography relates; the second has an EXIF orientation."""
    folder = tmp_path_factory.mktemp("pair")
    texture = np.random.default_rng(3).integers(0, 255, (40, 50, 3), np.uint8)
    one = cv2.resize(texture, (320, 240), interpolation=cv2.INTER_CUBIC)
    two = cv2.warpAffine(one, np.array([[1, 0.05, 4], [-0.05, 1, 9.0]]), (320, 240))
    turned = Image.fromarray(np.rot90(two).copy())
    exif = turned.getexif()
    exif[274] = 6
    Image.fromarray(one).save(folder / "one.png")
    turned.save(folder / "two.png", exif=exif)
    return folder / "one.png", folder / "two.png"


def array(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def tensor(path: Path) -> torch.Tensor:
    return torch.from_numpy(array(path).copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def matcher() -> Any:
    return gim_hloc.matchers.load("sift", device="cpu")


@pytest.fixture(scope="module")
def from_files(pair: tuple[Path, Path], matcher: Any) -> Any:
    return gim_hloc.match(*pair, matcher=matcher)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (array, Image.open),
        (Image.open, Image.open),
        (tensor, Image.open),
        (str, Image.open),
        (lambda path: array(path) / 255, Image.open),
        (lambda path: tensor(path).float() / 255, Image.open),
    ],
)
def test_images_in_memory_match_as_files(
    one: Any, two: Any, pair: tuple[Path, Path], matcher: Any, from_files: Any
) -> None:
    result = gim_hloc.match(one(pair[0]), two(pair[1]), matcher=matcher)
    assert len(result) > 50
    np.testing.assert_array_equal(result.keypoints0, from_files.keypoints0)
    np.testing.assert_array_equal(result.keypoints1, from_files.keypoints1)


def test_gray_images(pair: tuple[Path, Path], matcher: Any) -> None:
    gray = np.asarray(Image.open(pair[0]).convert("L"))
    counts = {
        len(gim_hloc.match(image, pair[1], matcher=matcher))
        for image in (gray, gray[..., None], torch.from_numpy(gray.copy())[None])
    }
    assert len(counts) == 1
    assert min(counts) > 50


BLACK = np.zeros((64, 64, 3))
WRONG: dict[str, tuple[Any, str]] = {
    "number": (3, "image1 is 'int'; it must be a path, an array"),
    "none": (None, "image1 is 'NoneType'"),
    "flat": (np.zeros(9), r"image1 is an array \(9,\)"),
    "channels first": (np.zeros((3, 64, 64)), r"array \(3, 64, 64\); it must be \(H, W"),
    "alpha": (np.zeros((64, 64, 4)), r"\(64, 64, 4\)"),
    "range": (BLACK + 200, r"float64 in \[200.0, 200.0\]; it must be uint8, or floating point"),
    "nan": (BLACK * np.nan, "float64 in"),
    "integers": (BLACK.astype(int), "int64 in"),
    "batch": (torch.zeros(1, 3, 64, 64), r"tensor \(1, 3, 64, 64\); it must be \(1 or 3, H, W\)"),
    "small": (np.zeros((8, 64), np.uint8), "64x8 px; that is too small"),
    "empty": (np.zeros((0, 64, 3)), "image1 is empty: 64x0 px"),
    "empty bytes": (np.zeros((64, 0, 3), np.uint8), "image1 is empty: 0x64 px"),
    "empty tensor": (torch.zeros(3, 0, 0), "empty"),
    "empty of Pillow": (Image.new("RGB", (0, 9)), "empty"),
    "texts": (np.full((64, 64), "a"), "image1 is <U1; it must be uint8"),
    "complex": (BLACK + 1j, "complex128; it must be uint8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image(name: str, pair: tuple[Path, Path], matcher: Any) -> None:
    image, said = WRONG[name]
    with pytest.raises(InputError, match=said):
        gim_hloc.match(pair[0], image, matcher=matcher)


def test_images_of_pillow_that_cannot_be_used(pair: tuple[Path, Path], matcher: Any) -> None:
    data = pair[0].read_bytes()
    with pytest.raises(InputError, match="image0 cannot be read: OSError"):
        gim_hloc.match(Image.open(io.BytesIO(data[: len(data) // 2])), pair[1], matcher=matcher)
    mirrored = Image.open(pair[0])
    mirrored.getexif()[274] = 2
    with pytest.raises(InputError, match="image0 is a mirror image"):
        gim_hloc.match(mirrored, pair[1], matcher=matcher)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"matcher": 3}, "matcher is 3; it must be a name"),
        ({"fit": 3}, "fit is 3; it must be FitOptions or None"),
        ({"matcher": "sift", "quality": "best"}, "Unknown quality 'best'"),
        ({"matcher": "sift", "ratio": "x"}, "ratio"),
        ({"rotations": False}, "rotations is False; choose one of auto, none"),
        ({"mask0": 3}, "mask0 is 3; it must be a path"),
        ({"mask1": np.zeros((9, 9))}, "mask1 is .*; it must be a path"),
        ({"mask1": __file__, "mask_erode": "much"}, "mask_erode is 'much'; it must be a number"),
        ({"matcher": "sift", "device": 3}, "The device 3 cannot be used here"),
        ({"matcher": "sift", "device": []}, r"The device \[\] cannot be used here"),
    ],
)
def test_wrong_options(options: Any, said: str, pair: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=said):
        gim_hloc.match(*pair, **options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gim_hloc.reconstruct(3, "out"), "images is 3; it must be a path"),  # type: ignore[arg-type]
        (lambda: gim_hloc.reconstruct("photos", None), "output is None; it must be a path"),  # type: ignore[arg-type]
        (lambda: gim_hloc.localize("map", [], "out"), r"queries is \[\]; it must be a path"),  # type: ignore[arg-type]
        (lambda: gim_hloc.reconstruct("a", "b", {"matcher": "sift"}), "options is a dict"),  # type: ignore[arg-type]
        (lambda: gim_hloc.reconstruct("a", "b", seed="x"), "seed"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_input_errors(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()


# ------------------------------------------------------------------------------------------ results


def test_a_match_in_a_notebook(from_files: Any) -> None:
    with pytest.raises(InputError, match="folder is None; it must be a path"):
        from_files.save(None)
    text = repr(from_files)
    assert text.startswith("MatchResult(one.png - two.png: ")
    assert len(text) < 300
    html = from_files._repr_html_()
    assert html.startswith('<figure><img src="data:image/jpeg;base64,')
    assert " inliers of the fundamental matrix" in html


def test_a_reconstruction_in_a_notebook(tmp_path: Path) -> None:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_points3D = 50
    (tmp_path / "0").mkdir()
    pycolmap.synthesize_dataset(options).write(tmp_path / "0")
    result = ReconstructResult(
        output=tmp_path,
        models=[tmp_path / "0"],
        report={"summary": {"registered": 3, "images": 4}},
    )
    assert repr(result) == f"ReconstructResult({tmp_path}: 3 of 4 images registered, 1 model)"
    assert result._repr_html_().startswith('<figure><img src="data:image/png;base64,')
    empty = ReconstructResult(output=tmp_path)
    assert "<img" not in empty._repr_html_()
