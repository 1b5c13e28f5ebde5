"""Sets of image pairs to match and to judge, whatever they are stored as.

Poses take points of camera 0 to camera 1, K and H are of stored pixels, integer = pixel centre.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch

from gim_hloc import cache, workers
from gim_hloc.evaluation.dumps import DumpRecord, Unit
from gim_hloc.evaluation.options import EvaluationOptions
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.evaluation.protocol import Protocol
from gim_hloc.images import orientation_affine, read_rgb
from gim_hloc.types import ImageData, ImageOptions

CELL = 8  # sides of images that are not padded are multiples of it, px
TRUTH_NUMBERS = 34  # K0, K1 and the pose in a line of text, row by row

_PREPARATION = 1  # part of every key: raised when images are prepared differently
# EXIF orientations that show an image turned counter-clockwise by 0 to 3 quarters.
_ORIENTATIONS = (1, 8, 3, 6)
# Determinant of a rotation may be off by this much: labels are rounded to five digits at worst.
_ROTATION_SLACK = 0.1

Size = tuple[int, int]  # (width, height), px
Set = TypeVar("Set", bound="PairSet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Two images to match."""

    identifier: str  # scene#name0#name1, without blanks, as in dumps
    image0: str  # names that `PairSet.image` knows
    image1: str
    covisible0: float = 0.0  # overlap in [0, 1]; 0 where it is not known
    covisible1: float = 0.0

    def truth(self) -> tuple[np.ndarray, ...]:
        """What matches are judged by."""
        return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class PosedPair(Pair):
    """A pair with calibration and relative pose: of the stored images, however they are shown."""

    K0: np.ndarray  # (3, 3) float64
    K1: np.ndarray
    T_0to1: np.ndarray  # (4, 4) float64, x1 = R @ x0 + t

    def truth(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """K0, K1 and the pose."""
        return self.K0, self.K1, self.T_0to1


@dataclass(frozen=True, kw_only=True, eq=False)
class HomographyPair(Pair):
    """A pair with a homography."""

    H: np.ndarray  # (3, 3) float64, image 0 -> image 1

    def truth(self) -> tuple[np.ndarray, ...]:
        """The matrix."""
        return (self.H,)


@dataclass(frozen=True, kw_only=True)
class BadPair:
    """An entry of a set that cannot be used, and why. It counts as a failed pair."""

    label: str  # file, or line of a file
    identifier: str  # as far as the entry has names
    reason: str
    covisible0: float = 0.0
    covisible1: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PairSet(abc.ABC):
    """Pairs, their images, and how matches are judged.

    Attributes:
        name: in messages and results.
        root: folder of the data.
        dump_name: name of the set in its dump; None: no dump is written.
        dump_unit: of the errors in it.
        pairs: to match.
        bad: entries that are no pairs.
    """

    name: str
    root: Path
    dump_name: str | None
    pairs: tuple[Any, ...]
    bad: tuple[BadPair, ...]
    dump_unit: Unit = "deg"

    @property
    @abc.abstractmethod
    def shown(self) -> list[Any]:
        """How images are shown to matchers, in numbers and text."""

    @abc.abstractmethod
    def path(self, name: str) -> Path:
        """File of an image."""

    @abc.abstractmethod
    def image(self, name: str, options: ImageOptions) -> ImageData:
        """An image as a matcher is to see it; ``InputError`` names a file that is none."""

    @abc.abstractmethod
    def judge(self, pair: Any, matches: Prediction, protocol: Protocol) -> DumpRecord:
        """What the matches of a pair are worth."""

    def truth(self, pair: Any) -> list[Any]:
        """What decides a verdict besides matches and protocol, in numbers and text."""
        return [matrix.tolist() for matrix in pair.truth()]

    def sample(self: Set, options: EvaluationOptions) -> Set:
        """The part of the set that ``limit`` leaves, drawn from good and bad entries together."""
        total = len(self.pairs) + len(self.bad)
        if options.limit is None or options.limit >= total:
            return self
        generator = np.random.default_rng(options.seed)
        chosen = sorted(generator.choice(total, options.limit, replace=False).tolist())
        split = len(self.pairs)
        return dataclasses.replace(
            self,
            pairs=tuple(self.pairs[i] for i in chosen if i < split),
            bad=tuple(self.bad[i - split] for i in chosen if i >= split),
        )

    def keys(self) -> dict[str, str]:
        """Identifier of each pair -> key of its matches, by the content of the images."""
        names = list({name for pair in self.pairs for name in (pair.image0, pair.image1)})
        with ThreadPoolExecutor(workers.usable_cores()) as pool:
            digests = dict(zip(names, pool.map(_digest, map(self.path, names)), strict=True))
        return {
            pair.identifier: cache.key(
                _PREPARATION,
                self.shown,
                [[name, digests[name]] for name in (pair.image0, pair.image1)],
            )
            for pair in self.pairs
        }


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # reported where it is read
        return None


def floor_to_cell(size: tuple[float, float]) -> Size:
    """(width, height) rounded down to multiples of 8."""
    width, height = (max(CELL, int(side) // CELL * CELL) for side in size)
    return width, height


def load_image(
    path: Path,
    sizes: Callable[[Size], tuple[Size, Size]],
    *,
    name: str,
    grayscale: bool,
    turns: int = 0,
) -> ImageData:
    """Read an image at the size that a benchmark prescribes, resized linearly on 8-bit values.

    Args:
        path: image file; EXIF orientation is not applied.
        sizes: (width, height) -> those of the resized image, and of the frame that zeros fill up.
        name: of the image.
        grayscale: or RGB.
        turns: quarter turns counter-clockwise by which it is shown; sizes are those then.

    Returns:
        The image. Its affine map aligns pixel areas (``x = (x' + 0.5) * scale - 0.5``); its mask is
        None without padding.

    Raises:
        InputError: the file does not exist or cannot be read, named.
    """
    pixels = read_rgb(path, upright=False)
    height, width = pixels.shape[:2]
    across = turns % 2 == 1
    resized, frame = sizes((height, width) if across else (width, height))
    columns, rows = resized[::-1] if across else resized
    if (columns, rows) != (width, height):
        pixels = cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_LINEAR)
    if grayscale:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    shown = np.rot90(pixels, turns).transpose(2, 0, 1)
    planes = np.zeros((len(shown), frame[1], frame[0]), np.float32)
    np.divide(shown, np.float32(255), out=planes[:, : resized[1], : resized[0]])
    mask = None
    if resized != frame:
        mask = torch.zeros(frame[1], frame[0], dtype=torch.bool)
        mask[: resized[1], : resized[0]] = True
    scale = np.array([width / columns, height / rows])
    to_original = orientation_affine(_ORIENTATIONS[turns], columns, rows) * scale[:, None]
    to_original[:, 2] += 0.5 * scale - 0.5
    return ImageData(
        image=torch.from_numpy(planes),
        name=name,
        size=(width, height),
        to_original=to_original,
        mask=mask,
    )


def parse_numbers(tokens: Sequence[str]) -> np.ndarray:
    """Numbers (N,) of a line; ValueError where one is none."""
    try:
        return np.array([float(token) for token in tokens])
    except ValueError as error:
        raise ValueError(f"a token is not a number ({error})") from error


def split_truth(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """K0, K1 and T_0to1 of the 34 numbers of a line; ValueError says what is wrong with them."""
    K0, K1, pose = numbers[:9].reshape(3, 3), numbers[9:18].reshape(3, 3), numbers[18:]
    pose = pose.reshape(4, 4)
    check_calibration(K0, K1, pose)
    return {"K0": K0, "K1": K1, "T_0to1": pose}


def check_calibration(K0: np.ndarray, K1: np.ndarray, pose: np.ndarray) -> None:
    """Raise ValueError, in words, if a pair's K (3, 3) or pose (4, 4) cannot be used."""
    for name, K in (("K0", K0), ("K1", K1)):
        if not np.isfinite(K).all():
            raise ValueError(f"{name} is not finite")
        if K[0, 0] <= 0 or K[1, 1] <= 0 or abs(np.linalg.det(K)) < 1e-12:
            raise ValueError(f"{name} is singular or has a focal length that is not positive")
    if not np.isfinite(pose).all():
        raise ValueError("the pose is not finite")
    if abs(np.linalg.det(pose[:3, :3]) - 1) > _ROTATION_SLACK:
        raise ValueError("the pose's rotation is none (its determinant is not 1)")
