"""The DKM matchers: frames, masks, draws, batches, checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import SHARED
from parity.filled import fill_state_dict
from tiny_models import TINY
from torch import nn

from gim_hloc import matchers
from gim_hloc.errors import WeightsError
from gim_hloc.geometry import sampling
from gim_hloc.geometry.warp import Warp, cell_centres
from gim_hloc.images import orientation_affine
from gim_hloc.matchers import ImageData
from gim_hloc.matchers.dense import padding_to_aspect
from gim_hloc.matchers.dkm import DKMMatcher, DKMOptions, load_dkm
from gim_hloc.matchers.registry import operating_point
from gim_hloc.networks.dkm import DKM, DKMConfig, both_factors
from gim_hloc.types import apply_affine

IDENTITY = np.eye(2, 3)
WIDTHS = DKMConfig(**{**TINY["gim_dkm"], "hidden": 1})
SMALL = {"size": (96, 128), "upsample_size": (120, 160), "num_matches": 700}


def assert_close(found: Warp, expected: Warp, atol: float) -> None:
    for name in ("flow0", "flow1", "certainty0", "certainty1"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=atol, rtol=0)


class Shifted(nn.Module):
    """A network that says: the same place, moved by a fraction of the frame's width and height."""

    def __init__(self, shift: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.shift = torch.tensor(shift)

    def encode(self, images, *, size, upsample_size, dtype):
        return {"0/1": torch.zeros(1, 1, *(upsample_size or size))}

    def match(self, a, b, *, shared_factor):
        count, _, height, width = a["0/1"].shape
        there = cell_centres(height, width) + 2 * self.shift
        back = cell_centres(height, width) - 2 * self.shift
        flow = torch.stack([there, back])[:, None].expand(2, count, -1, -1, -1)
        return flow, torch.full((2, count, height, width), 0.75)


def make(network: nn.Module, name: str = "gim_dkm", **options) -> DKMMatcher:
    return DKMMatcher(
        name,
        options=DKMOptions(**{**SMALL, **options}),
        device=torch.device("cpu"),
        network=network,
    )


def picture(width: int, height: int, to_original: np.ndarray = IDENTITY, **fields) -> ImageData:
    generator = torch.Generator().manual_seed(width + height)
    values = {
        "image": 0.1 + 0.9 * torch.rand(3, height, width, generator=generator),
        "name": f"{width}x{height}.jpg",
        "size": (width, height),
        "to_original": to_original,
    }
    return ImageData(**{**values, **fields})


@pytest.fixture(scope="module")
def network() -> DKM:
    """Made-up weights under which numbers stay apart and flow stays inside."""
    with torch.device("meta"):
        layout = DKM(WIDTHS).state_dict()
    keys = {
        f"model.{name}": [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in layout.items()
    }
    return load_dkm(fill_state_dict("gim_dkm", keys), path="made up").eval()


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_identity_maps_stored_pixels_onto_themselves(pad, orientation) -> None:
    # Stored 300 x 200, shown upright by its EXIF turn, and seen by the network at half the size.
    upright = (200, 300) if orientation == 6 else (300, 200)
    turn = orientation_affine(orientation, 300, 200)
    half = np.array([[2.0, 0, 0.5], [0, 2, 0.5]])  # network pixel -> upright pixel
    to_stored = turn @ np.vstack([half, [0, 0, 1]])
    image = picture(upright[0] // 2, upright[1] // 2, to_stored, size=(300, 200))
    matcher = make(Shifted(), pad=pad)
    encoding = matcher.encode(image)
    xy = torch.tensor([[0.5, 0.5], [299.0, 0.0], [31.0, 77.25], [150.0, 100.0], [298.5, 198.5]])
    reading = matcher.warp(encoding, encoding).read(xy)
    inner = (xy > 2).all(1) & (xy[:, 0] < 297) & (xy[:, 1] < 197)
    np.testing.assert_allclose(reading.xy_px[inner], xy[inner], atol=1e-3)
    np.testing.assert_allclose(reading.certainty[inner], 0.75)
    assert (reading.cycle_px[inner] < 1e-3).all()
    # The corner that the network sees first is where EXIF says it is.
    corner = apply_affine(image.to_original, torch.tensor([[-0.25, -0.25]]))
    expected = {1: [0.0, 0.0], 3: [299.0, 199.0], 6: [0.0, 199.0]}[orientation]
    np.testing.assert_allclose(corner[0], expected, atol=1e-6)
    matches = matcher.match(encoding, encoding)
    torch.testing.assert_close(matches.keypoints0, matches.keypoints1, atol=1e-3, rtol=0)
    assert matches.keypoints0.min() >= -0.5
    assert (matches.keypoints0.max(0).values <= torch.tensor([299.5, 199.5])).all()


def test_translation_is_in_pixels_of_the_padded_frame() -> None:
    # 300 x 150 is padded to 300 x 225: a tenth of the frame is 30 px across and 22.5 px down.
    matcher = make(Shifted((0.1, 0.1)))
    a, b = matcher.encode(picture(300, 150)), matcher.encode(picture(300, 150, name="b"))
    warp = matcher.warp(a, b)
    reading = warp.read(torch.tensor([[100.0, 60.0], [200.0, 20.0]]))
    np.testing.assert_allclose(reading.xy_px, [[130.0, 82.5], [230.0, 42.5]], atol=1e-3)
    back = warp.swapped().read(reading.xy_px)
    np.testing.assert_allclose(back.xy_px, [[100.0, 60.0], [200.0, 20.0]], atol=1e-3)
    # Targets right of image b, and below it in the padding, are not seen.
    assert (warp.read(torch.tensor([[285.0, 60.0], [100.0, 140.0]])).certainty == 0).all()


@pytest.mark.parametrize("masked", [0, 1])
def test_nothing_matches_on_masks_nor_onto_them(masked) -> None:
    mask = torch.ones(150, 200, dtype=torch.bool)
    mask[:, 80:] = False
    images = [picture(200, 150, name="a"), picture(200, 150, name="b")]
    images[masked].mask = mask
    matcher = make(Shifted())
    a, b = (matcher.encode(image) for image in images)
    warp = matcher.warp(a, b)
    xy = torch.tensor([[40.0, 75.0], [150.0, 75.0]])
    np.testing.assert_allclose(warp.read(xy).certainty, [0.75, 0])
    np.testing.assert_allclose(warp.swapped().read(xy).certainty, [0.75, 0])
    matches = matcher.match(a, b)
    assert len(matches) > 500
    assert matches.keypoints0[:, 0].max() < 81
    assert matches.keypoints1[:, 0].max() < 81


def test_dark_pixels_match_unless_told_otherwise() -> None:
    image = picture(200, 150)
    image.image[:, :, 100:] = 0.02
    xy = torch.tensor([[40.0, 75.0], [150.0, 75.0]])
    for black_pixels, expected in ((False, [0.75, 0.75]), (True, [0.75, 0.0])):
        matcher = make(Shifted(), black_pixels=black_pixels)
        a, b = matcher.encode(image), matcher.encode(picture(200, 150, name="b"))
        np.testing.assert_allclose(matcher.warp(a, b).read(xy).certainty, expected)


def test_draws_depend_on_names_and_seed_alone() -> None:
    matcher = make(Shifted(), num_matches=300)
    a, b, c = (matcher.encode(picture(200, 150, name=name)) for name in "abc")
    first = matcher.match(a, b).keypoints0
    torch.rand(7)  # the global generator plays no part
    together = matcher.match_batch([(c, a), (a, b)])
    assert torch.equal(together[1].keypoints0, first)
    assert len(first) == 300
    assert not torch.equal(matcher.match(a, c).keypoints0, first)
    other = make(Shifted(), num_matches=300, seed=1)
    assert not torch.equal(other.match(a, b).keypoints0, first)


@pytest.mark.parametrize("upsample_size", [(120, 160), None])
def test_batches_give_what_each_pair_gives(network, upsample_size) -> None:
    matcher = make(network, upsample_size=upsample_size)
    encodings = [matcher.encode(picture(160, height)) for height in (120, 110, 100)]
    pairs = [(encodings[0], encodings[1]), (encodings[2], encodings[0])]
    for pair, together in zip(pairs, matcher.warp_batch(pairs), strict=True):
        alone = matcher.warp(*pair)
        assert_close(together, alone, atol=1e-3)
        assert (alone.flow0.abs() < 1).float().mean() > 0.8
        assert alone.flow0.std() > 0.1
        assert alone.certainty1.std() > 0.1
        assert together.flow0.shape[:2] == matcher.grid_size
        np.testing.assert_array_equal(together.frame1, pair[1].frame)
    assert matcher.warp_batch([]) == []


def test_order_of_images_does_not_matter(network) -> None:
    matcher = make(network)
    a, b = matcher.encode(picture(160, 120)), matcher.encode(picture(160, 100))
    forward, backward = matcher.warp(a, b), matcher.warp(b, a).swapped()
    assert_close(forward, backward, atol=1e-3)


def test_features_are_tensors_of_what_the_pair_needs(network) -> None:
    features = make(network).encode(picture(160, 120)).features
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {
        "0/32": (1, 64, 3, 4),
        "gp/32": (1, 12, 64),
        "0/16": (1, 64, 6, 8),
        "gp/16": (1, 48, 64),
        **{f"0/{s}": (1, c, 96 // s, 128 // s) for s, c in ((8, 128), (4, 64), (2, 16), (1, 3))},
        **{f"1/{s}": (1, c, 120 // s, 160 // s) for s, c in ((8, 128), (4, 64), (2, 16), (1, 3))},
    }
    # Kept for many images: a view of something larger would keep that alive.
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in features.values())


def test_features_may_be_held_in_half_precision(network) -> None:
    warps = []
    for hold in ("auto", "float16"):
        matcher = make(network, hold=hold)
        a, b = matcher.encode(picture(160, 120)), matcher.encode(picture(160, 100))
        warps.append(matcher.warp(a, b))
    assert a.features["1/4"].dtype == torch.float16
    assert a.features["gp/16"].dtype == torch.float32
    difference = (warps[0].flow0 - warps[1].flow0).abs()
    assert difference.max() > 0
    assert difference.median() < 1e-3


def test_half_precision_leaves_the_gaussian_process_exact(network) -> None:
    images = picture(96, 96).image[None]
    held = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            held[dtype] = network.encode(images, size=(64, 64), upsample_size=None, dtype=dtype)
    exact, rough = held[torch.float32], held[torch.bfloat16]
    for name in ("0/32", "gp/32", "0/16", "gp/16"):
        assert rough[name].dtype == torch.float32
    assert rough["0/8"].dtype == torch.bfloat16
    difference = (rough["0/8"].float() - exact["0/8"]).abs()
    assert 0 < difference.max() < 0.1 * exact["0/8"].abs().max()


def test_a_mistake_of_the_reference_is_repeated_on_demand_only() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = (4, 4), (45, 46)
    for size, differs in ((few, False), (many, True)):
        cells = size[0] * size[1]
        a, b = (torch.randn(1, cells, 256, generator=generator) for _ in range(2))
        right, mistaken = both_factors(a, b), both_factors(a, b, shared=True)
        assert torch.equal(right, torch.cat([b, a]))
        assert torch.equal(mistaken, torch.cat([b, b]) if differs else right)


def test_only_the_authors_weights_want_normalised_colours(network) -> None:
    images = picture(160, 120).image[None]
    plain = network.encode(images, size=(64, 96), upsample_size=(120, 160))["1/1"]
    torch.testing.assert_close(plain, images)
    normalised = DKM(WIDTHS, normalise=True)
    normalised.load_state_dict(network.state_dict())
    with torch.inference_mode():
        found = normalised.eval().encode(images, size=(64, 96), upsample_size=(120, 160))["1/1"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found, (images - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_network_can_be_trained(network) -> None:
    model = DKM(WIDTHS)
    model.load_state_dict(network.state_dict())
    model.train()
    images = torch.stack([picture(64, 64).image, picture(64, 64).image.flip(-1)])
    features = model.encode(images, size=(64, 64), upsample_size=None)
    flow, certainty = model.match(features, {k: v.flip(0) for k, v in features.items()})
    (flow.square().mean() + certainty.mean()).backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    # Stride 16 replaces the flow of stride 32, which its own loss trains.
    head = "decoder.embedding_decoder.terminal_module.32"
    assert without == {f"{head}.weight", f"{head}.bias"}


def test_padding_is_the_reference_s() -> None:
    assert padding_to_aspect(640, 480, (672, 896)) == (0, 0, 0, 0)
    assert padding_to_aspect(1280, 720, (672, 896)) == (0, 0, 120, 120)
    assert padding_to_aspect(500, 1000, (672, 896)) == (416, 417, 0, 0)
    left, right, top, bottom = padding_to_aspect(1024, 683, (672, 896))
    assert (left, right, top, bottom) == (0, 0, 42, 43)


def test_base_is_the_reference_s_setting() -> None:
    options = operating_point("gim_dkm")
    assert (options.size, options.upsample_size) == ((672, 896), (1152, 1536))
    assert (options.pad, options.num_matches, options.sample_threshold) == (True, 5000, 0.05)


@pytest.mark.parametrize("name", ["gim_dkm", "dkm_outdoor", "dkm_indoor"])
def test_operating_points_grow(name: str) -> None:
    points = [operating_point(name, quality) for quality in ("fast", "base", "precise")]
    assert points[0].size < points[1].size <= points[2].size
    assert points[0].upsample_size < points[1].upsample_size < points[2].upsample_size


def test_halving_takes_the_second_pass_first() -> None:
    matcher = make(Shifted(), size=(480, 640), upsample_size=(1152, 1536))
    before, seen = matcher.encode_settings(), []
    while matcher.smaller():
        seen.append((matcher.options.size, matcher.options.upsample_size))
    assert seen == [
        ((480, 640), (576, 768)),
        ((480, 640), None),
        ((240, 320), None),
    ]
    assert matcher.encode_settings() != before
    assert matcher.encode(picture(100, 100)).valid.shape == (240, 320)


def test_settings_name_what_decides_the_numbers() -> None:
    settings = json.loads(json.dumps(make(Shifted()).settings()))
    assert settings["encode"]["precision"] == settings["encode"]["hold"] == "float32"
    assert {"size", "upsample_size", "pad", "black_pixels"} <= settings["encode"].keys()
    assert {"num_matches", "seed", "sample_threshold"} <= settings["match"].keys()


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_and_shapes_are_those_of_the_checkpoint(prefix) -> None:
    path = SHARED / "parity" / "gim_dkm.keys.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    published = json.loads(path.read_text())
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    state = {
        prefix + name.removeprefix("model."): torch.zeros((), dtype=dtypes[dtype]).expand(shape)
        for name, (shape, dtype) in published.items()
    }
    state[f"{prefix}encoder.net.fc.weight"] = torch.zeros(1000, 2048)  # dropped
    network = load_dkm(state, path="gim_dkm_100h.ckpt")
    assert {f"model.{name}" for name in network.state_dict()} == set(published)


def test_a_wrong_checkpoint_is_named_with_what_it_lacks() -> None:
    with pytest.raises(WeightsError, match=r"other\.ckpt(.|\n)*missing \(\d+\): decoder\."):
        load_dkm({"model.something": torch.zeros(1)}, path="other.ckpt")
    with pytest.raises(WeightsError, match=r"unexpected \(1\): something"):
        load_dkm({"model.something": torch.zeros(1)}, path="other.ckpt")


def test_registry_knows_the_family() -> None:
    files = {"gim_dkm": "gim_dkm_100h.ckpt", "dkm_outdoor": "DKMv3_outdoor.pth"}
    files["dkm_indoor"] = "DKMv3_indoor.pth"
    for name, file in files.items():
        info = matchers.describe(name)
        assert (info.kind, info.colour, info.checkpoint) == ("dense", "rgb", (file,))


def test_warps_of_any_size_can_be_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.multinomial`` refuses more than 2^24 categories; beyond, the same draw is our own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(5000, 4, generator=generator) * 0.2
    certainty = torch.rand(5000, generator=generator) * 0.05
    certainty[::2] = 0
    expected = sampling.balanced_sample(rows, certainty, 200, seed=3)
    monkeypatch.setattr(sampling, "_MOST_CATEGORIES", 4999)
    found = sampling.balanced_sample(rows, certainty, 200, seed=3)
    assert torch.equal(found, expected)
    assert (certainty[found] > 0).all()
