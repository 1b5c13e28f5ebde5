"""SuperPoint's parts against plain definitions; batches against single images."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import filled

from gim_hloc.networks import superpoint
from gim_hloc.networks.superpoint import SuperPoint


@functools.lru_cache(maxsize=1)
def network() -> SuperPoint:
    model = SuperPoint()
    keys = {
        f"superpoint.{key}": [list(value.shape), "float32"]
        for key, value in model.state_dict().items()
    }
    state = filled.fill_state_dict("gim_lightglue", keys)
    model.load_state_dict({key.removeprefix("superpoint."): v for key, v in state.items()})
    return model.eval().requires_grad_(False)


def texture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.random((1, 1, height // 4 + 2, width // 4 + 2), np.float32))
    large = F.interpolate(noise, scale_factor=4, mode="bicubic", align_corners=False)
    return large[..., :height, :width].clamp(0, 1).contiguous()


@pytest.mark.parametrize("radius", [1, 3, 4])
def test_suppression_is_the_published_one(radius: int) -> None:
    scores = torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(0)).square()
    scores[:, :9] = 0.0  # a plateau

    def pool(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x[:, None], 2 * radius + 1, 1, radius)[:, 0]

    best = scores == pool(scores)
    for _ in range(2):
        near = pool(best.float()) > 0
        rest = torch.where(near, torch.zeros(()), scores)
        best = best | ((rest == pool(rest)) & ~near)
    expected = torch.where(best, scores, torch.zeros(()))
    assert torch.equal(superpoint.suppress(scores, radius), expected)
    assert (expected > 0).sum() > 20


def test_a_cell_is_read_row_by_row() -> None:
    logits = torch.full((1, 65, 3, 4), -20.0)
    logits[:, 64] = 0.0
    logits[0, 8 * 5 + 2, 1, 3] = 20.0  # row 5, column 2 of the cell in row 1, column 3
    scores = superpoint.score_map(logits)
    assert scores.shape == (1, 24, 32)
    assert scores.argmax() == (8 + 5) * 32 + (24 + 2)


def test_keypoints_are_whole_pixels_and_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the corner-based positions with a half added that the reference returns."""
    logits = torch.full((1, 65, 6, 8), -9.0)
    logits[:, 64] = 0.0
    wanted = {(17.0, 13.0): 5.0, (40.0, 30.0): 7.0}
    for (x, y), value in wanted.items():
        logits[0, int(y % 8 * 8 + x % 8), int(y // 8), int(x // 8)] = value
    raw = torch.rand(1, 256, 6, 8)
    model = SuperPoint()
    monkeypatch.setattr(model, "forward", lambda image, sizes=None: (logits, raw))
    (points,) = model.detect(torch.zeros(1, 1, 48, 64), max_keypoints=2)
    assert points.xy.tolist() == [[40.0, 30.0], [17.0, 13.0]]
    assert points.scores[0] > points.scores[1]
    assert torch.allclose(points.descriptors.norm(dim=1), torch.ones(2))


def test_descriptors_are_read_by_the_legacy_rule() -> None:
    dense = F.normalize(torch.rand(1, 256, 5, 7), dim=1)
    xy = torch.tensor([[[3.5, 3.5], [20.0, 11.0]]])
    got = superpoint.sample_descriptors(dense, xy)[0]
    assert torch.allclose(got[0], dense[0, :, 0, 0], atol=1e-6)
    column, row = (20 - 3.5) / (7 * 8 - 4.5) * 6, (11 - 3.5) / (5 * 8 - 4.5) * 4
    x, y = int(column), int(row)
    u, v = column - x, row - y
    patch = dense[0, :, y : y + 2, x : x + 2]
    mean = (patch @ torch.tensor([1 - u, u])) @ torch.tensor([1 - v, v])
    assert torch.allclose(got[1], F.normalize(mean, dim=0), atol=1e-5)


def test_border_and_threshold() -> None:
    image = texture(120, 136)
    (points,) = network().detect(image, max_keypoints=5000)
    assert len(points.xy) > 100
    assert points.xy.amin() >= 4
    assert points.xy[:, 0].max() < 136 - 4
    assert points.xy[:, 1].max() < 120 - 4
    assert (points.scores.diff() <= 0).all()
    cut = float(points.scores[50])
    (fewer,) = network().detect(image, max_keypoints=5000, threshold=cut)
    assert len(fewer.xy) == 50
    assert torch.equal(fewer.xy, points.xy[:50])


def test_images_of_all_sizes_share_a_batch() -> None:
    """Each gets what it gets alone, to float noise, whatever the padding holds."""
    sizes = [(136, 120), (97, 141), (64, 64)]
    images = [texture(height, width, seed) for seed, (width, height) in enumerate(sizes)]
    batch = torch.full((3, 1, 150, 140), 0.7)
    for row, image in enumerate(images):
        batch[row, :, : image.shape[2], : image.shape[3]] = image[0]
    together = network().detect(batch, max_keypoints=400, sizes=torch.tensor(sizes))
    for image, points in zip(images, together, strict=True):
        (alone,) = network().detect(image, max_keypoints=400)
        assert len(points.xy) == len(alone.xy)
        order = {tuple(xy): row for row, xy in enumerate(points.xy.tolist())}
        assert set(order) == {tuple(xy) for xy in alone.xy.tolist()}
        rows = [order[tuple(xy)] for xy in alone.xy.tolist()]
        assert torch.allclose(points.scores[rows], alone.scores, atol=1e-5)
        assert torch.allclose(points.descriptors[rows], alone.descriptors, atol=1e-4)


def test_a_batch_of_equal_sizes_needs_no_sizes() -> None:
    images = torch.cat([texture(64, 80, seed) for seed in range(3)])
    together = network().detect(images, max_keypoints=100)
    for image, points in zip(images, together, strict=True):
        (alone,) = network().detect(image[None], max_keypoints=100)
        assert torch.equal(points.xy, alone.xy)


def test_a_mask_takes_points_away_and_makes_none() -> None:
    image = texture(96, 128)
    mask = torch.ones(1, 96, 128, dtype=torch.bool)
    mask[:, 20:70, 30:90] = False
    (everything,) = network().detect(image, max_keypoints=5000)
    (masked,) = network().detect(image, max_keypoints=5000, mask=mask)
    x, y = everything.xy.long().unbind(1)
    assert torch.equal(masked.xy, everything.xy[mask[0, y, x]])
    assert len(masked.xy) < len(everything.xy)


def test_small_and_empty_images() -> None:
    for height, width in ((7, 40), (8, 8), (16, 9)):
        xy, descriptors, scores = network().detect_and_describe(
            torch.zeros(1, height, width), max_keypoints=10, threshold=0.0, radius=3
        )
        assert xy.shape == (len(scores), 2)
        assert descriptors.shape == (len(scores), 256)


def test_random_padding_lies_between_the_points() -> None:
    xy = torch.tensor([[10.0, 20.0], [30.0, 25.0]])
    padded = superpoint.pad_with_random(xy, 50, (64, 48), torch.Generator().manual_seed(0))
    assert padded.shape == (50, 2)
    assert torch.equal(padded[:2], xy)
    assert (padded >= xy.amin(0)).all()
    assert (padded <= xy.amax(0)).all()
    assert torch.equal(superpoint.pad_with_random(xy, 2, (64, 48)), xy)
    assert superpoint.pad_with_random(xy[:0], 5, (64, 48)).amax() <= 48
