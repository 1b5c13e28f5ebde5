"""Our networks against kornia's: the same weights must give the same numbers."""

from __future__ import annotations

from typing import Any

import kornia.feature
import numpy as np
import pytest
import torch

from gim_hloc import matchers, weights
from gim_hloc.matchers.lightglue import _lightglue_key
from gim_hloc.networks.aliked import ALIKED, corners, weighted_rows
from gim_hloc.networks.disk import DISK
from gim_hloc.networks.keypoints import refine, select_maxima
from gim_hloc.networks.lightglue import LightGlue, Start

needs_weights = pytest.mark.weights


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photo(width: int = 300, height: int = 230, left: int = 40) -> torch.Tensor:
    """A part of a photograph whose sides are no multiples of 32: (3, height, width)."""
    data = pytest.importorskip("skimage.data")
    image = data.astronaut()[:height, left : left + width].astype(np.float32) / 255
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------- ALIKED


@pytest.fixture(scope="module")
def aliked() -> tuple[Any, ALIKED]:
    path = weights.locate("aliked-n16.pth", download=False)
    reference = kornia.feature.ALIKED("aliked-n16", max_num_keypoints=400).eval()
    state = weights.load_state_dict(path)
    weights.load_into(reference, state, path=path, optional=["dkd.hw_grid"])
    copy = kornia.feature.ALIKED("aliked-n16")
    weights.load_into(copy, state, path=path, optional=["dkd.hw_grid"])
    return reference, ALIKED.from_kornia(copy)


@needs_weights
@pytest.mark.parametrize("size", [(300, 230), (256, 192), (41, 97)])
def test_aliked_is_kornias(aliked: tuple[Any, ALIKED], size: tuple[int, int]) -> None:
    reference, ours = aliked
    image = photo(*size)
    with torch.inference_mode():
        expected = reference(image[None])[0]
    xy, descriptors, scores = ours.detect_and_describe(
        image, max_keypoints=400, threshold=0.2, subpixel="soft_argmax"
    )
    distance = torch.cdist(expected.keypoints, xy, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, row = distance.min(1)
    assert len(xy) == len(expected.keypoints) > 0
    assert nearest.max() < 1e-3
    assert (descriptors[row] - expected.descriptors).abs().max() < 1e-4
    assert (scores.diff() <= 0).all()


@needs_weights
def test_deformable_convolution_is_kornias(aliked: tuple[Any, ALIKED]) -> None:
    """Offsets that reach far outside, where zeros are read."""
    reference, ours = aliked
    generator = torch.Generator().manual_seed(0)
    x = 30 * torch.randn(1, 32, 9, 14, generator=generator)
    with torch.inference_mode():
        block = reference.block3
        expected = block.bn1(block.conv1(x))
        found = ours.blocks[1][0](x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------- DISK


@needs_weights
@pytest.mark.parametrize("size", [(160, 112), (150, 101)])
def test_disk_is_kornias(size: tuple[int, int]) -> None:
    path = weights.locate("disk-depth-save.pth", download=False)
    ours = DISK().eval()
    weights.load_into(ours, weights.load_state_dict(path, inside=["extractor"]), path=path)
    image = photo(*size, left=120)
    with torch.inference_mode():
        expected = ours(image[None], n=150, pad_if_not_divisible=True)[0]
    xy, descriptors, scores = ours.detect_and_describe(
        image, max_keypoints=150, threshold=0.0, subpixel="none"
    )
    order = torch.argsort(xy[:, 1] * 1000 + xy[:, 0])
    assert len(xy) == 150
    assert torch.equal(xy[order], expected.keypoints)
    assert torch.allclose(descriptors[order], expected.descriptors, atol=1e-4)
    assert torch.allclose(scores[order], expected.detection_scores, atol=1e-3)


# ---------------------------------------------------------------- LightGlue


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    path = weights.locate("aliked_lightglue.pth", download=False)
    return {_lightglue_key(k): v for k, v in weights.load_state_dict(path).items()}


@pytest.fixture(scope="module")
def encodings() -> list[Any]:
    """Overlapping parts of a photograph with different numbers of keypoints."""
    matcher = matchers.load(
        "aliked_lightglue", device="cpu", detection_threshold=0.1, max_keypoints=260
    )
    parts = [(300, 230, 40), (260, 230, 90), (140, 150, 120), (300, 200, 150)]
    codes = []
    for width, height, left in parts:
        image = photo(width, height, left)
        codes.append(
            matcher.encode(
                matchers.ImageData(
                    image=image, name="", size=(width, height), to_original=np.eye(2, 3)
                )
            )
        )
    return codes


def lightglue(state: dict[str, torch.Tensor], **options: Any) -> LightGlue:
    network = LightGlue(**options)
    weights.load_into(network, state, path="x")
    return network.fold()


def start_of(network: LightGlue, code: Any) -> Start:
    return network.start(code.network_keypoints, code.network_size, code.descriptors.float())


def kornia_input(code: Any) -> dict[str, torch.Tensor]:
    return {
        "keypoints": code.network_keypoints[None],
        "descriptors": code.descriptors[None].float(),
        "image_size": torch.tensor([code.network_size]).float(),
    }


CONFIDENCES = [(0.95, 0.99), (-1, -1), (0.95, -1), (-1, 0.99), (0.8, 0.9)]


@needs_weights
@pytest.mark.parametrize(("depth", "width"), CONFIDENCES)
def test_lightglue_is_kornias(state, encodings, depth: float, width: float) -> None:
    """The same matches and confidences with and without early stopping and pruning."""
    options = {"depth_confidence": depth, "width_confidence": width}
    reference = kornia.feature.LightGlue(features=None, input_dim=128, **options).eval()
    reference.load_state_dict(state, strict=False)
    ours = lightglue(state, **options)
    with torch.inference_mode():
        for a, b in [(0, 1), (2, 0)]:
            codes = encodings[a], encodings[b]
            expected = reference(
                {"image0": kornia_input(codes[0]), "image1": kornia_input(codes[1])}
            )
            ((index, confidence),) = ours.match([[start_of(ours, code) for code in codes]])
            assert len(index) > 20
            assert torch.equal(index, expected["matches"][0])
            assert torch.allclose(confidence, expected["scores"][0], atol=1e-3)


@needs_weights
@pytest.mark.parametrize(
    ("depth", "width", "pruning_min"),
    [(0.95, 0.99, -1), (-1, -1, -1), (-1, 0.99, 150), (0.8, 0.9, -1)],
)
def test_padded_batch_is_one_by_one(
    state, encodings, depth: float, width: float, pruning_min: int
) -> None:
    """Unequal numbers of keypoints; pairs stop at different layers and leave the batch."""
    network = lightglue(
        state, depth_confidence=depth, width_confidence=width, pruning_min=pruning_min
    )
    assert len({len(code) for code in encodings}) == len(encodings)
    with torch.inference_mode():
        starts = [start_of(network, code) for code in encodings]
        one = Start(*(part[:1] for part in starts[2]))
        pairs = [(starts[a], starts[b]) for a, b in [(0, 1), (2, 0), (3, 3)]]
        pairs.append((one, starts[0]))
        agree = total = 0
        for pair, (index, confidence) in zip(pairs, network.match(pairs), strict=True):
            ((expected, _),) = network.match([pair])
            assert len(index) == len(confidence)
            a, b = ({tuple(row) for row in rows.tolist()} for rows in (index, expected))
            agree += len(a & b)
            total += len(a | b)
    assert total > 100
    assert agree >= 0.995 * total


@needs_weights
def test_lightglue_in_half_precision(state, encodings) -> None:
    """Autocast, which CUDA uses by default, leaves nearly all matches as they are."""
    network = lightglue(state)
    codes = encodings[2], encodings[0]
    with torch.inference_mode():
        ((exact, _),) = network.match([[start_of(network, code) for code in codes]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            starts = [start_of(network, code) for code in codes]
            ((rough, _),) = network.match([starts])
            batched, _ = network.match([starts, starts])[1]
    a, b, c = ({tuple(row) for row in rows.tolist()} for rows in (exact, rough, batched))
    assert len(a & b) > 0.9 * len(a)
    assert len(a & c) > 0.9 * len(a)


@needs_weights
def test_names_and_shapes_are_kornias() -> None:
    reference = kornia.feature.LightGlue(features=None, input_dim=128).state_dict()
    reference.pop("confidence_thresholds")
    ours = LightGlue().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}


# ---------------------------------------------------------------- keypoints


def bump_map(centres: list[tuple[float, float]], size: tuple[int, int] = (60, 50)) -> torch.Tensor:
    """Logits with smooth bumps at x, y, the first the highest."""
    y, x = torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="ij")
    bumps = [
        (8 - i) * torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 2.0**2))
        for i, (cx, cy) in enumerate(centres)
    ]
    return torch.stack(bumps).sum(0) - 4


def test_maxima_are_found_in_order_and_refined() -> None:
    centres = torch.tensor([(20.0, 10.0), (40.3, 30.2), (9.8, 35.4)])
    scores = bump_map(centres.tolist())
    index = select_maxima(scores, max_keypoints=10, threshold=0.0, radius=2)
    assert index.tolist() == [10 * 60 + 20, 30 * 60 + 40, 35 * 60 + 10]
    assert len(select_maxima(scores, max_keypoints=2, threshold=0.0, radius=2)) == 2
    error = {
        method: (refine(scores, index, radius=2, method=method) - centres).abs().max()
        for method in ("quadratic", "soft_argmax", "none")
    }
    assert error["quadratic"] < 0.03
    assert error["soft_argmax"] < 0.2
    assert error["none"] == pytest.approx(0.4, abs=1e-5)
    near = refine(scores, index, radius=1)
    assert (near - centres).abs().max() < 0.03


def test_refinement_stays_at_the_maximum() -> None:
    """A ridge has no top along its length; the keypoint must not run away."""
    scores = -((torch.arange(20.0)[:, None] - 9.6) ** 2).expand(20, 30).clone()
    scores[10, 15] += 1e-3
    xy = refine(scores, torch.tensor([10 * 30 + 15]), radius=2)
    assert (xy - torch.tensor([[15.0, 10.0]])).abs().max() <= 1


def test_plateaus_borders_and_masks_are_no_keypoints() -> None:
    scores = torch.zeros(20, 30)
    scores[5, 5] = scores[5, 6] = 1.0  # plateau
    scores[1, 10] = scores[18, 10] = scores[10, 1] = scores[10, 28] = 1.0  # border
    scores[10, 15] = 0.9
    scores[10, 17] = 0.8  # suppressed by the stronger neighbour
    index = select_maxima(scores, max_keypoints=10, threshold=0.5, radius=2)
    assert index.tolist() == [10 * 30 + 15]
    mask = torch.ones(20, 30, dtype=torch.bool)
    mask[10, 15] = False
    # masking a maximum must not promote its suppressed neighbour
    assert len(select_maxima(scores, max_keypoints=9, threshold=0.5, radius=2, mask=mask)) == 0


def test_sampling_is_grid_sample() -> None:
    """Positions inside, on the border and outside."""
    generator = torch.Generator().manual_seed(1)
    height, width = 7, 11
    grid = torch.randn(1, 5, height, width, generator=generator)
    xy = torch.rand(200, 2, generator=generator) * torch.tensor([15.0, 11.0]) - 2
    normal = 2 * xy / torch.tensor([width - 1.0, height - 1.0]) - 1
    expected = torch.nn.functional.grid_sample(grid, normal[None, None], align_corners=True)
    index, weight = corners(xy[:, 0], xy[:, 1], height, width)
    table = grid[0].permute(1, 2, 0).reshape(-1, 5)
    assert torch.allclose(weighted_rows(table, index, weight), expected[0, :, 0].T, atol=1e-5)
