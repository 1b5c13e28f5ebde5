"""LoFTR as a matcher: frames, masks, batches, memory, settings."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import filled

from gim_hloc import weight_checks
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.matchers import registry
from gim_hloc.matchers.loftr import LoFTRMatcher, LoFTROptions
from gim_hloc.networks.loftr import LoFTR, Widths
from gim_hloc.types import ImageData, Matches

IDENTITY = np.eye(2, 3)
SMALL = Widths(encoder=16, blocks=(1, 1, 1), coarse=128, middle=48, fine=32, layers=4)


@functools.cache
def checkpoint() -> dict[str, torch.Tensor]:
    keys = {
        f"model.{key}": [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in LoFTR(widths=SMALL).state_dict().items()
    }
    return filled.fill_state_dict("gim_loftr", keys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    return tmp_path


def matcher(**options: Any) -> LoFTRMatcher:
    network = LoFTR(positional=options.get("positional", "published"), widths=SMALL)
    network.load_state_dict({key.removeprefix("model."): v for key, v in checkpoint().items()})
    return LoFTRMatcher(
        "gim_loftr", options=LoFTROptions(**options), device=torch.device("cpu"), network=network
    )


def pattern(height: int, width: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    shape = (1, channels, height // 8 + 2, width // 8 + 2)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, scale_factor=8, mode="bicubic")[0, :, :height, :width].clamp(0, 1)


def data(image: torch.Tensor, name: str = "a", **changes: Any) -> ImageData:
    size = (image.shape[2], image.shape[1])
    values: dict[str, Any] = {"name": name, "size": size, "to_original": IDENTITY} | changes
    return ImageData(image=image, **values)


def test_a_shift_of_cells_is_found() -> None:
    """The first point lies on the grid of cells in hloc's frame, the second within a window."""
    one = matcher()
    wide = pattern(112, 160)
    a, b = one.encode(data(wide[:, :96, :128])), one.encode(data(wide[:, 8:104, 16:144], "b"))
    found = one.match(a, b)
    assert found.indices is None
    assert len(found) > 30
    assert (found.keypoints0 % 8 == 0).all()
    moved = found.keypoints0 - found.keypoints1 - torch.tensor([16.0, 8.0])
    assert (moved.abs().amax(1) <= 4).float().mean() > 0.7
    same = one.match(a, a)
    assert ((same.keypoints0 - same.keypoints1).abs() <= 4).all()
    assert (same.scores > 0.2).all()
    assert (same.scores <= 1).all()


def test_points_are_in_stored_pixels() -> None:
    """Half the size and a turn by 90 degrees: both are undone, half pixels included."""
    one = matcher()
    image = pattern(96, 128)
    to_original = np.array([[0.0, -2.0, 190.5], [2.0, 0.0, 0.5]])
    plain = one.encode(data(image))
    turned = one.encode(data(image, size=(192, 256), to_original=to_original))
    expected, found = one.match(plain, plain), one.match(turned, turned)
    matrix = torch.tensor(to_original)
    for side in ("keypoints0", "keypoints1"):
        xy = getattr(expected, side).double() @ matrix[:, :2].T + matrix[:, 2]
        assert torch.allclose(getattr(found, side).double(), xy, atol=1e-3)
        assert getattr(found, side).dtype == torch.float32


def test_masks_take_matches_away_in_either_image() -> None:
    one = matcher(border=1)
    image = pattern(96, 128)
    mask = torch.ones(96, 128, dtype=torch.bool)
    mask[30:70, 40:90] = False
    plain, masked = one.encode(data(image)), one.encode(data(image, mask=mask))
    assert len(one.match(plain, plain)) > 60

    def allowed(xy: torch.Tensor) -> torch.Tensor:
        x, y = xy.round().long().unbind(1)
        return mask[y.clamp(0, 95), x.clamp(0, 127)]

    for a, b in ((masked, plain), (plain, masked), (masked, masked)):
        found = one.match(a, b)
        assert 10 < len(found) < 90
        if a is masked:
            assert allowed(found.keypoints0).all()
        if b is masked:
            assert allowed(found.keypoints1).all()
    nothing = one.encode(data(image, mask=torch.zeros(96, 128, dtype=torch.bool)))
    assert len(one.match(nothing, plain)) == len(one.match(plain, nothing)) == 0


def test_different_sizes_and_few_matches() -> None:
    one = matcher()
    a = one.encode(data(pattern(96, 128)))
    b = one.encode(data(pattern(64, 152, 3), "b"))
    found = one.match(a, b)
    assert found.keypoints0.shape == found.keypoints1.shape == (len(found), 2)
    tiny = one.encode(data(pattern(8, 32), "t"))
    assert len(one.match(a, tiny)) == len(one.match(tiny, tiny)) == 0
    black = one.encode(data(torch.zeros(3, 64, 64), "k"))
    assert len(one.match(black, a)) == len(one.match(a, black))


def test_a_batch_gives_what_its_pairs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as a GPU runs it: images of equal size stacked, the others apart."""
    one = matcher()
    mask = torch.ones(96, 128, dtype=torch.bool)
    mask[:, 100:] = False
    encodings = [one.encode(data(pattern(96, 128, seed), str(seed))) for seed in range(2)]
    encodings.append(one.encode(data(pattern(96, 128), "m", mask=mask)))
    encodings.append(one.encode(data(pattern(104, 120), "o")))
    pairs = [(encodings[i], encodings[j]) for i, j in ((0, 0), (1, 1), (0, 3), (2, 0), (1, 0))]
    expected = [one.match(a, b) for a, b in pairs]
    stacked = one._match([pairs[0], pairs[1], pairs[4]])
    for single, found in zip([expected[0], expected[1], expected[4]], stacked, strict=True):
        assert torch.equal(single.keypoints0, found.keypoints0)
        assert torch.allclose(single.keypoints1, found.keypoints1, atol=1e-3)
        assert torch.allclose(single.scores, found.scores, atol=1e-3)
    calls: list[int] = []

    def together(rows: Any) -> list[Matches]:
        calls.append(len(rows))
        return [expected[pairs.index(row)] for row in rows]

    one.device = torch.device("meta")  # anything but a processor: grouping is what is tested
    monkeypatch.setattr(one, "_match", together)
    assert one.match_batch(pairs) == expected
    assert sorted(calls) == [1, 1, 3]


def test_encodings_are_tensors_by_name() -> None:
    one = matcher(hold="float16")
    encoding = one.encode(data(pattern(96, 128)))
    assert {key: tuple(value.shape) for key, value in encoding.features.items()} == {
        "tokens": (192, 128),
        "fine": (48, 64, 32),
    }
    assert encoding.features["fine"].dtype == torch.float16
    exact = matcher().encode(data(pattern(96, 128)))
    expected, found = matcher().match(exact, exact), one.match(encoding, encoding)
    assert torch.equal(expected.keypoints0, found.keypoints0)
    assert torch.allclose(expected.keypoints1, found.keypoints1, atol=0.1)


def test_half_precision_agrees() -> None:
    """bfloat16 on the processor stands for what autocast does on a GPU."""
    exact, rough = matcher(), matcher(precision="bfloat16")
    image = data(pattern(96, 128))
    a, b = exact.encode(image), rough.encode(image)
    assert b.features["tokens"].dtype == torch.float32
    assert b.features["fine"].dtype == torch.bfloat16
    expected, found = exact.match(a, a), rough.match(b, b)
    assert abs(len(expected) - len(found)) < 0.2 * len(expected)


def test_halving() -> None:
    one = matcher(max_size=640)
    assert one.smaller()
    assert one.options.max_size == one.image_options.max_size == 320
    assert one.smaller()
    assert not one.smaller()
    assert one.image_options.multiple_of == 8
    whole = matcher(max_size=None)
    assert whole.smaller()
    assert whole.image_options.max_size == 2048


def test_files_and_settings(folder: Path) -> None:
    torch.save({"state_dict": checkpoint()}, folder / "gim_loftr_50h.ckpt")
    one: Any = registry.load("gim_loftr", device="cpu")
    assert one.image_options.max_size == 1024
    settings = one.settings()
    assert settings["encode"]["precision"] == "float32"
    assert settings["encode"]["positional"] == "published"
    assert settings["encode"]["sha256:gim_loftr_50h.ckpt"]
    assert settings["match"]["threshold"] == 0.2
    image = data(pattern(96, 128))
    expected, found = matcher().encode(image), one.encode(image)
    assert torch.equal(expected.features["tokens"], found.features["tokens"])
    corrected: Any = registry.load("gim_loftr", device="cpu", positional="corrected")
    tokens = corrected.encode(image).features["tokens"]
    assert not torch.allclose(tokens, found.features["tokens"], atol=0.1)
    sizes = [registry.load("gim_loftr", quality=q, device="cpu").options.max_size  # type: ignore[arg-type]
             for q in ("fast", "base", "precise")]  # fmt: skip
    assert sizes == [640, 1024, 1600]


def test_flat_files_and_other_prefixes(folder: Path) -> None:
    for prefix in ("model.", "matcher.", "model.matcher.", ""):
        state = {prefix + key.removeprefix("model."): v for key, v in checkpoint().items()}
        torch.save(state, folder / "gim_loftr_50h.ckpt")
        one: Any = registry.load("gim_loftr", device="cpu")
        assert len(one.network.state_dict()) == len(checkpoint())
    del state["backbone.layer2_outconv.weight"]
    torch.save(state, folder / "gim_loftr_50h.ckpt")
    with pytest.raises(WeightsError, match="layer2_outconv"):
        registry.load("gim_loftr", device="cpu")


@pytest.mark.parametrize(
    ("name", "file", "corrected"),
    [
        ("loftr_outdoor", "loftr_outdoor.ckpt", False),
        ("loftr_indoor", "loftr_indoor_ds_new.ckpt", True),
    ],
)
def test_the_published_networks(name: str, file: str, corrected: bool, folder: Path) -> None:
    """Files with the names of kornia's network, which reads the authors', give its matches."""
    import copy

    from kornia.feature import LoFTR as KorniaLoFTR
    from kornia.feature.loftr.loftr import default_cfg

    config = copy.deepcopy(default_cfg)
    config["coarse"]["temp_bug_fix"] = corrected
    torch.manual_seed(0)
    theirs = KorniaLoFTR(pretrained=None, config=config).eval()
    theirs.coarse_matching.thr = 1e-6
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.3)
    torch.save({"state_dict": theirs.state_dict()}, folder / file)
    ours: Any = registry.load(name, device="cpu", threshold=1e-6)
    assert ours.network.positional == ("corrected" if corrected else "published")
    assert ours.image_options.grayscale
    assert weight_checks.verify(folder / file).good

    images = torch.rand(1, 128, 160), torch.rand(1, 112, 144)
    a, b = (ours.encode(data(image, str(k))) for k, image in enumerate(images))
    found = ours.match(a, b)
    with torch.inference_mode():
        expected = theirs({"image0": images[0][None], "image1": images[1][None]})
    assert len(found) == len(expected["confidence"]) > 5
    assert torch.equal(found.keypoints0, expected["keypoints0"])
    assert (found.keypoints1 - expected["keypoints1"]).abs().max() < 0.01
    assert (found.scores - expected["confidence"]).abs().max() < 1e-4


def test_bad_input() -> None:
    one = matcher()
    with pytest.raises(InputError, match="multiples of 8 px, not 100 x 96"):
        one.encode(data(pattern(96, 100)))
    for wrong in (
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"border": -1},
        {"max_size": 8},
        {"positional": "old"},
        {"border_rule": "x"},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            LoFTROptions(**wrong)  # type: ignore[arg-type]


def test_licences() -> None:
    assert not registry.describe("gim_loftr").commercial
    assert registry.describe("loftr_outdoor").commercial
    assert registry.describe("gim_loftr").kind == "semidense"
