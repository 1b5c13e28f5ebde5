"""Pairs on a page: each image once, matches of a pair as numbers that ``pairs.js`` draws."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gim_hloc import draw

Pair = tuple[str, str]
Ends = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(M, 2) and (M, 2) stored pixels, integer = pixel centre, and (M,) bool: inliers."""

MAX_PAIRS = 2000
MAX_IMAGES = 150
_LINES = {"inlier": 120, "outlier": 40}  # of a pair
_SIDES = {50: 480, MAX_IMAGES: 320}  # images -> px, long side of each: a page of a few MB


def embed(
    names: Sequence[str],
    pairs: Iterable[Mapping[str, Any]],
    sizes: Mapping[str, tuple[int, int]],
    picture: Callable[[str], np.ndarray | None],
    matches: Callable[[Sequence[Pair]], Iterable[Ends]],
) -> dict[str, Any]:
    """What a page needs to show pairs, for ``<script type="application/json">``.

    Args:
        names: of the images; pairs are told by their places in it.
        pairs: with ``name0``, ``name1``, ``matches`` and ``inliers``, the most interesting first:
            of many, a part is embedded.
        sizes: (width, height) of the files, px.
        picture: of an image, of any size; None if it does not open.
        matches: of pairs, in their order.
    """
    place = {name: i for i, name in enumerate(names)}
    chosen: list[Mapping[str, Any]] = []
    shown: set[str] = set()
    for pair in pairs:
        new = {pair["name0"], pair["name1"]} - shown
        if len(chosen) < MAX_PAIRS and len(shown) + len(new) <= MAX_IMAGES:
            chosen.append(pair)
            shown |= new
    side = next(side for count, side in _SIDES.items() if len(shown) <= count)
    urls = [""] * len(names)
    for name in shown:
        pixels = picture(name)
        if pixels is not None:
            urls[place[name]] = draw.data_url(draw.fit(pixels, side, side), quality=75)
    rows = []
    keys = [(pair["name0"], pair["name1"]) for pair in chosen]
    for pair, key, ends in zip(chosen, keys, matches(keys), strict=True):
        a, b = key
        counts = [pair["inliers"], pair["matches"]]
        rows.append([place[a], place[b], *counts, *_pack(ends, (sizes[a], sizes[b]))])
    return {"names": list(names), "pictures": urls, "pairs": rows}


def _pack(ends: Ends, sizes: Sequence[tuple[int, int]]) -> tuple[int, str]:
    """Number of outliers, and some ends of them and then of inliers: uint16 x0, y0, x1, y1, base64.

    0 and 65535 are the edges of an image.
    """
    xy0, xy1, inlier = ends
    known = np.isfinite(xy0).all(1) & np.isfinite(xy1).all(1)
    rng = np.random.default_rng(0)
    outliers, inliers = (
        rng.permutation(np.flatnonzero(kind & known))[: _LINES[name]]
        for name, kind in (("outlier", ~inlier), ("inlier", inlier))
    )
    rows = np.concatenate([outliers, inliers])
    shares = np.concatenate([(xy0[rows] + 0.5) / sizes[0], (xy1[rows] + 0.5) / sizes[1]], axis=1)
    numbers = np.rint(np.clip(shares, 0, 1) * 65535).astype("<u2")
    return len(outliers), base64.b64encode(numbers.tobytes()).decode()
