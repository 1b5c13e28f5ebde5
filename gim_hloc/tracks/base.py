"""What linking gives: keypoints of every image and matches by index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Pair = tuple[str, str]
Arrays = dict[str, np.ndarray]


def matches0_arrays(rows: np.ndarray, scores: np.ndarray, count: int) -> Arrays:
    """Matches of a pair in hloc's layout.

    Args:
        rows: (M, 2) rows of both images' keypoints.
        scores: (M,).
        count: keypoints of image 0.

    Returns:
        ``matches0`` (count,) int32, -1 for none, and ``matching_scores0`` (count,) float16.
    """
    matches0 = np.full(count, -1, dtype=np.int32)
    scores0 = np.zeros(count, dtype=np.float16)
    matches0[rows[:, 0]] = rows[:, 1]
    scores0[rows[:, 0]] = scores
    return {"matches0": matches0, "matching_scores0": scores0}


@dataclass(kw_only=True)
class Tracks:
    """Keypoints and matches of a scene.

    Attributes:
        keypoints: name -> (N, 2) float32 stored pixels, hloc's frame.
        matches: (name0, name1) -> (M, 2) int64 rows into the two images' keypoints, sorted by the
            first; no row occurs twice on one side.
        scores: (name0, name1) -> (M,) float32 in [0, 1] (``quantized``: as the matcher gave them).
        keypoint_scores: name -> (N,) float32, larger is better; only comparable within an image.
        lengths: (T,) int64 number of images of each track, or None where tracks are only implied
            by the matches.
    """

    keypoints: dict[str, np.ndarray]
    matches: dict[Pair, np.ndarray]
    scores: dict[Pair, np.ndarray]
    keypoint_scores: dict[str, np.ndarray]
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of tracks of two or more images."""
        return len(self.track_lengths())

    def triples(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """(name0, name1, rows) of every pair, as ``colmap.build_database`` takes them."""
        for (a, b), rows in self.matches.items():
            yield a, b, rows

    def matches_arrays(self, pair: Pair) -> Arrays:
        """Matches of a pair in hloc's layout, none where the pair has none."""
        nothing = np.zeros((0, 2), np.int64)
        return matches0_arrays(
            self.matches.get(pair, nothing),
            self.scores.get(pair, nothing[:, 0]),
            len(self.keypoints[pair[0]]),
        )

    def track_lengths(self) -> np.ndarray:
        """(T,) int64 number of different images of each track."""
        if self.lengths is None:
            track, image, _ = self.observations()
            both = np.unique(np.stack([track, image]), axis=1)
            self.lengths = np.bincount(both[0]) if both.size else np.zeros(0, np.int64)
        return self.lengths

    def histogram(self) -> dict[int, int]:
        """Number of tracks by number of images."""
        lengths, counts = np.unique(self.track_lengths(), return_counts=True)
        return {int(k): int(n) for k, n in zip(lengths, counts, strict=True)}

    def statistics(self) -> dict[str, float]:
        """Figures for the report: numbers of tracks, their mean length, share of two-view ones."""
        lengths = self.track_lengths()
        return {
            "tracks": len(lengths),
            "tracks_of_3_or_more": int((lengths >= 3).sum()),
            "mean_track_length": float(lengths.mean()) if len(lengths) else 0.0,
            "two_view_share": float((lengths == 2).mean()) if len(lengths) else 0.0,
            "mean_keypoints": float(np.mean([len(k) for k in self.keypoints.values()]))
            if self.keypoints
            else 0.0,
            "matches": sum(map(len, self.matches.values())),
        }

    def observations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tracks as the connected components of the matches, those of one keypoint left out.

        Returns:
            track (K,), image (K,) index into ``keypoints``' order, row (K,) among its keypoints;
            all int64, sorted by track, then image.
        """
        return components(
            [len(k) for k in self.keypoints.values()], list(self.keypoints), self.matches
        )


def components(
    counts: Sequence[int], names: Sequence[str], matches: Mapping[Pair, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Connected components of matches, see ``Tracks.observations``."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    start = dict(zip(names, offsets[:-1], strict=True))
    edges = [rows + np.array([start[a], start[b]]) for (a, b), rows in matches.items() if len(rows)]
    ends = np.concatenate(edges) if edges else np.zeros((0, 2), np.int64)
    total = int(offsets[-1])
    graph = coo_matrix((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), (total, total))
    _, label = connected_components(graph, directed=False)
    size = np.bincount(label, minlength=1)
    nodes = np.flatnonzero(size[label] > 1) if total else np.zeros(0, np.int64)
    image = np.searchsorted(offsets, nodes, side="right") - 1
    order = np.lexsort((nodes, label[nodes]))
    nodes, image = nodes[order], image[order]
    _, track = np.unique(label[nodes], return_inverse=True)
    return track.astype(np.int64), image, nodes - offsets[image]
