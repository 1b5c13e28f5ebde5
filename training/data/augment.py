"""From two images and what is known about them to a training sample.

What happens to an image on its way to the network: it is resized (to fit the box, then zoomed),
cropped, mirrored, padded to the box, and image 1 is warped by a homography. All of that ends in one
3x3 matrix, network -> original pixels; labels follow that matrix, never the single steps, and depth
stays on the original pixels. Rules and numbers are those of ``training.md`` §3, with one
difference: resizing is exact about pixel centres, where multiplying coordinates by a factor is off
by up to half a pixel.

Everything random comes from the generator that is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from gim_hloc.errors import InputError
from gim_hloc.options import Count, Share, options
from gim_hloc.training.batch import PairSample
from gim_hloc.training.data import photometric
from gim_hloc.training.data.photometric import Style

_MULTIPLE = 8  # network sizes are multiples of the coarsest feature cell that all models share
_INSIDE = 1e-6  # px, rounding of positions on the border of an image


@options
class AugmentOptions:
    """How samples are made. The defaults are those of MegaDepth in ``training.md`` §3."""

    box: tuple[int, int] = (640, 640)  # (width, height) of network images, px; floored to 8
    train: bool = True  # False: fitted into the box and nothing else, nothing random
    keep_scale: Share = 0.5  # probability that an image only fills the box and is not zoomed
    zoom0: tuple[float, float] = (0.6, 1.4)  # range of the factor of image 0
    zoom1: tuple[float, float] = (0.6, 1.4)  # range of the factor of image 1
    photometric: Style = "dark"  # kind of changes of colour
    photometric_probability: Share = 0.5  # of each image to go through them
    homography: Share = 0.9  # probability that image 1 is warped
    homography_offset: float = 0.25  # largest offset of a corner, share of the box' side
    rotation_deg: float = 180.0  # largest rotation of that warp
    flip_horizontal: Share = 0.0  # probability that both images are mirrored left to right
    flip_vertical: Share = 0.0  # probability that both images are mirrored top to bottom
    min_labels: int = 64  # labels that must remain where a sample has labels
    tries: Count = 30  # augmentations drawn until so many remain
    max_labels: int | None = None  # keep the first rows, sorted by x0, y0, x1, y1; None: all

    def __post_init__(self) -> None:
        if min(self.network_box) < _MULTIPLE:
            raise InputError(f"The box {self.box} is smaller than {_MULTIPLE} x {_MULTIPLE}.")
        for name in ("zoom0", "zoom1"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise InputError(f"{name} is ({low}, {high}); give a range of positive factors.")
        if not 0 <= self.homography_offset < 0.5:
            raise InputError(
                f"homography_offset is {self.homography_offset}; from 0.5 on corners can meet."
            )

    @property
    def network_box(self) -> tuple[int, int]:
        """The box with both sides floored to multiples of 8."""
        width, height = self.box
        return width // _MULTIPLE * _MULTIPLE, height // _MULTIPLE * _MULTIPLE


@dataclass(kw_only=True)
class RawPair:
    """Two images as their files hold them, and what is known about them.

    Attributes:
        image0, image1: (h, w, 3) uint8 RGB.
        names: for messages and pictures.
        depth0, depth1: (h, w) float32 on the pixels of the images, 0 or not finite where unknown.
        K0, K1: (3, 3) float64 intrinsics, hloc's frame (integer = centre of a pixel).
        T_0to1: (4, 4) float64, x1 = T x0.
        labels: (L, 4) original pixels x0, y0, x1, y1.
    """

    image0: np.ndarray
    image1: np.ndarray
    names: tuple[str, str]
    depth0: np.ndarray | None = None
    depth1: np.ndarray | None = None
    K0: np.ndarray = field(default_factory=lambda: np.eye(3))
    K1: np.ndarray = field(default_factory=lambda: np.eye(3))
    T_0to1: np.ndarray = field(default_factory=lambda: np.eye(4))
    labels: np.ndarray | None = None


class TooFewLabelsError(Exception):
    """No augmentation drawn left enough labels."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an image lies in the network's box.

    Attributes:
        size: (width, height) of the original image.
        scaled: (width, height) it is resized to.
        start: (x, y) first pixel of the crop in the resized image.
        extent: (width, height) of the crop, which starts at the box' top left pixel.
        flip: whether the crop is mirrored left to right, and top to bottom.
        homography: (3, 3) network pixels before -> after the warp, or None.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    start: tuple[int, int] = (0, 0)
    extent: tuple[int, int]
    flip: tuple[bool, bool] = (False, False)
    homography: np.ndarray | None = None

    @property
    def to_original(self) -> np.ndarray:
        """(3, 3) float64, network -> original pixels, hloc's frame."""
        matrix = np.eye(3)
        for axis in (0, 1):
            factor = self.size[axis] / self.scaled[axis]
            # A resized image has its corners, not its outermost pixel centres, in common.
            matrix[axis, axis] = factor
            matrix[axis, 2] = (self.start[axis] + 0.5) * factor - 0.5
        mirror = np.eye(3)
        for axis in (0, 1):
            if self.flip[axis]:
                mirror[axis, axis] = -1
                mirror[axis, 2] = self.extent[axis] - 1
        matrix = matrix @ mirror
        if self.homography is not None:
            matrix = matrix @ np.linalg.inv(self.homography)
        return matrix


def place(
    size: tuple[int, int],
    options: AugmentOptions,
    rng: np.random.Generator,
    *,
    zoom: tuple[float, float],
    warp: bool = False,
    flip: tuple[bool, bool] = (False, False),
    label_box: tuple[float, float, float, float] | None = None,
) -> Placement:
    """Draw where an image goes.

    Args:
        size: (width, height) of the original image.
        options: how.
        rng: source of everything random.
        zoom: range of the factor that the image is zoomed by.
        warp: whether the image may be warped by a homography.
        flip: whether it is mirrored along x, y.
        label_box: (x_min, y_min, x_max, y_max) of the labels in original pixels: it limits the zoom
            so that the box of labels still fits, and the crop so that it begins before them.
    """
    box = options.network_box
    scale = 1.0
    if size[0] > box[0] or size[1] > box[1]:
        ratios = (box[0] / size[0], box[1] / size[1])
        # Filling one side may need enlarging where only the other is too long: that is for zoom.
        scale = min(1.0, ratios[rng.integers(2)]) if options.train else min(ratios)
    if options.train and rng.random() >= options.keep_scale:
        scale *= _draw_zoom(size, scale, box, zoom, label_box, rng)
    # The tolerance keeps an image that is to fill the box from losing eight pixels to rounding.
    scaled = [max(_MULTIPLE, int(n * scale + 1e-6) // _MULTIPLE * _MULTIPLE) for n in size]
    extent = [min(n, limit) for n, limit in zip(scaled, box, strict=True)]
    start = [0, 0]
    for axis in (0, 1):
        last = scaled[axis] - extent[axis]
        if label_box is not None:
            first_label = (label_box[axis] + 0.5) * scaled[axis] / size[axis] - 0.5
            last = min(last, max(0, int(first_label)))
        if options.train:
            start[axis] = int(rng.integers(last + 1))
    homography = None
    if warp and options.train and rng.random() < options.homography:
        homography = random_homography(
            box, rng, offset=options.homography_offset, rotation_deg=options.rotation_deg
        )
    return Placement(
        size=size,
        scaled=(scaled[0], scaled[1]),
        start=(start[0], start[1]),
        extent=(extent[0], extent[1]),
        flip=flip,
        homography=homography,
    )


def _draw_zoom(
    size: tuple[int, int],
    scale: float,
    box: tuple[int, int],
    zoom: tuple[float, float],
    label_box: tuple[float, float, float, float] | None,
    rng: np.random.Generator,
) -> float:
    low, high = zoom
    filled = max(n * scale / limit for n, limit in zip(size, box, strict=True))
    if filled < 1:  # an image smaller than the box is zoomed relative to the box
        low, high = low / filled, high / filled
    if label_box is not None:
        for axis in (0, 1):
            extent = (label_box[axis + 2] - label_box[axis] + 1) * scale
            high = min(high, box[axis] / extent)
        low = min(low, high)
    return float(rng.uniform(low, high))


def random_homography(
    box: tuple[int, int], rng: np.random.Generator, *, offset: float, rotation_deg: float
) -> np.ndarray:
    """A perspective change followed by a rotation about the middle of the box.

    Args:
        box: (width, height) in pixels.
        rng: source of everything random.
        offset: corners move by different integers below this share of the side, per axis.
        rotation_deg: largest angle, to both sides.

    Returns:
        (3, 3) float64, network pixels before -> after.
    """
    width, height = box
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]], float)
    moved = corners.copy()
    for axis, side in enumerate((width, height)):
        reach = int(offset * side)
        if reach >= 2:  # four different integers exist
            moved[:, axis] += rng.choice(2 * reach, 4, replace=False) - reach
    angle = np.deg2rad(-rng.uniform(-rotation_deg, rotation_deg))
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = (width - 1) / 2, (height - 1) / 2
    rotation = np.array(
        [
            [cosine, -sine, x - cosine * x + sine * y],
            [sine, cosine, y - sine * x - cosine * y],
            [0, 0, 1],
        ]
    )
    return rotation @ homography_of(corners, moved)


def homography_of(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The homography (3, 3) that carries four points (4, 2) onto four others."""
    rows, right = [], []
    for (x, y), (u, v) in zip(points, targets, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
        right += [u, v]
    solution = np.linalg.solve(np.array(rows), np.array(right))
    return np.append(solution, 1.0).reshape(3, 3)


def apply_homography(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Map points (N, 2) by a (3, 3) matrix, float64."""
    mapped = np.c_[np.asarray(xy, np.float64), np.ones(len(xy))] @ matrix.T
    result: np.ndarray = mapped[:, :2] / mapped[:, 2:]
    return result


def _sampling_map(
    placement: Placement, box: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel (H, W) of the box its x and y in the crop, and whether it lies on it."""
    width, height = box
    inverse = np.eye(3) if placement.homography is None else np.linalg.inv(placement.homography)
    columns, rows = np.arange(width), np.arange(height)[:, None]
    x, y, w = (row[0] * columns + row[1] * rows + row[2] for row in inverse)
    x /= w
    y /= w
    right, bottom = placement.extent[0] - 1 + _INSIDE, placement.extent[1] - 1 + _INSIDE
    inside = (x >= -_INSIDE) & (x <= right) & (y >= -_INSIDE) & (y <= bottom)
    return x, y, inside


def render(
    image: np.ndarray,
    placement: Placement,
    options: AugmentOptions,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the network's image.

    Args:
        image: (h, w, 3) uint8 RGB, the original.
        placement: where it goes.
        options: box and changes of colour.
        rng: source of everything random.

    Returns:
        (3, H, W) float32 in [0, 1], zero where there is no image, and (H, W) bool where there is
        one. A warped image is there where it is interpolated from image pixels only.
    """
    import cv2

    shrinking = placement.scaled[0] <= image.shape[1] and placement.scaled[1] <= image.shape[0]
    # Averaging does not alias; OpenCV's does not enlarge.
    how = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    if placement.scaled != (image.shape[1], image.shape[0]):
        image = cv2.resize(image, placement.scaled, interpolation=how)
    (x, y), (width, height) = placement.start, placement.extent
    crop = image[y : y + height, x : x + width]
    crop = crop[:: -1 if placement.flip[1] else 1, :: -1 if placement.flip[0] else 1]
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float().div_(255)
    if options.train and rng.random() < options.photometric_probability:
        pixels = photometric.change(pixels, options.photometric, rng)

    box = options.network_box
    if placement.homography is None:
        valid = torch.zeros(box[1], box[0], dtype=torch.bool)
        valid[:height, :width] = True
        padding = (0, box[0] - width, 0, box[1] - height)
        return torch.nn.functional.pad(pixels, padding).contiguous(), valid
    columns, rows, inside = _sampling_map(placement, box)
    # grid_sample, because OpenCV's warps round positions to 1/32 px before version 5.
    normalised = np.empty((box[1], box[0], 2), np.float32)
    normalised[..., 0] = (columns + 0.5) * (2 / width) - 1
    normalised[..., 1] = (rows + 0.5) * (2 / height) - 1
    warped = torch.nn.functional.grid_sample(
        pixels[None],
        torch.from_numpy(normalised)[None],
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )[0]
    valid = torch.from_numpy(inside)
    return warped.mul_(valid), valid


def place_labels(
    labels: np.ndarray, placements: tuple[Placement, Placement], box: tuple[int, int]
) -> np.ndarray:
    """Carry labels into the network's images and keep those that lie well on both.

    A label is kept where both ends are one coarse cell away from the right and lower end of the
    image (of the box, for a warped image), and where a warped image is interpolated from image
    pixels only at all four neighbours (``training.md`` §3).

    Args:
        labels: (L, 4) x0, y0, x1, y1 in original pixels.
        placements: of both images.
        box: (width, height) of the network's images.

    Returns:
        (K, 4) float64 network pixels, sorted by rows, without duplicates.
    """
    ends = []
    keep = np.ones(len(labels), dtype=bool)
    for placement, xy in zip(placements, (labels[:, :2], labels[:, 2:]), strict=True):
        end = apply_homography(np.linalg.inv(placement.to_original), xy)
        warped = placement.homography is not None
        limit = np.array(box if warped else placement.extent) - _MULTIPLE
        keep &= ((end >= 0) & (end <= limit)).all(1)
        if placement.homography is not None:
            inverse = np.linalg.inv(placement.homography)
            last = np.array(placement.extent) - 1
            for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
                source = apply_homography(inverse, np.floor(end) + corner)
                keep &= ((source >= -_INSIDE) & (source <= last + _INSIDE)).all(1)
        ends.append(end)
    return np.unique(np.concatenate(ends, 1)[keep], axis=0)


def make_sample(
    raw: RawPair, options: AugmentOptions, rng: np.random.Generator, *, dataset: str
) -> PairSample:
    """Make a sample; the same generator state gives the same sample.

    Raises:
        TooFewLabelsError: the pair has labels, and all augmentations drawn left too few.
    """
    sizes = [(image.shape[1], image.shape[0]) for image in (raw.image0, raw.image1)]
    boxes: list[tuple[float, float, float, float] | None] = [None, None]
    if raw.labels is not None:
        if not len(raw.labels):
            raise TooFewLabelsError("there are no labels")
        for k, xy in enumerate((raw.labels[:, :2], raw.labels[:, 2:])):
            boxes[k] = (*map(float, xy.min(0)), *map(float, xy.max(0)))  # type: ignore[assignment]
    labels: np.ndarray | None = None
    most = 0
    for _ in range(options.tries if options.train else 1):
        flip = (False, False)
        if options.train:
            chances = (options.flip_horizontal, options.flip_vertical)
            flip = (bool(rng.random() < chances[0]), bool(rng.random() < chances[1]))
        place0 = place(sizes[0], options, rng, zoom=options.zoom0, flip=flip, label_box=boxes[0])
        place1 = place(
            sizes[1], options, rng, zoom=options.zoom1, flip=flip, label_box=boxes[1], warp=True
        )
        if raw.labels is None:
            break
        labels = place_labels(raw.labels, (place0, place1), options.network_box)
        most = max(most, len(labels))
        if len(labels) >= options.min_labels:
            break
    else:
        raise TooFewLabelsError(
            f"{most} of {len(raw.labels) if raw.labels is not None else 0} labels remained, "
            f"{options.min_labels} are needed"
        )
    image0, valid0 = render(raw.image0, place0, options, rng)
    image1, valid1 = render(raw.image1, place1, options, rng)
    return PairSample(
        image0=image0,
        image1=image1,
        valid0=valid0,
        valid1=valid1,
        to_original0=torch.from_numpy(place0.to_original),
        to_original1=torch.from_numpy(place1.to_original),
        size0=sizes[0],
        size1=sizes[1],
        dataset=dataset,
        names=raw.names,
        depth0=_depth(raw.depth0, sizes[0], raw.names[0]),
        depth1=_depth(raw.depth1, sizes[1], raw.names[1]),
        K0=torch.from_numpy(np.array(raw.K0, dtype=np.float64)),
        K1=torch.from_numpy(np.array(raw.K1, dtype=np.float64)),
        T_0to1=torch.from_numpy(np.array(raw.T_0to1, dtype=np.float64)),
        labels=None
        if labels is None
        else torch.from_numpy(labels[: options.max_labels].astype(np.float32)),
    )


def _depth(depth: np.ndarray | None, size: tuple[int, int], name: str) -> torch.Tensor | None:
    if depth is None:
        return None
    if depth.shape != (size[1], size[0]):
        raise InputError(
            f"The depth of {name} has {depth.shape[1]} x {depth.shape[0]} px, the image "
            f"{size[0]} x {size[1]}."
        )
    known = np.isfinite(depth) & (depth > 0)
    return torch.from_numpy(np.where(known, depth, 0).astype(np.float32))
