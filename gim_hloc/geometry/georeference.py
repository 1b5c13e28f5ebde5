"""A model laid on measured positions of its cameras: metres, north, and up.

Positions give scale, place and turn as far as they spread; what they leave loose (a straight line
of cameras: the roll about it) or weak (heights that are worse than the rest) comes from the way in
which cameras are held: level, or looking straight down. NumPy and SciPy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy  # its packages are loaded when they are used

from gim_hloc.geometry.pose import Similarity, fit_similarity, robust_umeyama

# Beyond so many standard deviations a position is wrong.
_WRONG = 5.0
# With fewer positions none is called wrong: any three of them agree with each other.
_ROBUST_FROM = 6
# What all images of a set may have in common, degrees: level by hand, straight down by a gimbal.
_LEVEL_DEG, _NADIR_DEG = 1.0, 0.5
# Images beyond these are held otherwise, degrees.
_HELD_LEVEL_DEG, _HELD_NADIR_DEG = 30.0, 15.0
_LOOSE_DEG = 5.0
_LEAST_M = 1e-3


@dataclass(frozen=True, kw_only=True)
class Georeference:
    """How a model lies on positions.

    Attributes:
        similarity: from the model to metres, z up.
        residuals: (N, 3) m, positions less cameras; NaN where there is no height.
        wrong: (N,) bool, positions that were not used.
        scale_std: standard deviation of the scale, as a share of it.
        up_std_deg: standard deviation of the vertical, degrees.
        loose_deg: the same by the positions alone.
        held: what cameras say of up: "level", "straight down" or nothing.
    """

    similarity: Similarity
    residuals: np.ndarray
    wrong: np.ndarray
    scale_std: float
    up_std_deg: float
    loose_deg: float
    held: str

    @property
    def is_loose(self) -> bool:
        """Whether positions alone leave a turn open: they stand about on a line."""
        return self.loose_deg > _LOOSE_DEG


def georeference(
    centres: np.ndarray, positions: np.ndarray, rights: np.ndarray, forwards: np.ndarray
) -> Georeference:
    """Lay cameras on positions, a part of which may be wrong.

    Args:
        centres: (N, 3) in the model, N >= 3, in different places.
        positions: (N, 3) m, z up; heights may be NaN. Where all are, they are taken to be equal.
        rights: (N, 3) to the right in each upright image, in the model.
        forwards: (N, 3) viewing directions, in the model.
    """
    count = len(centres)
    flat = np.where(np.isfinite(positions), positions, _median_height(positions))
    start = (
        robust_umeyama(centres, flat, fit=fit_similarity)
        if count >= _ROBUST_FROM
        else fit_similarity(centres, flat)
    )
    if not np.isfinite(positions[:, 2]).any():
        positions = flat  # one height is better than none: horizontal places hardly tell of tilts
    problem = _Problem(centres, positions, rights, forwards)
    first = problem.solve(start, held="")
    near = _rolled(start, problem) if first.is_loose else first.similarity
    held = problem.held_like(near)
    if not held:
        return first
    better = problem.solve(near, held=held)
    if first.is_loose:
        return better
    moved = _up_angle_deg(first.similarity, better.similarity)
    allowed = 3 * np.sqrt(max(0.0, first.up_std_deg**2 - better.up_std_deg**2))
    return better if moved <= allowed else first  # else cameras are held otherwise


def upright(rights: np.ndarray, forwards: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) of a model that puts up on z, by cameras that are held level.

    Args:
        rights: (N, 3) to the right in each upright image.
        forwards: (N, 3) viewing directions.
    """
    ups = np.cross(rights, forwards)
    up = ups.mean(0)
    if np.linalg.norm(up) < 0.3:  # turned about the vertical, looking down
        up = -forwards.mean(0)
    spread = rights.T @ rights / len(rights)
    found = np.linalg.solve(spread + 0.01 * np.eye(3), up)
    rotation, _ = scipy.spatial.transform.Rotation.align_vectors(
        [[0.0, 0, 1]], [found / np.linalg.norm(found)]
    )
    return np.asarray(rotation.as_matrix())


def _median_height(positions: np.ndarray) -> float:
    known = positions[np.isfinite(positions[:, 2]), 2]
    return float(np.median(known)) if len(known) else 0.0


def _up_angle_deg(a: Similarity, b: Similarity) -> float:
    return float(np.degrees(np.arccos(np.clip(a.rotation[2] @ b.rotation[2], -1, 1))))


def _rolled(similarity: Similarity, problem: _Problem) -> Similarity:
    """The turn about the line of cameras at which they are held most level, and not upside down."""
    here = similarity(problem.centres)
    middle = here.mean(0)
    axis = np.linalg.svd(here - middle)[2][0]
    ups = np.cross(problem.rights, problem.forwards)

    def turned(angle: float) -> Similarity:
        turn = scipy.spatial.transform.Rotation.from_rotvec(angle * axis).as_matrix()
        return Similarity(
            scale=similarity.scale,
            rotation=turn @ similarity.rotation,
            translation=turn @ (similarity.translation - middle) + middle,
        )

    def cost(candidate: Similarity) -> float:
        z = candidate.rotation[2]
        ahead, down = (ups @ z).mean(), -(problem.forwards @ z).mean()
        return float(((problem.rights @ z) ** 2).mean() - 0.05 * max(ahead, down))

    return min(map(turned, np.linspace(0, 2 * np.pi, 360, endpoint=False)), key=cost)


class _Problem:
    """Least squares over scale, turn and shift."""

    def __init__(
        self, centres: np.ndarray, positions: np.ndarray, rights: np.ndarray, forwards: np.ndarray
    ) -> None:
        self.centres, self.positions = centres, positions
        self.rights, self.forwards = rights, forwards

    def solve(self, start: Similarity, *, held: str) -> Georeference:
        """The best similarity near one; which positions are wrong is judged anew in between."""
        found, wrong = start, np.zeros(len(self.centres), bool)
        for attempt in range(10):
            sigma, before = self._sigma(found), wrong
            if len(self.centres) >= _ROBUST_FROM:
                wrong = self._distance(found, sigma) > _WRONG
            found, information = self._step(found, sigma, wrong, held)
            if (wrong == before).all() and attempt > 1:
                break
        alone = self._step(found, sigma, wrong, "")[1] if held else information
        covariance = _inverse(information)
        residuals = self.positions - found(self.centres)
        return Georeference(
            similarity=found, residuals=residuals, wrong=wrong, held=held,
            scale_std=float(np.sqrt(covariance[0, 0])), up_std_deg=_tilt_deg(covariance),
            loose_deg=_tilt_deg(_inverse(alone)),
        )  # fmt: skip

    def _sigma(self, found: Similarity) -> np.ndarray:
        """Robust standard deviations (3,) across, across and in height, m."""
        residuals = self.positions - found(self.centres)
        across = np.median(np.linalg.norm(residuals[:, :2], axis=1)) / 1.1774  # of a Rayleigh's
        heights = residuals[np.isfinite(residuals[:, 2]), 2]
        height = 1.4826 * np.median(np.abs(heights)) if len(heights) else np.inf
        return np.maximum([across, across, height], _LEAST_M)

    def _distance(self, found: Similarity, sigma: np.ndarray) -> np.ndarray:
        scaled = (self.positions - found(self.centres)) / sigma
        return np.linalg.norm(np.nan_to_num(scaled), axis=1)

    def held_like(self, found: Similarity) -> str:
        """How cameras are held, by a first idea of up."""
        down = np.degrees(np.arccos(np.clip(-self.forwards @ found.rotation[2], -1, 1)))
        if (down < _HELD_NADIR_DEG).mean() > 0.8:
            return "straight down"
        return "level" if (self._roll_deg(found) < _HELD_LEVEL_DEG).mean() > 0.8 else ""

    def _roll_deg(self, found: Similarity) -> np.ndarray:
        sine = np.clip(self.rights @ found.rotation[2], -1, 1)
        return np.abs(np.degrees(np.arcsin(sine)))

    def _step(
        self, found: Similarity, sigma: np.ndarray, wrong: np.ndarray, held: str
    ) -> tuple[Similarity, np.ndarray]:
        """The least squares solution, and its information (7, 7)."""
        middle = self.centres[~wrong].mean(0)
        anchor = found(middle)
        offsets = (self.centres[~wrong] - middle) @ found.rotation.T * found.scale
        wanted = self.positions[~wrong] - anchor
        tilts = self._tilts(found, held)

        def rows(x: np.ndarray) -> np.ndarray:
            turn = scipy.spatial.transform.Rotation.from_rotvec(x[1:4]).as_matrix()
            distances = (wanted - np.exp(x[0]) * offsets @ turn.T - x[4:]) / sigma
            values = np.nan_to_num(distances.ravel())  # 0 where there is no height
            return np.concatenate([values, *(weight * (v @ turn.T)[:, axes].ravel()
                                             for v, axes, weight in tilts)])  # fmt: skip

        solved = scipy.optimize.least_squares(rows, np.zeros(7), method="trf")
        turn = (
            scipy.spatial.transform.Rotation.from_rotvec(solved.x[1:4]).as_matrix() @ found.rotation
        )
        scale = float(found.scale * np.exp(solved.x[0]))
        result = Similarity(
            scale=scale,
            rotation=turn,
            translation=anchor + solved.x[4:] - scale * turn @ middle,
        )
        return result, solved.jac.T @ solved.jac

    def _tilts(self, found: Similarity, held: str) -> list[tuple[np.ndarray, list[int], float]]:
        """Directions (M, 3) in metres' axes, of which components are 0, and their weight."""
        if not held:
            return []
        if held == "level":
            inside = self._roll_deg(found) < _HELD_LEVEL_DEG
            directions, axes, common = self.rights[inside] @ found.rotation.T, [2], _LEVEL_DEG
        else:
            directions, axes, common = self.forwards @ found.rotation.T, [0, 1], _NADIR_DEG
        spread = 1.4826 * np.median(np.abs(directions[:, axes]))
        each = np.sqrt(spread**2 + len(directions) * np.radians(common) ** 2)
        return [(directions, axes, float(1 / each))]


def _inverse(information: np.ndarray) -> np.ndarray:
    weak = 1e-9 * np.diag(np.diag(information).max() * np.ones(len(information)))
    return np.asarray(np.linalg.inv(information + weak))


def _tilt_deg(covariance: np.ndarray) -> float:
    """The larger standard deviation of a turn about the two level axes."""
    largest = float(np.linalg.eigvalsh(covariance[1:3, 1:3])[-1])
    return min(90.0, float(np.degrees(np.sqrt(max(0.0, largest)))))
