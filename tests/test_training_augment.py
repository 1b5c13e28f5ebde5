"""Labels, images and valid areas follow one matrix exactly, whatever is drawn."""

from __future__ import annotations

import dataclasses

import kornia
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gim_hloc.errors import InputError
from gim_hloc.training.batch import PairSample
from gim_hloc.training.data import photometric
from gim_hloc.training.data.augment import (
    AugmentOptions,
    RawPair,
    TooFewLabelsError,
    apply_homography,
    homography_of,
    make_sample,
    place,
    place_labels,
    random_homography,
    render,
)

WALK = {"zoom0": (0.6, 1.0), "zoom1": (1.0, 1.4)}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def coordinates(width: int, height: int, factor: int = 1) -> np.ndarray:
    """An image that says where it is: red is x, green is y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([factor * x, factor * y, np.full_like(x, 255)], -1).astype(np.uint8)


def blank_pair(
    size0: tuple[int, int], size1: tuple[int, int], labels: np.ndarray | None = None
) -> RawPair:
    return RawPair(
        image0=coordinates(*size0), image1=coordinates(*size1), names=("a", "b"), labels=labels
    )


sizes = st.tuples(st.integers(40, 250), st.integers(40, 250))


@st.composite
def augmentations(draw: st.DrawFn) -> AugmentOptions:
    return AugmentOptions(
        box=(draw(st.integers(40, 150)), draw(st.integers(40, 150))),
        train=draw(st.booleans()),
        keep_scale=draw(st.sampled_from([0.0, 0.5, 1.0])),
        homography=draw(st.sampled_from([0.0, 1.0])),
        rotation_deg=draw(st.sampled_from([0.0, 45.0, 180.0])),
        flip_horizontal=draw(st.sampled_from([0.0, 1.0])),
        flip_vertical=draw(st.sampled_from([0.0, 1.0])),
        photometric="none",
        min_labels=1,
        max_labels=draw(st.sampled_from([None, 50])),
        tries=8,
        **draw(st.sampled_from([{}, WALK])),
    )


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(options=augmentations(), size0=sizes, size1=sizes, seed=st.integers(0, 10**6))
def test_labels_follow_the_matrix(
    options: AugmentOptions, size0: tuple[int, int], size1: tuple[int, int], seed: int
) -> None:
    draw = rng(seed)
    labels = np.concatenate(
        [draw.uniform(0, 1, (400, 2)) * size0, draw.uniform(0, 1, (400, 2)) * size1], 1
    )
    raw = blank_pair(size0, size1, labels)
    try:
        sample = make_sample(raw, options, rng(seed), dataset="x")
    except TooFewLabelsError:
        return
    assert sample.labels is not None
    assert len(sample.labels) <= (options.max_labels or 400)
    rows = sample.labels.double().numpy()
    # Each label is one that was stored.
    back = np.concatenate(
        [
            apply_homography(sample.to_original0.numpy(), rows[:, :2]),
            apply_homography(sample.to_original1.numpy(), rows[:, 2:]),
        ],
        1,
    )
    distance = np.abs(back[:, None] - labels[None]).max(2)
    assert distance.min(1).max() < 1e-3
    # No two are the same, rows are sorted, and each end has an image all around it.
    assert len(np.unique(distance.argmin(1))) == len(rows)
    assert np.array_equal(rows, rows[np.lexsort(rows.T[::-1])])
    found = labels[distance.argmin(1)]
    for valid, matrix, stored in (
        (sample.valid0, sample.to_original0, found[:, :2]),
        (sample.valid1, sample.to_original1, found[:, 2:]),
    ):
        # Not the float32 of the sample, which may come out on the other side of a pixel.
        xy = apply_homography(np.linalg.inv(matrix.numpy()), stored)
        cell = np.floor(xy).astype(int)
        assert (xy <= np.array([valid.shape[1], valid.shape[0]]) - 8 + 1e-4).all()
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            assert valid[cell[:, 1] + dy, cell[:, 0] + dx].all()


@settings(max_examples=50, deadline=None)
@given(
    options=augmentations(),
    size=st.tuples(st.integers(40, 63), st.integers(40, 63)),
    seed=st.integers(0, 10**6),
)
def test_image_content_follows_the_matrix(
    options: AugmentOptions, size: tuple[int, int], seed: int
) -> None:
    image = coordinates(*size, factor=4)
    raw = RawPair(image0=image, image1=image, names=("a", "b"))
    sample = make_sample(raw, options, rng(seed), dataset="x")
    width, height = options.network_box
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2)
    for image, valid, matrix in (
        (sample.image0, sample.valid0, sample.to_original0),
        (sample.image1, sample.valid1, sample.to_original1),
    ):
        assert image.shape == (3, height, width)
        assert not image[:, ~valid].any()
        assert (image[2][valid] > 1 - 1e-5).all()  # blue is the image itself, nothing mixed in
        place_there = apply_homography(matrix.numpy(), grid)
        seen = image[:2].permute(1, 2, 0).reshape(-1, 2).numpy() * 255 / 4
        # A resized image ends with its outermost pixels; away from its border it is linear.
        scale = np.abs(np.linalg.det(matrix.numpy()[:2, :2])) ** 0.5
        margin = 2 + 2 * scale
        inner = ((place_there > margin) & (place_there < np.array(size) - 1 - margin)).all(1)
        inner &= valid.reshape(-1).numpy()
        if inner.sum() < 50:
            continue
        error = (seen - place_there)[inner]
        assert np.abs(error).max() < 0.26  # 8 bits
        assert np.abs(error.mean(0)).max() < 0.2  # half a pixel off would show


@pytest.mark.parametrize("side", [32, 64, 128])
def test_resizing_is_exact_about_pixel_centres(side: int) -> None:
    # Halved, kept and doubled, this gradient needs no rounding to 8 bits.
    image = np.repeat((4 * np.arange(64, dtype=np.uint8))[None, :, None], 64, 0).repeat(3, 2)
    options = AugmentOptions(
        box=(side, side), keep_scale=0.0, zoom0=(1.0, 1.0), zoom1=(1.0, 1.0), homography=0.0,
        photometric="none",
    )  # fmt: skip
    raw = RawPair(image0=image, image1=image, names=("a", "b"))
    sample = make_sample(raw, options, rng(0), dataset="x")
    assert sample.valid0.all()
    x = np.arange(2, side - 2)  # at its border a doubled image goes on evenly
    original = apply_homography(sample.to_original0.numpy(), np.c_[x, x])
    np.testing.assert_allclose(sample.image0[0, 8, x] * 255 / 4, original[:, 0], atol=1e-4)


def test_a_mirrored_dot() -> None:
    image = np.zeros((80, 120, 3), np.uint8)
    image[20, 30] = 255
    for horizontal in (0.0, 1.0):
        for vertical in (0.0, 1.0):
            options = AugmentOptions(
                box=(160, 160), keep_scale=1.0, homography=0.0, photometric="none",
                flip_horizontal=horizontal, flip_vertical=vertical,
            )  # fmt: skip
            raw = RawPair(image0=image, image1=image, names=("a", "b"))
            sample = make_sample(raw, options, rng(0), dataset="x")
            for pixels in (sample.image0, sample.image1):
                y, x = np.unravel_index(int(pixels[0].argmax()), (160, 160))
                assert (x, y) == (119 - 30 if horizontal else 30, 79 - 20 if vertical else 20)
                back = apply_homography(sample.to_original0.numpy(), np.array([[x, y]]))
                np.testing.assert_allclose(back, [[30, 20]], atol=1e-9)
            assert sample.valid0[:80, :120].all()
            assert sample.valid0.sum() == 80 * 120  # padding stays at the right and below


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9), box=st.tuples(st.integers(40, 900), st.integers(40, 900)))
def test_homographies_are_those_of_the_recipe(seed: int, box: tuple[int, int]) -> None:
    matrix = random_homography(box, rng(seed), offset=0.25, rotation_deg=0.0)
    width, height = box
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]])
    offsets = apply_homography(matrix, corners) - corners
    assert np.allclose(offsets, np.rint(offsets), atol=1e-6)
    for axis in (0, 1):
        reach = int(0.25 * box[axis])
        values = np.rint(offsets[:, axis]).astype(int)
        assert len(set(values)) == 4
        assert values.min() >= -reach
        assert values.max() < reach
    # Turning is about the middle, and all corners keep their distance to it.
    turned = random_homography(box, rng(seed), offset=0.0, rotation_deg=180.0)
    middle = np.array([[(width - 1) / 2, (height - 1) / 2]])
    np.testing.assert_allclose(apply_homography(turned, middle), middle, atol=1e-9)
    spread = np.linalg.norm(apply_homography(turned, corners) - middle, axis=1)
    np.testing.assert_allclose(spread, np.linalg.norm(corners - middle, axis=1), rtol=1e-9)
    # There and back.
    points = rng(seed).uniform(0, 1, (50, 2)) * box
    back = apply_homography(np.linalg.inv(matrix), apply_homography(matrix, points))
    np.testing.assert_allclose(back, points, atol=1e-6)


def test_homography_of_four_points() -> None:
    import cv2

    points = np.array([[0, 0], [99, 0], [0, 79], [99, 79]], np.float32)
    moved = points + np.array([[3, -5], [-10, 4], [7, 9], [-2, -20]], np.float32)
    expected = cv2.getPerspectiveTransform(points, moved)
    np.testing.assert_allclose(homography_of(points, moved), expected, atol=1e-6)


class TestPlacement:
    def test_validation_fits_the_whole_image(self) -> None:
        options = AugmentOptions(box=(645, 487), train=False)
        assert options.network_box == (640, 480)
        for size in ((1600, 1200), (1000, 3000), (300, 200), (641, 100)):
            got = place(size, options, rng(0), zoom=(0.6, 1.4), warp=True)
            assert got.extent == got.scaled
            assert got.start == (0, 0)
            assert got.homography is None
            scale = min(1.0, 640 / size[0], 480 / size[1])
            for axis in (0, 1):
                assert got.scaled[axis] == int(size[axis] * scale + 1e-6) // 8 * 8
            assert got == place(size, options, rng(99), zoom=(0.6, 1.4), warp=True)

    def test_larger_images_are_reduced_to_fill_one_side(self) -> None:
        options = AugmentOptions(box=(640, 640), keep_scale=1.0, homography=0.0)
        seen = {place((1600, 1200), options, rng(k), zoom=(1, 1)).scaled for k in range(40)}
        assert seen == {(640, 480), (848, 640)}
        starts = {place((1600, 1200), options, rng(k), zoom=(1, 1)).start for k in range(80)}
        assert max(x for x, _ in starts) > 150
        assert {y for _, y in starts} == {0}

    def test_zoom_is_relative_to_the_box_for_small_images(self) -> None:
        options = AugmentOptions(box=(800, 800), keep_scale=0.0)
        widths = [place((400, 300), options, rng(k), zoom=(0.6, 1.4)).scaled[0] for k in range(400)]
        assert 472 <= min(widths) <= 500
        assert 1100 <= max(widths) <= 1120
        wide = [place((800, 300), options, rng(k), zoom=(0.6, 1.4)).scaled[0] for k in range(400)]
        assert 472 <= min(wide) <= 500

    def test_how_often_images_keep_their_scale(self) -> None:
        for chance in (0.2, 0.5):
            options = AugmentOptions(box=(640, 640), keep_scale=chance)
            kept = np.mean(
                [
                    place((640, 640), options, rng(k), zoom=(0.5, 0.6)).scaled[0] == 640
                    for k in range(600)
                ]
            )
            assert abs(kept - chance) < 0.06

    def test_the_crop_begins_before_the_labels_and_the_zoom_keeps_them(self) -> None:
        options = AugmentOptions(box=(320, 320), keep_scale=0.0)
        for seed in range(100):
            got = place(
                (640, 480), options, rng(seed), zoom=(1.0, 1.4), label_box=(100, 60, 400, 300)
            )
            first = [
                (corner + 0.5) * n / size - 0.5 - start
                for corner, n, size, start in zip(
                    (100, 60), got.scaled, (640, 480), got.start, strict=True
                )
            ]
            assert min(first) >= 0
            assert 301 * got.scaled[0] / 640 <= 320 + 1e-6

    def test_valid_areas_are_where_interpolation_has_all_neighbours(self) -> None:
        options = AugmentOptions(box=(160, 120), homography=1.0, photometric="none")
        for seed in range(20):
            got = place((150, 100), options, rng(seed), zoom=(0.6, 1.4), warp=True)
            white = np.full((100, 150, 3), 255, np.uint8)
            image, valid = render(white, got, options, rng(0))
            assert torch.equal(image[0] > 1 - 1e-5, valid)
            assert got.homography is not None
            grid = np.stack(np.meshgrid(np.arange(160), np.arange(120)), -1).reshape(-1, 2)
            source = apply_homography(np.linalg.inv(got.homography), grid)
            on = ((source >= 0) & (source <= np.array(got.extent) - 1)).all(1)
            assert (on != valid.reshape(-1).numpy()).mean() < 1e-3


class TestLabels:
    def labels(self, count: int, size: tuple[int, int]) -> np.ndarray:
        xy = rng(0).uniform(0.1, 0.9, (count, 2)) * size
        return np.concatenate([xy, xy], 1)

    def test_enough_remain(self) -> None:
        options = AugmentOptions(box=(160, 160), homography=1.0, photometric="none", **WALK)
        counts = []
        for seed in range(30):
            raw = blank_pair((240, 200), (240, 200), self.labels(300, (240, 200)))
            sample = make_sample(raw, options, rng(seed), dataset="x")
            assert sample.labels is not None
            counts.append(len(sample.labels))
        assert min(counts) >= 64
        assert min(counts) < 250  # augmentations do cost labels

    def test_too_few(self) -> None:
        options = AugmentOptions(box=(160, 160), photometric="none")
        raw = blank_pair((240, 200), (240, 200), self.labels(63, (240, 200)))
        with pytest.raises(TooFewLabelsError, match="64 are needed"):
            make_sample(raw, options, rng(0), dataset="x")
        raw.labels = np.zeros((0, 4))
        with pytest.raises(TooFewLabelsError):
            make_sample(raw, options, rng(0), dataset="x")

    def test_duplicates_go_and_the_first_rows_stay(self) -> None:
        labels = self.labels(100, (160, 120))
        options = AugmentOptions(box=(160, 120), train=False)
        placements = tuple(place((160, 120), options, rng(0), zoom=(1, 1)) for _ in range(2))
        doubled = np.concatenate([labels, labels[::-1]])
        kept = place_labels(doubled, (placements[0], placements[1]), (160, 120))
        expected = labels[(labels[:, :2] <= [152, 112]).all(1)]
        np.testing.assert_allclose(kept, expected[np.lexsort(expected.T[::-1])], atol=1e-9)
        few = dataclasses.replace(options, max_labels=10, min_labels=20)
        sample = make_sample(blank_pair((160, 120), (160, 120), doubled), few, rng(0), dataset="x")
        assert sample.labels is not None
        np.testing.assert_allclose(sample.labels, kept[:10], atol=1e-4)


def same_sample(a: PairSample, b: PairSample) -> bool:
    for field in dataclasses.fields(PairSample):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            if not torch.equal(x, y):
                return False
        elif x != y:
            return False
    return True


def test_the_generator_decides_everything() -> None:
    raw = blank_pair((200, 150), (200, 150))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - to see that global state does not matter
    for style in ("dark", "mobile"):
        options = AugmentOptions(box=(160, 160), photometric=style, photometric_probability=1.0)
        first = [make_sample(raw, options, rng(k), dataset="x") for k in range(12)]
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        again = [make_sample(raw, options, rng(k), dataset="x") for k in range(12)]
        assert all(same_sample(a, b) for a, b in zip(first, again, strict=True))
        assert not any(same_sample(first[0], other) for other in first[1:])


def test_depth_must_fit_its_image() -> None:
    raw = blank_pair((100, 80), (100, 80))
    raw.depth0 = np.ones((40, 50), np.float32)
    with pytest.raises(InputError, match=r"50 x 40 px, the image 100 x 80"):
        make_sample(raw, AugmentOptions(box=(80, 80)), rng(0), dataset="x")
    raw.depth0 = np.full((80, 100), np.nan, np.float32)
    raw.depth0[3, 4], raw.depth0[3, 5], raw.depth0[3, 6] = 2.0, -1.0, np.inf
    raw.depth1 = np.ones((80, 100), np.float32)
    sample = make_sample(raw, AugmentOptions(box=(80, 80)), rng(0), dataset="x")
    assert sample.depth0 is not None
    assert sample.depth0.sum() == 2.0
    assert sample.depth0[3, 4] == 2.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"box": (7, 100)}, "smaller than 8"),
        ({"homography": 1.5}, "homography is 1.5; it must be at most 1"),
        ({"zoom0": (1.4, 0.6)}, "range"),
        ({"homography_offset": 0.5}, "corners"),
        ({"tries": 0}, "tries is 0; it must be at least 1"),
        ({"photometric": "bright"}, "dark"),
    ],
)
def test_options_that_make_no_sense(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AugmentOptions(**wrong)


class TestPhotometric:
    image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("style", ["dark", "mobile"])
    def test_recipes_stay_in_range_and_change_something(self, style: str) -> None:
        before = self.image.clone()
        changed = 0
        for seed in range(60):
            after = photometric.change(self.image, style, rng(seed))  # type: ignore[arg-type]
            assert after.shape == self.image.shape
            assert after.dtype == torch.float32
            assert after.min() >= 0
            assert after.max() <= 1
            changed += not torch.equal(after, self.image)
        assert torch.equal(self.image, before)
        assert 30 < changed < 60

    def test_dark_is_darker(self) -> None:
        after = [photometric.change(self.image, "dark", rng(seed)) for seed in range(200)]
        assert np.mean([float(a.mean()) for a in after]) < 0.8 * float(self.image.mean())
        assert min(float(a.std()) for a in after) >= 0.02  # something is seen in all of them

    def test_none_does_nothing(self) -> None:
        assert photometric.change(self.image, "none", rng(0)) is self.image

    def test_value_shift_is_hsvs(self) -> None:
        import colorsys

        after = photometric.value_shift(self.image, None, shift=-0.3)
        for x, y in ((0, 0), (10, 20), (63, 47), (33, 7)):
            h, s, v = colorsys.rgb_to_hsv(*self.image[:, y, x].tolist())
            expected = colorsys.hsv_to_rgb(h, s, max(v - 0.3, 0))
            assert after[:, y, x].tolist() == pytest.approx(expected, abs=1e-5)

    def test_blurs_keep_what_is_even(self) -> None:
        even = torch.full((3, 40, 40), 0.4)
        ramp = (torch.arange(40.0) / 40).expand(3, 40, 40)
        for blurred in (
            lambda x: photometric.blur(x, None, reach=3),
            lambda x: photometric.motion_blur(x, None, reach=4, angle_deg=30.0, direction=0.0),
        ):
            assert torch.allclose(blurred(even), even, atol=1e-6)
            inner = blurred(ramp)[:, 12:-12, 12:-12]
            assert torch.allclose(inner, ramp[:, 12:-12, 12:-12], atol=0.02)
            assert blurred(self.image).var() < 0.5 * self.image.var()

    def test_kornias_augmentations_do_the_same(self) -> None:
        """With the strengths that we draw; kornia's own draws are not a sample's seed's."""
        drawn = {"brightness": 0.9, "contrast": 1.2, "saturation": 0.8}
        params = {f"{name}_factor": torch.tensor([value]) for name, value in drawn.items()}
        params |= {"hue_factor": torch.tensor([0.1]), "order": torch.arange(4)}
        theirs = kornia.augmentation.ColorJitter(0.2, 0.2, 0.2, 0.2, p=1.0)
        expected = theirs(self.image[None], params={**params, "batch_prob": torch.ones(1)})[0]
        ours = photometric.colour_jitter(self.image, None, **drawn, hue_deg=36.0)
        assert torch.allclose(ours, expected, atol=1e-4)

    def test_jpeg_of_quality(self) -> None:
        smooth = kornia.filters.gaussian_blur2d(self.image[None], (9, 9), (2.0, 2.0))[0]
        fine, coarse = (
            (photometric.jpeg(smooth, None, quality=quality) - smooth).abs().mean()
            for quality in (98, 10)
        )
        assert fine < 0.02
        assert coarse > fine

    def test_gamma_noise_rain_flare(self) -> None:
        assert torch.allclose(photometric.gamma(self.image, None, exponent=0.5), self.image.sqrt())
        noisy = photometric.sensor_noise(
            torch.full((3, 200, 200), 0.25), rng(0), intensity=0.08, colour=0.0
        )
        assert float(noisy.std()) == pytest.approx(0.04, rel=0.05)
        assert torch.allclose(noisy[0], noisy[1])
        wet = photometric.rain(self.image, rng(0), slant=0.1)
        assert (wet != self.image).any()
        glare = photometric.sun_flare(self.image, None, x=10 / 64, y=5 / 48, radius=6 / 64)
        assert torch.allclose(glare[:, 5, 10], torch.ones(3))
        assert (glare[:, 47, 63] - self.image[:, 47, 63]).abs().max() < 1e-2
