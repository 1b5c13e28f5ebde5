"""RootSIFT with mutual nearest neighbours: ``sift`` for reconstruction, ``root_sift`` for ZEB."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from gim_hloc.matchers.common import MatcherBase
from gim_hloc.matchers.nearest import distance, mutual_nearest, rivals
from gim_hloc.matchers.registry import describe
from gim_hloc.matchers.sparse import encode_network_keypoints
from gim_hloc.options import Count, options
from gim_hloc.types import ImageData, Matches, SparseEncoding


def _opencv_version() -> str:
    for name in ("opencv-python-headless", "opencv-python", "opencv-contrib-python"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import cv2

    version: str = cv2.__version__
    return version


@options
class SiftOptions:
    """Numbers of RootSIFT matching."""

    max_size: Count | None = 3200  # long side in pixels; larger images are reduced
    max_keypoints: Count = 8192  # per image, those of highest contrast
    contrast_threshold: float = 0.02  # lowest contrast of a keypoint, OpenCV's scale (COLMAP: 0.02)
    edge_threshold: float = 10.0  # highest ratio of principal curvatures
    octave_layers: Count = 3  # scales per octave
    # Nearest over second nearest distance; 1 switches the test off.
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.8
    max_distance: float = 0.7  # of matched unit descriptors; 2 switches the test off


@options
class RootSiftOptions:
    """Numbers of the ZEB benchmark's RootSIFT. Changing one leaves the benchmark."""

    max_size: Count | None = 1600  # long side in pixels; the benchmark sets its own per data set
    pixels_per_keypoint: Count = 64  # at most width * height / this keypoints
    contrast_threshold: float = 1e-5  # OpenCV's scale: takes nearly every extremum
    ratio: float = 0.8  # nearest over second nearest distance, both in image 1


class SiftMatcher(MatcherBase[SparseEncoding]):
    """OpenCV's SIFT, RootSIFT descriptors, mutual nearest neighbours and the ratio test."""

    options_type: type[Any] = SiftOptions
    encode_fields: tuple[str, ...] = (
        "max_size",
        "max_keypoints",
        "contrast_threshold",
        "edge_threshold",
        "octave_layers",
    )
    libraries = {"opencv": _opencv_version()}  # noqa: RUF012 - never changed

    def __init__(self, name: str, *, options: Any, device: torch.device) -> None:
        super().__init__(info=describe(name), options=options, device=device)

    def encode(self, image: ImageData) -> SparseEncoding:
        """Detect and describe keypoints of a gray image (1, H, W)."""
        import cv2

        gray = _to_gray(image.image, truncate=False)
        options = self.options
        # OpenCV doubles the image first. Without the precise upscale, that moves every keypoint of
        # the doubled octave by a quarter pixel.
        detector = cv2.SIFT_create(  # type: ignore[attr-defined]
            nfeatures=0,
            nOctaveLayers=options.octave_layers,
            contrastThreshold=options.contrast_threshold,
            edgeThreshold=options.edge_threshold,
            enable_precise_upscale=True,
        )
        # OpenCV would cut to the best before it looks at the mask, so the cut is made here.
        found = detector.detect(gray, _mask_array(image.mask))
        found = sorted(found, key=lambda k: (-k.response, k.pt[1], k.pt[0], k.angle))
        found = found[: options.max_keypoints]
        found, descriptors = detector.compute(gray, found) if found else ((), None)
        return _encoding(image, found, descriptors)

    @torch.inference_mode()
    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        """Match two encodings; score = cosine similarity of the descriptors."""
        places = [_places(e.keypoints).to(self.device) for e in (a, b)]
        # SIFT describes a place once per dominant orientation; a twin is no rival.
        index, score = self._nearest(a, b, places[1])
        keep = distance(score) <= self.options.max_distance
        index, score = _one_per_place(index[keep], score[keep], *places)
        return Matches.from_indices(a, b, index, score.clamp(0, 1))

    def _nearest(
        self, a: SparseEncoding, b: SparseEncoding, places: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mutual nearest neighbours that pass the ratio test in image 1, and their cosines."""
        ends = [e.descriptors.to(self.device).float() for e in (a, b)]
        index, score = mutual_nearest(*ends)
        if self.options.ratio < 1:
            rival = rivals(ends[0][index[:, 0]], ends[1], index[:, 1], places)
            keep = distance(score) < self.options.ratio * distance(rival)
            index, score = index[keep], score[keep]
        return index, score


class RootSiftMatcher(SiftMatcher):
    """The benchmark's variant, kept number by number for comparison with published tables.

    OpenCV's default upscale is part of it: its keypoints lie a quarter pixel right of and below
    the true place (in the octave that OpenCV doubles). ``sift`` has no such shift.
    """

    options_type = RootSiftOptions
    encode_fields = ("max_size", "pixels_per_keypoint", "contrast_threshold")

    def encode(self, image: ImageData) -> SparseEncoding:
        """Detect and describe keypoints of an RGB image (3, H, W)."""
        import cv2

        gray = _to_gray(image.image, truncate=True)
        height, width = gray.shape
        detector = cv2.SIFT_create(  # type: ignore[attr-defined]
            nfeatures=height * width // self.options.pixels_per_keypoint,
            contrastThreshold=self.options.contrast_threshold,
        )
        found, descriptors = detector.detectAndCompute(gray, _mask_array(image.mask))
        return _encoding(image, found, descriptors)

    @torch.inference_mode()
    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        """Match two encodings; every keypoint is a place of its own."""
        index, score = self._nearest(a, b)
        return Matches.from_indices(a, b, index, score.clamp(0, 1))


def _one_per_place(
    index: torch.Tensor, score: torch.Tensor, places0: torch.Tensor, places1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the best match of every place, and let the first keypoint there stand for it."""
    order = score.argsort(descending=True, stable=True)
    taken0: set[int] = set()
    taken1: set[int] = set()
    rows = []
    pairs = zip(places0[index[order, 0]].tolist(), places1[index[order, 1]].tolist(), strict=True)
    for row, (p, q) in zip(order.tolist(), pairs, strict=True):
        if p not in taken0 and q not in taken1:
            taken0.add(p)
            taken1.add(q)
            rows.append((p, row, q))
    rows.sort()
    if not rows:
        return index[:0], score[:0]
    chosen = torch.tensor(rows, device=index.device)
    return chosen[:, [0, 2]], score[chosen[:, 1]]


def _places(keypoints: torch.Tensor) -> torch.Tensor:
    """(N,) index of the first keypoint at the same position."""
    _, inverse = torch.unique(keypoints, dim=0, return_inverse=True)
    first = torch.full((len(keypoints),), len(keypoints), dtype=torch.long)
    first.scatter_reduce_(0, inverse, torch.arange(len(keypoints)), reduce="amin")
    return first[inverse]


def _to_gray(image: torch.Tensor, *, truncate: bool) -> np.ndarray:
    """(H, W) uint8 of a gray or RGB image (1 or 3, H, W) in [0, 1]."""
    # The benchmark drops the fraction. A byte can then lose one, because 255 * (v / 255) may lie
    # below v in float32.
    import cv2

    scaled = image.detach().cpu().numpy() * np.float32(255)
    array = (scaled if truncate else np.rint(scaled)).clip(0, 255).astype(np.uint8)
    if array.shape[0] == 1:
        return np.ascontiguousarray(array[0])
    gray: np.ndarray = cv2.cvtColor(
        np.ascontiguousarray(array.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY
    )
    return gray


def _mask_array(mask: torch.Tensor | None) -> np.ndarray | None:
    return None if mask is None else (mask.cpu().numpy() * np.uint8(255)).astype(np.uint8)


def _encoding(image: ImageData, found: Any, descriptors: np.ndarray | None) -> SparseEncoding:
    if descriptors is None or len(found) == 0:
        empty = torch.empty(0, 2)
        return encode_network_keypoints(image, empty, torch.empty(0, 128), torch.empty(0))
    xy = torch.tensor([k.pt for k in found], dtype=torch.float32)
    scores = torch.tensor([k.response for k in found], dtype=torch.float32)
    root = torch.from_numpy(descriptors).float()
    root = (root / root.sum(1, keepdim=True).clamp(min=1e-12)).sqrt()
    order = scores.argsort(descending=True, stable=True)
    return encode_network_keypoints(image, xy[order], root[order], scores[order])
