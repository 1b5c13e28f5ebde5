"""Losses of LoFTR and LightGlue: values by hand, slow transcriptions, and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from gim_hloc.geometry.epipolar import mean_distances
from gim_hloc.networks.loftr import similarities
from gim_hloc.training.losses.lightglue import (
    IGNORED,
    UNMATCHED,
    assignment_loss,
    certainty_loss,
    label_loss,
    log_assignment,
    true_partners,
)
from gim_hloc.training.losses.loftr import fine_loss, focal_loss, log_confidence


def random(*size: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_(grad)


# ------------------------------------------------------------------------------------------- LoFTR


def test_confidences_are_those_of_the_whole_matrix() -> None:
    x0, x1 = random(7, 8), random(9, 8, seed=1)
    index0, index1 = torch.tensor([0, 3, 6]), torch.tensor([8, 3, 0])
    whole = similarities(x0[None], x1[None])[0]
    expected = (whole.softmax(0) * whole.softmax(1))[index0, index1]
    found = log_confidence(x0, x1, index0, index1).exp()
    assert torch.allclose(found, expected, rtol=1e-12)


def test_masked_cells_are_as_if_they_were_not_there() -> None:
    x0, x1 = random(7, 8), random(9, 8, seed=1)
    keep0 = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
    keep1 = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0, 1]).bool()
    found = log_confidence(
        x0, x1, torch.tensor([3, 6]), torch.tensor([2, 8]), mask0=keep0, mask1=keep1
    )
    alone = log_confidence(x0[keep0], x1[keep1], torch.tensor([2, 4]), torch.tensor([1, 5]))
    assert torch.allclose(found, alone, rtol=1e-12)


def test_focal_loss_by_hand() -> None:
    log = torch.tensor([0.5, 0.1, 1e-9, 1.0], dtype=torch.float64).log()
    each = [
        0.25 * 0.25 * math.log(2),
        0.25 * 0.81 * math.log(10),
        0.25 * (1 - 1e-6) ** 2 * math.log(1e6),
        0.25 * 1e-12 * -math.log(1 - 1e-6),
    ]
    assert float(focal_loss(log)) == pytest.approx(sum(each) / 4, rel=1e-9)
    assert float(focal_loss(log[:0])) == 0


def test_coarse_gradients() -> None:
    x0, x1 = random(5, 8, grad=True), random(6, 8, seed=1, grad=True)
    index0, index1 = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 5])
    mask1 = torch.tensor([1, 1, 1, 0, 1, 1]).bool()

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return focal_loss(log_confidence(a, b, index0, index1, mask1=mask1, temperature=1.0))

    assert gradcheck(loss, (x0, x1))


def test_fine_loss_by_hand() -> None:
    """Weights are 1 / 0.5 and 1 / 0.25 over their mean of all three windows, (2 + 4 + 1) / 3."""
    rows = [[0.1, 0.2, 0.5], [0.0, -0.4, 0.25], [0.3, 0.3, 1.0]]
    expectation = torch.tensor(rows, dtype=torch.float64)
    # The last is outside its window.
    target = torch.tensor([[0.3, 0.2], [0.5, -0.4], [1.5, 0.0]], dtype=torch.float64)
    valid = torch.ones(3, dtype=torch.bool)
    mean = 7 / 3
    expected = (2 / mean * 0.2**2 + 4 / mean * 0.5**2) / 2
    assert float(fine_loss(expectation, target, valid)) == pytest.approx(expected, rel=1e-9)
    valid[1] = False
    assert float(fine_loss(expectation, target, valid)) == pytest.approx(2 / mean * 0.04, rel=1e-9)
    assert float(fine_loss(expectation, target, valid & False)) == 0
    assert float(fine_loss(expectation[:0], target[:0], valid[:0])) == 0


def test_fine_gradients_flow_into_the_means_only() -> None:
    mean, target = random(4, 2, grad=True), 0.3 * random(4, 2, seed=1)
    deviation = random(4, 1, seed=2).abs().add(0.1).requires_grad_()
    valid = torch.tensor([1, 1, 0, 1]).bool()

    def loss(means: torch.Tensor) -> torch.Tensor:
        return fine_loss(torch.cat([means, deviation.detach()], 1), target, valid)

    assert gradcheck(loss, (mean,))
    fine_loss(torch.cat([mean, deviation], 1), target, valid).backward()
    assert mean.grad is not None
    assert mean.grad[2].eq(0).all()
    assert mean.grad[0].ne(0).all()
    assert deviation.grad is None or deviation.grad.eq(0).all()


# --------------------------------------------------------------------------------------- LightGlue


def everything(*size: int) -> torch.Tensor:
    return torch.ones(*size, dtype=torch.bool)


def test_assignment_is_kornias() -> None:
    kornia = pytest.importorskip("kornia.feature.lightglue")
    s, z0, z1 = random(2, 5, 7), random(2, 5, seed=1), random(2, 7, seed=2)
    expected = kornia.sigmoid_log_double_softmax(s, z0[..., None], z1[..., None])
    found = log_assignment(s, z0, z1, everything(2, 5), everything(2, 7))
    assert torch.allclose(found, expected, atol=1e-12)


def test_padding_changes_no_assignment() -> None:
    s, z0, z1 = random(1, 5, 7), random(1, 5, seed=1), random(1, 7, seed=2)
    alone = log_assignment(s[:, :3, :4], z0[:, :3], z1[:, :4], everything(1, 3), everything(1, 4))
    valid0, valid1 = everything(1, 5), everything(1, 7)
    valid0[:, 3:], valid1[:, 4:] = False, False
    padded = log_assignment(s, z0, z1, valid0, valid1)
    assert torch.allclose(padded[:, :3, :4], alone[:, :3, :4], atol=1e-12)
    assert torch.allclose(padded[:, :3, -1], alone[:, :3, -1], atol=1e-12)
    assert torch.allclose(padded[:, -1, :4], alone[:, -1, :4], atol=1e-12)
    assert (padded[:, 3:5] == -1e9).all()
    nothing = log_assignment(s, z0, z1, valid0 & False, valid1 & False)
    assert bool(torch.isfinite(nothing).all())


def test_assignment_loss_by_hand() -> None:
    """Two keypoints against three: (0, 2) match, 1 has no partner, nor have 0 and 1 of image 1."""
    p = torch.tensor(
        [[[0.1, 0.1, 0.5, 0.2], [0.1, 0.2, 0.1, 0.4], [0.3, 0.7, 0.2, 1.0]]], dtype=torch.float64
    )
    partner0 = torch.tensor([[2, UNMATCHED]])
    partner1 = torch.tensor([[UNMATCHED, UNMATCHED, 0]])
    unmatched = -(math.log(0.4) + math.log(0.3) + math.log(0.7)) / 3
    expected = 0.5 * math.log(2) + 0.5 * unmatched
    assert float(assignment_loss(p.log(), partner0, partner1)) == pytest.approx(expected)
    ignored = torch.full_like(partner1, IGNORED)
    ignored[0, 2] = 0
    expected = 0.5 * math.log(2) - 0.5 * math.log(0.4)
    assert float(assignment_loss(p.log(), partner0, ignored)) == pytest.approx(expected)
    nothing = torch.full_like(partner0, IGNORED)
    assert float(assignment_loss(p.log(), nothing, torch.full_like(partner1, IGNORED))) == 0


def test_label_loss_by_hand() -> None:
    p = torch.rand(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = label_loss(p.log(), torch.tensor([2, 0]))
    expected = -(math.log(float(p[0, 0, 0])) + math.log(float(p[0, 1, 1]))) / 2
    assert found.tolist() == pytest.approx([expected, 0.0])


def test_certainty_loss_by_hand() -> None:
    """Row 0 agrees with the end, row 1 does not; column 0 does, column 1 does not, 2 is padding."""
    now = torch.tensor([[[9.0, 1, 0, 0], [0, 1, 0, 9], [0, 9, 0, 0]]])
    final = torch.tensor([[[9.0, 0, 0, 1], [0, 9, 0, 1], [0, 0, 0, 0]]])
    logits0, logits1 = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0, 7.0]])
    valid1 = torch.tensor([[True, True, False]])
    found = certainty_loss(logits0, logits1, now, final, everything(1, 2), valid1)

    def entropy(logit: float, right: bool) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -math.log(p if right else 1 - p)

    first = (entropy(2, True) + entropy(-1, False)) / 2
    second = (entropy(0.5, True) + entropy(3, False)) / 2
    assert float(found) == pytest.approx((first + second) / 2, rel=1e-6)


def glue_loss(
    s: torch.Tensor, z0: torch.Tensor, z1: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor
) -> torch.Tensor:
    """All losses of two layers of two pairs of which the second has padding."""
    valid0, valid1 = everything(2, 3), everything(2, 4)
    valid0[1, 2], valid1[1, 3] = False, False
    partner0 = torch.tensor([[1, UNMATCHED, IGNORED], [0, 1, IGNORED]])
    partner1 = torch.tensor([[UNMATCHED, 0, IGNORED, UNMATCHED], [0, 1, UNMATCHED, IGNORED]])
    final = log_assignment(s, z0, z1, valid0, valid1)
    now = log_assignment(s.flip(2).detach(), z0.detach(), z1.detach(), valid0, valid1)
    return (
        assignment_loss(final, partner0, partner1)
        + label_loss(final, torch.tensor([2, 1]))
        + certainty_loss(c0, c1, now, final, valid0, valid1)
    )


def glue_inputs(grad: bool = False) -> tuple[torch.Tensor, ...]:
    sizes = [(2, 3, 4), (2, 3), (2, 4), (2, 3), (2, 4)]
    return tuple(random(*size, seed=k, grad=grad) for k, size in enumerate(sizes))


def test_glue_gradients() -> None:
    assert gradcheck(lambda *x: glue_loss(*x).mean(), glue_inputs(grad=True))


def test_a_batch_is_the_mean_of_its_pairs() -> None:
    """Gradients too: pairs share no sum."""
    inputs = glue_inputs(grad=True)
    each = glue_loss(*inputs)
    gradients = torch.autograd.grad(each[0], inputs, retain_graph=True)
    assert all(bool(g[0].ne(0).any()) and bool(g[1].eq(0).all()) for g in gradients)


# ---------------------------------------------------------------------------- truth of keypoints


def slow_partners(
    d0: torch.Tensor, d1: torch.Tensor, epipolar: torch.Tensor, case: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """The rules of ``true_partners`` one keypoint at a time."""
    m, n = d0.shape
    both = [
        [
            max(float(d0[i, j]), float(d1[i, j]))
            if case["visible0"][i] and case["visible1"][j]
            else math.inf
            for j in range(n)
        ]
        for i in range(m)
    ]
    a, b = [IGNORED] * m, [IGNORED] * n
    for i in range(m):
        j = min(range(n), key=lambda k: both[i][k])
        if both[i][j] < 3 and i == min(range(m), key=lambda k: both[k][j]):
            a[i], b[j] = j, i
    for i in range(m):
        if case["known0"][i] and float(d0[i].min()) > 5:
            a[i] = UNMATCHED
    for j in range(n):
        if case["known1"][j] and float(d1[:, j].min()) > 5:
            b[j] = UNMATCHED
    left = [i for i in range(m) if a[i] == IGNORED], [j for j in range(n) if b[j] == IGNORED]
    for i in left[0]:
        if not case["known0"][i] and all(float(epipolar[i, j]) > 5 for j in left[1]):
            a[i] = UNMATCHED
    for j in left[1]:
        if not case["known1"][j] and all(float(epipolar[i, j]) > 5 for i in left[0]):
            b[j] = UNMATCHED
    return a, b


@pytest.mark.parametrize("seed", range(5))
def test_partners_against_a_slow_transcription(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def uniform(count: int) -> torch.Tensor:
        return torch.rand(count, 2, generator=generator) * 100

    xy0, xy1 = uniform(60), uniform(70)
    there0, there1 = uniform(60), uniform(70)
    for k in range(25):  # true partners, some of them just so
        there0[k] = xy1[k] + torch.randn(2, generator=generator) * 1.8
        there1[k] = xy0[k] + torch.randn(2, generator=generator) * 1.8
    case = {
        "known0": torch.rand(60, generator=generator) < 0.7,
        "known1": torch.rand(70, generator=generator) < 0.7,
    }
    case["visible0"] = case["known0"] & (torch.rand(60, generator=generator) < 0.9)
    case["visible1"] = case["known1"] & (torch.rand(70, generator=generator) < 0.9)
    fundamental = torch.randn(3, 3, generator=generator)
    found = true_partners(xy0, xy1, there0, there1, fundamental=fundamental, **case)
    expected = slow_partners(
        torch.cdist(there0.double(), xy1.double()),
        torch.cdist(xy0.double(), there1.double()),
        mean_distances(fundamental, xy0, xy1),
        case,
    )
    assert [t.tolist() for t in found] == list(expected)
    for side in found:
        assert {IGNORED, UNMATCHED} < set(side.tolist())
        assert int((side >= 0).sum()) > 3


def test_epipolar_distance_by_hand() -> None:
    """A step along x: lines are rows, and the distance is the difference of y in either image."""
    fundamental = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    xy0, xy1 = torch.tensor([[3.0, 4.0], [0, 10]]), torch.tensor([[90.0, 6.0], [5, 4], [1, 1]])
    expected = torch.tensor([[2.0, 0, 3], [4, 6, 9]])
    assert torch.allclose(mean_distances(fundamental, xy0, xy1), expected)
    # One of two lines twice as far: the mean of both distances.
    tilted = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ torch.diag(
        torch.tensor([1.0, 2, 1])
    )
    found = mean_distances(tilted, torch.tensor([[0.0, 1]]), torch.tensor([[0.0, 6]]))
    assert float(found) == pytest.approx((4 + 2) / 2)


def test_nothing_to_match_with() -> None:
    none, some = torch.zeros(0, 2), torch.rand(3, 2)
    flags = {
        "visible0": everything(0), "visible1": everything(3),
        "known0": everything(0), "known1": ~everything(3),
    }  # fmt: skip
    found = true_partners(none, some, none, some, fundamental=torch.eye(3), **flags)
    assert found[0].tolist() == []
    assert found[1].tolist() == [UNMATCHED] * 3
