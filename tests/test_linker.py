"""Linkers: what they store of a pair, and what they make of a scene, on exact matches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks.scene import SceneOptions, SyntheticDense, make_scene
from gim_hloc.matchers import Matcher, MatcherBase, MatcherInfo, Matches, SparseEncoding
from gim_hloc.matchers.dense import DenseEncoding
from gim_hloc.options import AnchoredOptions, QuantizedOptions
from gim_hloc.tracks.base import Pair, Tracks
from gim_hloc.tracks.linker import (
    Anchored,
    AnchoredMatches,
    ImagePoints,
    Indexed,
    Linker,
    Quantized,
    linker_for,
)
from gim_hloc.types import ImageData, ImageOptions

SCENE = make_scene(SceneOptions(views=4, size=(320, 240), boxes=2))
NAMES = SCENE.names
PAIRS = list(itertools.combinations(NAMES, 2))


def info(kind: Any) -> MatcherInfo:
    return MatcherInfo(
        name=f"known_{kind}", kind=kind, checkpoint=(), licence="MIT", commercial=True,
        colour="rgb", summary="knows the answer",
    )  # fmt: skip


def exact(**overrides: Any) -> SyntheticDense:
    return SyntheticDense.for_scene(
        SCENE, size=(120, 160), noise_px=0.0, outlier_share=0.0, num_matches=300, **overrides
    )


class Semidense(SyntheticDense):
    """The true warps, as matches on a grid of 8 px."""

    def match(self, a: DenseEncoding, b: DenseEncoding) -> Matches:
        grid = np.stack(np.meshgrid(np.arange(4, 320, 8.0), np.arange(4, 240, 8.0)), -1)
        xy = torch.from_numpy(grid.reshape(-1, 2)).float()
        reading = self.warp(a, b).read(xy)
        good = (reading.certainty > 0.5) & (reading.cycle_px < 2)
        return Matches(
            keypoints0=xy[good], keypoints1=reading.xy_px[good], scores=reading.certainty[good]
        )

    def match_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Matches]:
        return [self.match(a, b) for a, b in pairs]

    def warp_batch(self, pairs: Any) -> Any:
        assert len(pairs) == 1, "a semi-dense matcher is not asked for warps"
        return super().warp_batch(pairs)


def semidense() -> Semidense:
    matcher = Semidense.for_scene(
        SCENE, size=(120, 160), noise_px=0.0, outlier_share=0.0, num_matches=300
    )
    assert isinstance(matcher, Semidense)
    matcher.info = info("semidense")
    return matcher


POINTS = {
    name: xy.astype(np.float32)
    for name, xy in {
        NAMES[0]: SCENE.true_position(
            NAMES[0], NAMES[0], np.random.default_rng(0).uniform(30, 200, (60, 2))
        )
    }.items()
}
POINTS |= {
    name: SCENE.true_position(NAMES[0], name, POINTS[NAMES[0]].astype(np.float64)).astype(
        np.float32
    )
    for name in NAMES[1:]
}


class Sparse(MatcherBase[SparseEncoding]):
    """Points of the scene by number; those that an image does not see are missing."""

    def __init__(self) -> None:
        super().__init__(
            info=info("sparse"),
            options=QuantizedOptions(),
            image_options=ImageOptions(max_size=None),
            device=torch.device("cpu"),
        )

    def encode(self, image: ImageData) -> SparseEncoding:
        seen = np.flatnonzero(np.isfinite(POINTS[image.name]).all(1))
        return SparseEncoding.make(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            keypoints=torch.from_numpy(POINTS[image.name][seen]),
            descriptors=torch.from_numpy(seen[:, None]).float(),
            scores=torch.ones(len(seen)),
        )

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        _, rows_a, rows_b = np.intersect1d(
            a.descriptors[:, 0].numpy(), b.descriptors[:, 0].numpy(), return_indices=True
        )
        rows = torch.from_numpy(np.stack([rows_a, rows_b], 1))
        return Matches.from_indices(a, b, rows, torch.full((len(rows),), 0.5))


def encode(matcher: Matcher) -> dict[str, Any]:
    return {
        name: matcher.encode(SyntheticDense.for_scene(SCENE).blank_image(name)) for name in NAMES
    }


def prepared(linker: Linker) -> Linker:
    images = []
    for name in NAMES:
        seen = POINTS[name][np.isfinite(POINTS[name]).all(1)]
        images.append(ImagePoints(name=name, size=(320, 240), keypoints=seen))
    linker.prepare(images)
    return linker


def stored(linker: Linker) -> dict[Pair, dict[str, np.ndarray]]:
    encodings = encode(linker.matcher)
    reduced = linker.reduce([(encodings[a], encodings[b]) for a, b in PAIRS])
    return dict(zip(PAIRS, reduced, strict=True))


def errors(tracks: Tracks) -> np.ndarray:
    """Distances (K,) of matches from the truth, px."""
    found = []
    for (a, b), rows in tracks.matches.items():
        there = SCENE.true_position(a, b, tracks.keypoints[a][rows[:, 0]].astype(np.float64))
        found.append(np.linalg.norm(there - tracks.keypoints[b][rows[:, 1]], axis=1))
    return np.concatenate(found)


CASES = {
    "sparse": (Sparse, "anchored", Indexed, 0.01),
    "dense": (exact, "anchored", Anchored, 0.6),
    "semidense": (semidense, "anchored", AnchoredMatches, 0.6),
    "quantized": (exact, "quantized", Quantized, 3.0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_linker_gives_true_matches_through_one_interface(case: str) -> None:
    make, kind, expected, limit_px = CASES[case]
    linker = linker_for(
        make(), kind, anchored=AnchoredOptions(grid_px=0), quantized=QuantizedOptions(cell_size=4)
    )
    assert type(linker) is expected
    assert linker.detector_free == (case != "sparse")
    arrays = stored(prepared(linker))
    asked: list[Pair] = []

    def read(pair: Pair) -> dict[str, np.ndarray]:
        asked.append(pair)
        return arrays[pair]

    ticks = itertools.count()
    tracks = linker.link(NAMES, PAIRS, read, lambda: next(ticks))
    assert asked == PAIRS
    assert next(ticks) == len(PAIRS)
    assert set(tracks.keypoints) == set(tracks.keypoint_scores) == set(NAMES)
    found = errors(tracks)
    found = found[np.isfinite(found)]
    assert len(found) > 100
    assert np.quantile(found, 0.9) < limit_px
    for pair in PAIRS:
        confidences = linker.confidences(arrays[pair])
        assert ((confidences > 0) & (confidences <= 1)).all()
        xy0, xy1, scores = linker.points(pair, arrays[pair])
        assert xy0.shape == xy1.shape == (len(confidences), 2)
        np.testing.assert_allclose(scores, confidences, rtol=1e-6)
        away = np.linalg.norm(SCENE.true_position(*pair, xy0.astype(np.float64)) - xy1, axis=1)
        assert np.nanmedian(away) < 0.6
        # hloc's layout
        layout = tracks.matches_arrays(pair)
        assert (layout["matches0"].dtype, layout["matching_scores0"].dtype) == (
            np.int32,
            np.float16,
        )
        rows = np.flatnonzero(layout["matches0"] > -1)
        np.testing.assert_array_equal(
            np.stack([rows, layout["matches0"][rows]], 1), tracks.matches[pair]
        )


def test_arrays_of_a_pair_do_not_depend_on_the_others_reduced_with_it() -> None:
    for make, kind, _, _ in CASES.values():
        linker = prepared(linker_for(make(), kind))
        encodings = encode(linker.matcher)
        some = PAIRS[:2]
        reduced = linker.reduce([(encodings[a], encodings[b]) for a, b in some])
        for (a, b), arrays in zip(some, reduced, strict=True):
            (alone,) = linker.reduce([(encodings[a], encodings[b])])
            for name, values in arrays.items():
                np.testing.assert_array_equal(alone[name], values)


def test_settings_name_what_decides_stored_arrays() -> None:
    """Byte by byte those of 0.1's files: what an earlier run stored is found again."""
    matcher = exact()
    anchored = linker_for(matcher, anchored=AnchoredOptions(grid_px=12)).settings()
    assert anchored["tracks"] == "anchored"
    assert anchored["tracks.grid_px"] == 12
    assert anchored["tracks.max_keypoints"] == 12288
    assert anchored["warp.size"] == (120, 160)
    assert anchored["match.num_matches"] == 300
    assert {key for key in anchored if key.startswith("warp.")} == {
        f"warp.{key}" for key in matcher.encode_settings()
    }
    quantized = linker_for(matcher, "quantized").settings()
    assert quantized["tracks"] == "quantized"
    assert quantized["tracks.cell_size"] == 8
    assert linker_for(Sparse()).settings() == {"match.matcher": "known_sparse"} | {
        f"match.{k}": v
        for k, v in {"max_error": 2.0, "cell_size": 8, "max_keypoints": 8192}.items()
    }


def test_fixed_keypoints_are_the_anchors_and_no_others() -> None:
    linker = Anchored(exact(), AnchoredOptions(grid_px=8))
    a, b = NAMES[:2]
    xy = np.array([[50.25, 60.5], [50.25, 60.5], [200.0, 100.0]], np.float32)
    nothing = np.zeros((0, 2), np.float32)
    linker.prepare(
        [
            ImagePoints(name=a, size=(320, 240), keypoints=nothing, fixed=True),
            ImagePoints(name=b, size=(320, 240), keypoints=xy, fixed=True),
        ]
    )
    np.testing.assert_array_equal(linker.anchors[b].xy_px, xy)  # twins and order stay
    encodings = encode(linker.matcher)
    (arrays,) = linker.reduce([(encodings[a], encodings[b])])
    xy0, xy1, _ = linker.points((a, b), arrays)
    assert len(xy1)
    assert {tuple(p) for p in xy1} <= {tuple(p) for p in xy}
    true = SCENE.true_position(b, a, xy1.astype(np.float64))
    assert np.linalg.norm(true - xy0, axis=1).max() < 0.5
    assert len(linker.points((a, b), arrays, at=0)[0]) == 0
    for ours, all_of_them in zip(linker.points((a, b), arrays, at=1), (xy0, xy1), strict=False):
        np.testing.assert_array_equal(ours, all_of_them)


def test_a_quantised_linker_takes_matches_from_where_it_is_told() -> None:
    matcher = semidense()

    def turned(pairs: Any) -> list[Matches]:
        return [
            Matches(keypoints0=m.keypoints1, keypoints1=m.keypoints0, scores=m.scores)
            for m in matcher.match_batch([(b, a) for a, b in pairs])
        ]

    linker = Quantized(matcher, QuantizedOptions(), match=turned)
    arrays = stored(linker)[PAIRS[0]]
    assert (arrays["keypoints1"] % 8 == 4).all()  # cells are in image 1 now
    assert (arrays["keypoints0"] % 8 != 4).any()


def test_sparse_matches_without_rows_are_refused() -> None:
    class Rowless(Sparse):
        def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
            return Matches(
                keypoints0=a.keypoints[:1], keypoints1=b.keypoints[:1], scores=torch.ones(1)
            )

    linker = linker_for(Rowless())
    encodings = encode(linker.matcher)
    with pytest.raises(InputError, match="known_sparse is registered as sparse, but"):
        linker.reduce([(encodings[NAMES[0]], encodings[NAMES[1]])])


def test_only_the_linker_and_the_plugin_ask_what_kind_a_matcher_is() -> None:
    """``info.kind`` elsewhere would be a branch that the next kind of matcher breaks."""
    root = Path(__file__).parents[1]
    allowed = {
        "gim_hloc/matchers/base.py", "gim_hloc/matchers/registry.py", "gim_hloc/tracks/linker.py",
        "gim_hloc/matchers/check.py",  # what a kind promises
        "gim_hloc/hloc_plugin/models.py",  # hloc's kinds of models, and where LoFTR's free end is
    }  # fmt: skip
    found = {
        str(path.relative_to(root))
        for folder in ("gim_hloc", "pairs", "pipelines", "evaluation", "training")
        for path in (root / folder).rglob("*.py")
        if re.search(r"(info|describe\(\w+\))\.kind\b", path.read_text(encoding="utf-8"))
    }
    assert found <= allowed
