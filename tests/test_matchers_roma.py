"""The RoMa matchers: options, frames, what the networks are given, checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_networks_roma import TINY, tiny
from torch import nn

from gim_hloc import matchers
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.geometry.warp import cell_centres
from gim_hloc.matchers import ImageData
from gim_hloc.matchers.registry import operating_point
from gim_hloc.matchers.roma import (
    RoMaMatcher,
    RoMaOptions,
    load_dinov2,
    load_roma,
)

IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])


class Same(nn.Module):
    """A network for which both images are the same picture, in normalised coordinates."""

    def encode(self, tokens, image, fine=None):
        return {"image": image, "fine": image if fine is None else fine}

    def match(self, a, b, *, scale_factors):
        count, _, height, width = a["fine"].shape
        flow = cell_centres(height, width).expand(2, count, -1, -1, -1)
        return flow, torch.full((2, count, height, width), 0.75)


class Stubbed(RoMaMatcher):
    def _networks(self, states):
        return Same(), nn.Identity()


class Tiny(RoMaMatcher):
    def _networks(self, states):
        return tiny()


def make(kind: type[RoMaMatcher], name: str = "gim_roma", **options) -> RoMaMatcher:
    options = {"size": (140, 140), "upsample_size": (240, 240), **options}
    return kind(name, options=RoMaOptions(**options), device=torch.device("cpu"), states={})


def picture(width: int, height: int, to_original: np.ndarray = IDENTITY, **fields) -> ImageData:
    generator = torch.Generator().manual_seed(width)
    corner = to_original @ np.array([width - 1, height - 1, 1.0])
    return ImageData(
        image=torch.rand(3, height, width, generator=generator),
        name=fields.pop("name", f"{width}x{height}.jpg"),
        size=(round(corner[0]) + 1, round(corner[1]) + 1),
        to_original=to_original,
        **fields,
    )


def test_frames_are_pinned_by_a_network_that_sees_no_difference() -> None:
    # 300 x 200 and 200 x 300 are padded to 300 x 300: the same place is 50 px lower in one and
    # 50 px further left in the other.
    matcher = make(Stubbed)
    a, b = matcher.encode(picture(300, 200)), matcher.encode(picture(200, 300))
    warp = matcher.warp(a, b)
    xy = torch.tensor([[100.0, 100.0], [60.0, 20.5], [151.5, 180.0], [239.0, 99.0]])
    reading = warp.read(xy)
    np.testing.assert_allclose(reading.xy_px, xy + torch.tensor([-50.0, 50.0]), atol=1e-3)
    np.testing.assert_allclose(reading.certainty, 0.75)
    back = warp.swapped().read(reading.xy_px)
    np.testing.assert_allclose(back.xy_px, xy, atol=1e-3)
    # Left of x = 50, image 1 is padding.
    assert warp.read(torch.tensor([[20.0, 100.0]])).certainty.item() == 0
    matches = matcher.match(a, b)
    assert len(matches) > 1000
    shift = (matches.keypoints1 - matches.keypoints0).numpy()
    np.testing.assert_allclose(shift, np.broadcast_to([-50.0, 50.0], shift.shape), atol=1e-3)
    assert matches.keypoints0[:, 0].min() > 48


def test_stored_pixels_are_reached_through_the_image_s_own_frame() -> None:
    # The stored file is twice as large as the network's image: pixel centres at 2 x + 0.5.
    matcher = make(Stubbed)
    twice = np.array([[2.0, 0, 0.5], [0, 2, 0.5]])
    a, b = matcher.encode(picture(200, 200, twice)), matcher.encode(picture(200, 200))
    xy = torch.tensor([[0.5 + 2 * 70, 0.5 + 2 * 90]])
    np.testing.assert_allclose(matcher.warp(a, b).read(xy).xy_px, [[70.0, 90.0]], atol=1e-3)


def test_masks_hold_for_both_images() -> None:
    matcher = make(Stubbed)
    mask = torch.ones(200, 200, dtype=torch.bool)
    mask[:, :100] = False
    a, b = matcher.encode(picture(200, 200, mask=mask)), matcher.encode(picture(200, 200, name="b"))
    xy = torch.tensor([[50.0, 100.0], [150.0, 100.0]])
    for warp in (matcher.warp(a, b), matcher.warp(b, a)):
        np.testing.assert_allclose(warp.read(xy).certainty, [0.0, 0.75])


def test_networks_are_given_the_sizes_of_the_options() -> None:
    matcher = make(Stubbed, size=(112, 140), upsample_size=(200, 250))
    features = matcher.encode(picture(300, 100)).features
    assert features["image"].shape == (1, 3, 112, 140)
    assert features["fine"].shape == (1, 3, 200, 250)
    assert matcher.grid_size == (200, 250)
    single = make(Stubbed, size=(112, 140), upsample_size=None)
    encoding = single.encode(picture(300, 100))
    assert single.grid_size == (112, 140) == tuple(encoding.valid.shape)
    assert single.warp(encoding, encoding).flow0.shape == (112, 140, 2)


def test_only_the_authors_weights_want_normalised_colours() -> None:
    image = picture(140, 140)
    grey = ImageData(
        image=image.image[:1], name="g", size=image.size, to_original=image.to_original
    )
    options = {"upsample_size": None}
    plain = make(Stubbed, **options).encode(image).features["image"]
    torch.testing.assert_close(plain[0], image.image)
    repeated = make(Stubbed, **options).encode(grey).features["image"]
    torch.testing.assert_close(repeated[0], image.image[:1].expand(3, -1, -1))
    normalised = make(Stubbed, "roma_outdoor", **options).encode(image).features["image"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (image.image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(normalised[0], expected)


def test_scale_factors_follow_the_sizes() -> None:
    sizes = {"size": (672, 672), "upsample_size": (1344, 1344)}
    assert make(Stubbed, **sizes).scale_factors() == pytest.approx((1, 2))
    # GIM's first pass counts as the trained size whatever it is.
    sizes = {"size": (224, 224), "upsample_size": (336, 336)}
    assert make(Stubbed, **sizes).scale_factors() == pytest.approx((1, 1.5))
    sizes = {"size": (560, 560), "upsample_size": (864, 864)}
    assert make(Stubbed, "roma_indoor", **sizes).scale_factors() == pytest.approx((1, 864 / 560))


@torch.inference_mode()
def test_a_batch_of_pairs_gives_what_each_pair_gives() -> None:
    matcher = make(Tiny, size=(112, 112), upsample_size=(160, 160), num_matches=200)
    encodings = [matcher.encode(picture(150, h)) for h in (100, 110, 120)]
    pairs = [(encodings[0], encodings[1]), (encodings[2], encodings[0])]
    for pair, together in zip(pairs, matcher.warp_batch(pairs), strict=True):
        alone = matcher.warp(*pair)
        torch.testing.assert_close(together.flow0, alone.flow0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.flow1, alone.flow1, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.certainty0, alone.certainty0, atol=1e-4, rtol=1e-4)
        assert np.array_equal(together.frame0, pair[0].frame)
    assert matcher.warp_batch([]) == []


@torch.inference_mode()
def test_half_precision_agrees_roughly_and_is_kept_in_half_precision() -> None:
    options = {"size": (112, 112), "upsample_size": (112, 112)}
    warps = {}
    for precision in ("float32", "bfloat16"):
        matcher = make(Tiny, precision=precision, **options)
        a, b = matcher.encode(picture(150, 100)), matcher.encode(picture(150, 110))
        dtypes = {value.dtype for name, value in a.features.items() if name != "position"}
        assert dtypes == {getattr(torch, precision)}
        assert a.features["position"].dtype == torch.float32
        warps[precision] = matcher.warp(a, b)
        assert warps[precision].flow0.dtype == torch.float32
    # Classes may flip where two are nearly as good; most cells must agree.
    difference = (warps["float32"].flow0 - warps["bfloat16"].flow0).abs().amax(-1)
    assert difference.median() < 0.02


@torch.inference_mode()
def test_features_may_be_held_in_half_precision() -> None:
    options = {"size": (112, 112), "upsample_size": (160, 160)}
    warps = []
    for hold in ("auto", "float16"):
        matcher = make(Tiny, hold=hold, **options)
        a, b = matcher.encode(picture(150, 100)), matcher.encode(picture(150, 110))
        warps.append(matcher.warp(a, b))
    assert a.features["fine1"].dtype == torch.float16
    assert a.features["position"].dtype == a.features["coarse16"].dtype == torch.float32
    assert (warps[0].flow0 - warps[1].flow0).abs().median() < 1e-3


def test_features_are_tensors_of_the_network_s_strides() -> None:
    matcher = make(Tiny, size=(112, 112), upsample_size=(160, 160))
    features = matcher.encode(picture(150, 100)).features
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {
        "coarse16": (1, TINY.projected[16], 8, 8),
        "position": (1, 64, TINY.position),
        **{f"coarse{s}": (1, TINY.projected[s], 112 // s, 112 // s) for s in (8, 4, 2, 1)},
        **{f"fine{s}": (1, TINY.projected[s], 160 // s, 160 // s) for s in (8, 4, 2, 1)},
    }
    # Kept for many images: a view of something larger would keep that alive.
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in features.values())


def test_first_pass_must_fit_the_tokens() -> None:
    with pytest.raises(InputError, match=r"multiples of 14 .* \(672, 896\)"):
        RoMaOptions(size=(670, 900))
    with pytest.raises(InputError, match="upsample_size"):
        RoMaOptions(upsample_size=(10, 10))


@pytest.mark.parametrize("name", ["gim_roma", "roma_outdoor", "roma_indoor"])
def test_operating_points_grow(name: str) -> None:
    points = [operating_point(name, quality) for quality in ("fast", "base", "precise")]
    assert points[0].size < points[1].size <= points[2].size
    assert points[0].upsample_size < points[1].upsample_size < points[2].upsample_size


def test_base_is_the_reference_s_setting() -> None:
    options = operating_point("gim_roma")
    assert (options.size, options.upsample_size) == ((672, 672), (1344, 1344))
    assert (options.pad, options.num_matches, options.sample_threshold) == (True, 5000, 0.05)


def test_halving_takes_the_second_pass_first() -> None:
    matcher = make(Stubbed, size=(672, 672), upsample_size=(1344, 1344))
    seen = []
    while matcher.smaller():
        seen.append((matcher.options.size, matcher.options.upsample_size))
    assert seen == [((672, 672), None), ((336, 336), None), ((168, 168), None)]
    assert matcher.encode(picture(100, 100)).features["image"].shape[-1] == 168
    larger = make(Stubbed, size=(448, 434), upsample_size=(1344, 1344))
    assert larger.smaller()
    assert (larger.options.size, larger.options.upsample_size) == ((448, 434), (672, 672))
    assert larger.smaller()
    assert larger.smaller()
    assert (larger.options.size, larger.options.upsample_size) == ((224, 210), None)


def test_settings_name_what_decides_the_numbers() -> None:
    matcher = make(Stubbed)
    settings = matcher.settings()
    assert json.loads(json.dumps(settings))["encode"]["precision"] == "float32"
    assert {"size", "upsample_size", "pad"} <= settings["encode"].keys()
    assert {"num_matches", "seed"} <= settings["match"].keys()
    before = matcher.encode_settings()
    assert matcher.smaller()
    assert matcher.encode_settings() != before


def test_registry_knows_the_family() -> None:
    for name in ("gim_roma", "roma_outdoor", "roma_indoor"):
        info = matchers.describe(name)
        assert (info.kind, info.colour) == ("dense", "rgb")
        assert info.checkpoint[1] == "dinov2_vitl14_pretrain.pth"


def test_a_wrong_checkpoint_is_named_with_what_it_lacks() -> None:
    with pytest.raises(WeightsError, match=r"other\.ckpt(.|\n)*missing \(\d+\): decoder\."):
        load_roma({"model.something": torch.zeros(1)}, path="other.ckpt")
    with pytest.raises(WeightsError, match=r"unexpected \(1\): something"):
        load_roma({"model.something": torch.zeros(1)}, path="other.ckpt")
    with pytest.raises(WeightsError, match="DINOv2"):
        load_dinov2({"cls_token": torch.zeros(1, 1, 384)}, path="small.pth")
