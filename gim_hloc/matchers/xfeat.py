"""XFeat's keypoints with nearest neighbours or LighterGlue, and its semi-dense matches (XFeat*)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from gim_hloc import weights
from gim_hloc.matchers.common import MatcherBase, weight_files
from gim_hloc.matchers.lightglue import LightGlueMatcher
from gim_hloc.matchers.nearest import Nearest, mutual_nearest, ratio
from gim_hloc.matchers.registry import describe
from gim_hloc.matchers.sparse import DetectorMatcher, DetectorOptions
from gim_hloc.networks.xfeat import CELL, Cells, XFeat
from gim_hloc.options import Count, Share, options
from gim_hloc.types import Encoding, ImageData, Matches, SparseEncoding, apply_affine

# Keypoints come strongest first. So few tell that a pair shows nothing in common, in a sixteenth of
# the time (docs/performance.md has how often that is wrong); then twice as many are compared, then
# all.
_STRONG = 1024


def load_network(path: Path) -> XFeat:
    """XFeat with the weights of a file, ready to run."""
    network = XFeat()
    weights.load_into(network, weights.load_state_dict(path), path=path)
    return network.fold()


@options
class XFeatOptions(DetectorOptions):
    """Numbers of XFeat with nearest neighbours."""

    detection_threshold: Share = 0.05  # lowest probability of a keypoint
    min_cosine: float = 0.82  # of matched descriptors, exclusive; -1 switches the test off
    # Nearest over second nearest distance, in both images; 1 switches the test off.
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    # A pair that has fewer matches for 1024 of the strongest keypoints of both is left at these.
    min_strong: Annotated[int, Field(ge=0)] = 8
    # A pair with so many matches among the strongest ones of both is left at these; None: never.
    enough: Count | None = None


class XFeatMatcher(DetectorMatcher):
    """XFeat, mutual nearest neighbours, and a ratio test in both images."""

    options_type = XFeatOptions

    @staticmethod
    def load_detector(path: Path) -> torch.nn.Module:
        """See ``DetectorMatcher``."""
        return load_network(path)

    @torch.inference_mode()
    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        """Match two encodings; score = probability that the match is right, from the ratio."""
        nearest = Nearest(*(e.descriptors.to(self.device).float() for e in (a, b)))
        every = max(len(a), len(b))
        for most in (_STRONG, 2 * _STRONG, every):
            index, ratios = self._tested(*nearest.among(most))
            enough = self.options.enough is not None and len(index) >= self.options.enough
            nothing = len(index) * _STRONG < self.options.min_strong * most
            if enough or nothing or every <= most:
                break
        # Measured (docs/accuracy.md): 0.95 of the matches are right at a ratio of 0.65, 0.87 at
        # 0.775, 0.74 at 0.875.
        return Matches.from_indices(a, b, index, 1 - ratios**8)

    def _tested(
        self, index: torch.Tensor, cosine: torch.Tensor, rival: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (K, 2) of neighbours that pass both tests, and their ratios (K,)."""
        ratios = ratio(cosine, rival)
        keep = ratios < self.options.ratio if self.options.ratio < 1 else ratios <= 1
        keep &= cosine > self.options.min_cosine
        return index[keep], ratios[keep]


class XFeatLighterGlue(LightGlueMatcher):
    """XFeat and LighterGlue."""

    def encode_settings(self) -> dict[str, Any]:
        """Those of ``xfeat``, whose features these are."""
        return {**super().encode_settings(), "matcher": "xfeat"}

    @staticmethod
    def load_detector(path: Path) -> torch.nn.Module:
        """See ``DetectorMatcher``."""
        return load_network(path)


@options
class XFeatStarOptions:
    """Numbers of XFeat*."""

    max_size: Count | None = 1024  # long side in pixels of the image; the network sees 0.6 and 1.3
    max_cells: Count = 4096  # per image, the most reliable; matching time grows with the square
    fine_threshold: Share = 0.25  # lowest confidence of a match's place, exclusive


@dataclass(kw_only=True)
class XFeatStarEncoding(Encoding):
    """What XFeat* holds of one image, in memory only."""

    cells: Cells = field(repr=False)


class XFeatStar(MatcherBase[XFeatStarEncoding]):
    """XFeat*: nearest neighbours among cells, then the place within the cell of image 1."""

    options_type = XFeatStarOptions
    encode_fields = ("max_size", "max_cells")

    def __init__(self, name: str, *, options: XFeatStarOptions, device: torch.device) -> None:
        info = describe(name)
        paths, hashes = weight_files(info)
        super().__init__(info=info, options=options, device=device, weights_hashes=hashes)
        (path,) = paths.values()
        self.network = load_network(path).to(device)

    @torch.inference_mode()
    def encode(self, image: ImageData) -> XFeatStarEncoding:
        """Describe the most reliable cells of an image (C, H, W) at two sizes."""
        cells = self.network.cells(
            image.image.to(self.device), max_cells=self.options.max_cells, mask=image.mask
        )
        return XFeatStarEncoding(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            cells=cells,
        )

    @torch.inference_mode()
    def match(self, a: XFeatStarEncoding, b: XFeatStarEncoding) -> Matches:
        """Match two encodings: from centres of cells of ``a`` to anywhere in ``b``."""
        ends = [Cells(*(tensor.to(self.device) for tensor in e.cells)) for e in (a, b)]
        index, _ = mutual_nearest(*(cells.descriptors for cells in ends))
        cells0, cells1 = (
            Cells(*(tensor[rows] for tensor in cells))
            for cells, rows in zip(ends, index.T, strict=True)
        )
        # The fine matcher moves its first argument.
        offset, confidence = self.network.offsets(cells1.descriptors, cells0.descriptors)
        # Measured with known shifts: a cell that stays stands for its centre, and offsets are from
        # a pixel beyond it (published coordinates are those of the cell's first pixel).
        xy0 = (cells0.corner + CELL / 2) * cells0.step - 0.5
        xy1 = (cells1.corner + offset + CELL / 2 + 1) * cells1.step - 0.5
        keep = confidence > self.options.fine_threshold
        return Matches(
            keypoints0=apply_affine(a.to_original, xy0[keep]),
            keypoints1=apply_affine(b.to_original, xy1[keep]),
            scores=confidence[keep].float().clamp(max=1).cpu(),
        )
