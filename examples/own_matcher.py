"""A matcher of your own, OpenCV's ORB: gim-reconstruct photos out --matcher own_matcher:Orb.

Does yours keep all promises? python -m gim_hloc.matchers.check own_matcher:Orb
"""

import cv2
import numpy as np
import torch

from gim_hloc.matchers import ImageData, MatcherBase, MatcherInfo, Matches, SparseEncoding
from gim_hloc.matchers.sparse import encode_network_keypoints


class Orb(MatcherBase[SparseEncoding]):
    """ORB keypoints, matched by mutual nearest neighbours in Hamming distance."""

    info = MatcherInfo(name="orb", kind="sparse", colour="gray", binary=True, summary="ORB")
    presets = {"fast": {"max_size": 640}, "precise": {"max_size": 2048}}  # noqa: RUF012

    def encode(self, image: ImageData) -> SparseEncoding:
        """Find and describe keypoints, strongest first, where the mask allows them."""
        gray = (image.image[0].numpy() * 255).round().astype(np.uint8)
        mask = None if image.mask is None else image.mask.numpy().astype(np.uint8)
        found, bits = cv2.ORB_create(4000).detectAndCompute(gray, mask)
        xy = torch.tensor([point.pt for point in found]).reshape(-1, 2)
        scores = torch.tensor([point.response for point in found])
        bits = torch.zeros(0, 32, dtype=torch.uint8) if bits is None else torch.from_numpy(bits)
        best = scores.argsort(descending=True, stable=True)
        return encode_network_keypoints(image, xy[best], bits[best], scores[best])

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        """Match two encodings."""
        matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)
        found = matcher.match(*(e.descriptors.numpy() for e in (a, b))) if len(a) * len(b) else ()
        found = [m for m in found if m.distance < 50]  # of 256 bits; by chance, 128 differ
        rows = torch.tensor([(m.queryIdx, m.trainIdx) for m in found]).reshape(-1, 2)
        return Matches.from_indices(a, b, rows, torch.tensor([1 - m.distance / 256 for m in found]))
