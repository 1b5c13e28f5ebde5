"""Depth of a view from the grey values of others: a plane sweep, then PatchMatch over surfaces.

A hypothesis is a whole map of inverse depth. Each pixel is carried into the other views by its own
depth and compared there within a window (zero-mean normalised cross-correlation), so that windows
bend with the surface, and a hypothesis costs one sample a pixel and view. Hypotheses are planes in
front of the camera, the surface through the sparse points, planes of neighbouring pixels carried on
and steps nearer and farther; each pixel takes the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from gim_hloc.geometry.depth import Pinhole, bases, median, read_map, slopes, speed

MASKED = -255.0  # in the place of a grey value

_NOISE = 4.0  # variance of grey values (0 to 255) that says nothing
_KEEP = 0.01  # correlation by which another hypothesis has to be better
_FAR = 1.1  # depth may leave its range by so much


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Numbers of the search.

    Attributes:
        coarsest: width or height at which it begins, px: the larger one.
        radius: of the windows, px.
        rounds: of propagation and refinement at each size.
        most_planes: of the sweep.
    """

    coarsest: int = 100
    radius: int = 2
    rounds: int = 2
    most_planes: int = 192


@dataclass(frozen=True, kw_only=True)
class GrayView:
    """A view with its grey values (H, W), 0 to 255, ``MASKED`` where it is masked."""

    camera: Pinhole
    gray: torch.Tensor

    def halved(self) -> GrayView:
        """At half the size."""
        small = F.avg_pool2d(self.gray[None, None], 2)[0, 0]
        masked = -F.max_pool2d(-self.gray[None, None], 2)[0, 0] < 0
        small[masked] = MASKED
        height, width = small.shape
        # Of an odd side the last row is left out.
        full = self.camera
        even = replace(full, width=2 * width, height=2 * height)
        return GrayView(camera=even.resized(width, height), gray=small)


def depth_of(
    view: GrayView,
    others: Sequence[GrayView],
    near_far: tuple[float, float],
    start: torch.Tensor | None = None,
    sweep: Sweep = Sweep(),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the depth of every pixel.

    Args:
        view: whose depth is wanted.
        others: views of the same things.
        near_far: least and greatest depth.
        start: (H, W) inverse depth of a rough surface, or None.
        sweep: numbers of the search.

    Returns:
        (H, W) inverse depth, and correlation with the two views that agree most.
    """
    levels = [(view, list(others))]
    while max(levels[-1][0].gray.shape) >= 2 * sweep.coarsest:
        last, rest = levels[-1]
        levels.append((last.halved(), [other.halved() for other in rest]))
    bounds = 1 / near_far[1], 1 / near_far[0]
    search = _Search(*levels[-1], sweep, bounds)
    inverse = search.planes()
    for level in reversed(levels):
        search = _Search(*level, sweep, bounds)
        inverse = _resized(inverse, search.shape)
        if start is not None and level is levels[-1]:
            surface = _resized(start, search.shape)
            inverse = search.best_of(inverse, (surface + k * search.step for k in range(-6, 7)))
        for number in range(sweep.rounds):
            inverse = search.propagate(median(inverse), 1 if number % 2 == 0 else 5)
            inverse = search.refine(median(inverse), 0.5 / (number + 1))
    inverse = median(inverse)
    return inverse, 1 - search.cost(inverse)


def best_two(values: torch.Tensor) -> torch.Tensor:
    """(H, W) mean of the two largest of values (S, H, W); of one, itself."""
    first, second = values[0], values[0] if len(values) == 1 else torch.full_like(values[0], -1.0)
    for value in values[1:]:
        second = torch.maximum(second, torch.minimum(first, value))
        first = torch.maximum(first, value)
    return (first + second) / 2


def _resized(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if tuple(values.shape) == shape:
        return values
    return F.interpolate(values[None, None], shape, mode="bilinear")[0, 0]


class _Search:
    """One view at one size."""

    def __init__(
        self,
        view: GrayView,
        others: Sequence[GrayView],
        sweep: Sweep,
        bounds: tuple[float, float],
    ) -> None:
        self.sweep, self.gray = sweep, view.gray
        self.shape = (view.gray.shape[0], view.gray.shape[1])
        self.low, self.high = bounds
        cameras = [other.camera for other in others]
        self.start, self.shift = bases(view.camera, cameras, view.gray.device)
        self.others = torch.stack([other.gray for other in others])[:, None]
        own = torch.stack([self.gray, self.gray * self.gray])
        self.mean, square = _box(own, sweep.radius)
        self.variance = (square - self.mean**2).clamp_min(0) + _NOISE
        middle = torch.full_like(self.gray, (self.low * self.high) ** 0.5)
        moved = torch.stack([speed(view.camera, camera, middle).median() for camera in cameras])
        self.step = 1 / float(moved.median().clamp_min(1e-12))  # inverse depth that moves 1 px

    def _places(self, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (S, 2, H, W) in the other views, and whether they are before the cameras."""
        there = self.start + inverse * self.shift
        return there[:, :2] / there[:, 2:].clamp_min(1e-6), there[:, 2] > 1e-6

    def correlation(self, inverse: torch.Tensor) -> torch.Tensor:
        """(S, H, W) with each other view; -1 where the pixel is outside, or masked."""
        xy, ahead = self._places(inverse)
        found, inside = read_map(self.others, xy)
        sums = _box(torch.cat([found, found * found, found * self.gray], 1), self.sweep.radius)
        mean, square, product = sums.unbind(1)
        variance = (square - mean**2).clamp_min(0) + _NOISE
        value = (product - mean * self.mean) / (variance * self.variance).sqrt()
        good = ahead & inside & (found[:, 0] >= 0) & (self.gray >= 0)
        return torch.where(good, value, value.new_tensor(-1.0))

    def cost(self, inverse: torch.Tensor) -> torch.Tensor:
        """(H, W): one less the correlation with the two views that agree most."""
        return 1 - best_two(self.correlation(inverse))

    def planes(self) -> torch.Tensor:
        """The best of planes in front of the camera, a pixel of parallax apart."""
        span = self.high - self.low
        count = min(self.sweep.most_planes, max(8, round(span / self.step)))
        depths = torch.linspace(self.low, self.high, count, device=self.gray.device)
        flat = torch.ones_like(self.gray)
        return self.best_of(None, (flat * depth for depth in depths))

    def best_of(self, now: torch.Tensor | None, others: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of maps the best at each pixel; ``now`` stays where no other is clearly better."""
        others = iter(others)
        first = next(others) if now is None else now
        best, lowest = first, self.cost(first) - (0 if now is None else _KEEP)
        for candidate in others:
            cost = self.cost(candidate)
            better = cost < lowest
            best, lowest = torch.where(better, candidate, best), torch.where(better, cost, lowest)
        return best

    def propagate(self, inverse: torch.Tensor, distance: int) -> torch.Tensor:
        """Try the planes of neighbours to all four sides."""
        right, down = slopes(inverse)

        def carried(dx: int, dy: int) -> torch.Tensor:
            plane = inverse - right * dx - down * dy  # of the neighbour at (dx, dy), read here
            moved = F.pad(plane[None, None], (distance,) * 4, mode="replicate")[0, 0]
            height, width = self.shape
            y, x = distance + dy, distance + dx
            return self._bounded(moved[y : y + height, x : x + width])

        d = distance
        return self.best_of(inverse, (carried(*m) for m in ((d, 0), (-d, 0), (0, d), (0, -d))))

    def refine(self, inverse: torch.Tensor, step_px: float) -> torch.Tensor:
        """Try steps nearer and farther; the lowest point of a parabola through the best."""
        step = self.step * step_px
        costs = torch.stack([self.cost(inverse + k * step) for k in range(-2, 3)])
        costs[2] -= _KEEP
        best = costs.argmin(0).clamp(1, 3)
        before, at, after = (costs.gather(0, (best + k)[None])[0] for k in (-1, 0, 1))
        bend = (2 * (before + after - 2 * at)).clamp_min(1e-6)
        offset = ((before - after) / bend).clamp(-0.5, 0.5)
        return self._bounded(inverse + step * (best - 2 + offset))

    def _bounded(self, inverse: torch.Tensor) -> torch.Tensor:
        return inverse.clamp(self.low / _FAR, self.high * _FAR)


def _box(values: torch.Tensor, radius: int) -> torch.Tensor:
    """Mean over a window; sums of shifted copies, which on processors beat pooling five times."""
    side = 2 * radius + 1
    height, width = values.shape[-2:]
    lead = values.reshape(-1, 1, height, width)
    shape = (*values.shape[:-2], height + side - 1, width + side - 1)
    padded = F.pad(lead, (radius,) * 4, mode="replicate").view(shape)
    rows = padded[..., :height, :].clone()
    for k in range(1, side):
        rows += padded[..., k : k + height, :]
    total = rows[..., :width].clone()
    for k in range(1, side):
        total += rows[..., k : k + width]
    return total / side**2
