"""Drawing matches from a dense warp: certain ones, spread evenly."""

from __future__ import annotations

import torch

_ROWS = {"cpu": 256, "cuda": 4096}  # of the N x N matrix that exist at a time
_MOST_CATEGORIES = 1 << 24  # that ``torch.multinomial`` takes; a warp of 2048 x 4096 has as many


def kernel_density(points: torch.Tensor, std: float = 0.1) -> torch.Tensor:
    """Sum over all points of exp(-d^2 / (2 std^2)), the point itself included.

    Args:
        points: (N, D).
        std: width of the kernel in the unit of the points.

    Returns:
        (N,) float32.
    """
    # exp(x.y / s^2 - |x|^2 / 2 s^2 - |y|^2 / 2 s^2): one product and one pass over it.
    points = points.float() / std
    half = points.square().sum(1) / 2
    density = points.new_empty(len(points))
    step = _ROWS.get(points.device.type, _ROWS["cuda"])
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        exponent = torch.addmm(-half, points[rows], points.T).sub_(half[rows, None])
        # exp(-60) adds nothing; without the bound most results are denormal, ten times slower.
        density[rows] = exponent.clamp_(-60, 0).exp_().sum(dim=1)
    return density


def balance_weights(density: torch.Tensor) -> torch.Tensor:
    """Chance of a match to be kept: sparse regions are kept, lonely matches are not."""
    weights = 1 / (density + 1)
    weights[density < 10] = 1e-7
    return weights


def _draw(chance: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """``torch.multinomial`` without replacement, for more than its 2^24 categories as well."""
    if len(chance) <= _MOST_CATEGORIES:
        return torch.multinomial(chance, number, generator=generator)
    # What it does itself: the first to happen of events that happen at these rates.
    times = torch.empty_like(chance).exponential_(generator=generator)
    return torch.div(chance, times.clamp_min_(1e-30)).topk(number).indices


def balanced_sample(
    matches: torch.Tensor,
    certainty: torch.Tensor,
    number: int,
    *,
    threshold: float = 0.05,
    seed: int = 0,
) -> torch.Tensor:
    """Draw matches by certainty, then evenly over both images (``threshold_balanced`` of DKM).

    Args:
        matches: (N, 4) normalised coordinates in both images.
        certainty: (N,); matches of certainty 0 are never drawn.
        number: of matches wanted.
        threshold: certainties above it count as 1.
        seed: of the draw.

    Returns:
        (M,) int64 rows, M <= ``number``.
    """
    generator = torch.Generator(certainty.device).manual_seed(seed)
    chance = torch.where(certainty > threshold, torch.ones_like(certainty), certainty).float()
    possible = int((chance > 0).sum())
    if possible == 0 or number < 1:
        return torch.empty(0, dtype=torch.long, device=certainty.device)
    drawn = _draw(chance, min(4 * number, possible), generator)
    weights = balance_weights(kernel_density(matches[drawn]))
    kept = torch.multinomial(weights, min(number, len(drawn)), generator=generator)
    return drawn[kept]
