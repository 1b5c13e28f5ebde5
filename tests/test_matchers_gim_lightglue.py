"""gim_lightglue, lightglue and superglue: files, frames, masks, batches, settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import filled

from gim_hloc import weight_checks
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.matchers import registry
from gim_hloc.networks.lightglue import LightGlue
from gim_hloc.networks.superpoint import SuperPoint
from gim_hloc.types import ImageData

IDENTITY = np.eye(2, 3)


def checkpoint() -> dict[str, torch.Tensor]:
    """GIM's file, made up: both networks under their prefixes."""
    shapes = {f"superpoint.{key}": v.shape for key, v in SuperPoint().state_dict().items()}
    shapes |= {f"model.{k}": v.shape for k, v in LightGlue(input_dim=256).state_dict().items()}
    keys = {key: [list(shape), "float32"] for key, shape in shapes.items()}
    return filled.fill_state_dict("gim_lightglue", keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    state = checkpoint()
    torch.save({"state_dict": state, "epoch": 3}, folder / "gim_lightglue_100h.ckpt")

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    torch.save(part("superpoint."), folder / "superpoint_v1.pth")
    glue = {}
    for key, value in part("model.").items():  # the names of the authors' file
        parts = key.split(".")
        if parts[0] == "transformers":
            parts = [parts[2], parts[1], *parts[3:]]
        glue[".".join(parts)] = value
    torch.save(glue, folder / "superpoint_lightglue.pth")
    return folder


@pytest.fixture(autouse=True)
def offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(folder))


def load(name: str = "gim_lightglue", **overrides: Any) -> Any:
    return registry.load(name, device="cpu", **{"max_keypoints": 300, **overrides})


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // 6 + 2, width // 6 + 2), np.float32)
    import cv2

    large = cv2.resize(coarse, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC)
    return np.clip(large[:height, :width], 0, 1)


def data(array: np.ndarray, name: str = "a", **changes: Any) -> ImageData:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    size = (tensor.shape[2], tensor.shape[1])
    values: dict[str, Any] = {"name": name, "size": size, "to_original": IDENTITY} | changes
    return ImageData(image=tensor, **values)


@pytest.mark.parametrize("name", ["gim_lightglue", "lightglue"])
def test_a_shift_of_whole_cells_is_found(name: str) -> None:
    """Keypoints are whole pixels in hloc's frame: a shift by (16, 8) is one to the last digit."""
    matcher = load(name)
    wide = texture(168, 216)
    a = matcher.encode(data(wide[:160, :200]))
    b = matcher.encode(data(wide[8:, 16:], "b"))
    assert a.keypoints.frac().abs().max() == 0
    found = matcher.match(a, b)
    moved = found.keypoints0 - found.keypoints1
    right = (moved == torch.tensor([16.0, 8.0])).all(1)
    assert len(found) > 40
    # Made-up weights err where the shift brings other borders near; never by a fraction of a pixel.
    assert right.float().mean() > 0.75
    assert moved.frac().abs().max() == 0
    assert torch.equal(found.keypoints0, a.keypoints[found.indices[:, 0]])
    same = matcher.match(a, a)
    assert len(same) > 100
    assert torch.equal(same.indices[:, 0], same.indices[:, 1])


def test_keypoints_are_in_stored_pixels() -> None:
    """Half the size, half-pixel aligned: network pixel x is the stored pixel 2 x + 0.5."""
    matcher = load()
    to_original = np.array([[2.0, 0.0, 0.5], [0.0, 2.0, 0.5]])
    plain = matcher.encode(data(texture(96, 128)))
    scaled = matcher.encode(data(texture(96, 128), to_original=to_original, size=(256, 192)))
    assert torch.equal(scaled.keypoints, plain.keypoints * 2 + 0.5)
    assert torch.equal(scaled.network_keypoints, plain.keypoints)


def test_one_file_or_two_flat_or_wrapped(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    image = data(texture(96, 128))
    first = load()
    flat = tmp_path / "flat"
    flat.mkdir()
    torch.save(checkpoint(), flat / "gim_lightglue_100h.ckpt")
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(flat))
    second = load()
    a, b = first.encode(image), second.encode(image)
    assert torch.equal(a.descriptors, b.descriptors)
    assert torch.equal(first.match(a, a).scores, second.match(b, b).scores)


@pytest.mark.parametrize("key", ["superpoint.convPa.weight", "model.posenc.Wr.weight"])
def test_a_wrong_file_names_what_is_missing(key: str, tmp_path: Path, monkeypatch: Any) -> None:
    state = checkpoint()
    del state[key]
    torch.save(state, tmp_path / "gim_lightglue_100h.ckpt")
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=key.partition(".")[2].replace(".", r"\.")):
        load()


def test_masks_keep_keypoints_away() -> None:
    matcher = load(max_keypoints=2000)
    mask = torch.ones(96, 128, dtype=torch.bool)
    mask[:, 64:] = False
    everything = matcher.encode(data(texture(96, 128)))
    masked = matcher.encode(data(texture(96, 128), mask=mask))
    left = everything.keypoints[:, 0] < 64
    assert 0 < len(masked) == int(left.sum()) < len(everything)
    assert torch.equal(masked.keypoints, everything.keypoints[left])


def test_colour_images_are_made_gray() -> None:
    matcher = load()
    colour = np.stack([texture(64, 80, seed) for seed in range(3)])
    gray = np.tensordot([0.299, 0.587, 0.114], colour, 1).astype(np.float32)
    a, b = matcher.encode(data(colour)), matcher.encode(data(gray))
    assert matcher.image_options.grayscale
    assert len(a) == len(b)
    assert (a.keypoints == b.keypoints).float().mean() > 0.95


def test_empty_and_poor_images() -> None:
    matcher = load()
    good = matcher.encode(data(texture(96, 128)))
    for array in (np.zeros((96, 128), np.float32), np.full((10, 40), 0.5, np.float32)):
        nothing = matcher.encode(data(array))
        assert len(nothing) == 0
        assert nothing.descriptors.shape == (0, 256)
        assert len(matcher.match(good, nothing)) == len(matcher.match(nothing, good)) == 0
    few = matcher.encode(data(texture(24, 24)))
    assert 0 < len(few) < 8 * 8
    found = matcher.match(few, good)
    assert found.keypoints0.shape == found.keypoints1.shape == (len(found), 2)


def test_a_batch_gives_what_its_pairs_give() -> None:
    matcher = load()
    sizes = [(96, 128), (120, 104), (64, 72)]
    encodings = [
        matcher.encode(data(texture(h, w, seed), str(seed))) for seed, (h, w) in enumerate(sizes)
    ]
    shifted = matcher.encode(data(texture(96, 128)[8:, 16:], "s"))
    pairs = [(encodings[0], shifted), (encodings[1], encodings[2]), (encodings[1], encodings[1])]
    expected = [matcher.match(a, b) for a, b in pairs]
    for single, batched in zip(expected, matcher._match(pairs), strict=True):  # as on a GPU
        assert torch.equal(single.indices, batched.indices)
        assert torch.allclose(single.scores, batched.scores, atol=1e-4)
    for single, batched in zip(expected, matcher.match_batch(pairs), strict=True):
        assert torch.equal(single.keypoints1, batched.keypoints1)


def test_settings_and_licences() -> None:
    matcher = load()
    settings = matcher.settings()
    assert settings["encode"]["sha256:gim_lightglue_100h.ckpt"]
    assert settings["match"]["filter_threshold"] == 0.1
    assert settings["match"]["depth_confidence"] == settings["match"]["width_confidence"] == -1
    assert settings["encode"]["nms_radius"] == 3
    base = registry.load("gim_lightglue", device="cpu").options
    assert (base.max_size, base.max_keypoints, base.detection_threshold) == (1920, 2048, 0.0)
    baseline = load("lightglue")
    assert set(baseline.weights_hashes) == {"superpoint_v1.pth", "superpoint_lightglue.pth"}
    assert baseline.options.depth_confidence == 0.95
    for name in ("gim_lightglue", "lightglue", "superglue_outdoor", "superglue_indoor"):
        assert not registry.describe(name).commercial
    with pytest.raises(InputError, match="subpixel must be 'none'"):
        load(subpixel="quadratic")


def test_processors_with_bfloat16_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    for capabilities, precision in (
        ({"avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        matcher = made[precision] = load()
        assert matcher.settings()["match"]["precision"] == precision
        assert matcher.dtype == getattr(torch, precision)
    a, b = matcher.encode(data(texture(96, 128))), matcher.encode(data(texture(96, 128)[8:, 16:]))
    rough, exact = (
        {tuple(row) for row in made[precision].match(a, b).indices.tolist()}
        for precision in ("bfloat16", "float32")
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert load(precision="float32").dtype == torch.float32
    assert len(rough & exact) >= 0.9 * len(exact) > 9


def test_without_weights_the_message_says_what_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    with pytest.raises(WeightsError, match=r"gim_lightglue_100h\.ckpt"):
        load()


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


def test_superglue_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"gim-hloc\[transformers\].*superglue_indoor"):
        registry.load("superglue_indoor", device="cpu")


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@needs_transformers
def test_superglue_from_a_file_of_transformers(folder: Path, tmp_path: Path) -> None:
    """The file as the package writes it: what the published one was made with."""
    from gim_hloc.matchers import superglue

    torch.manual_seed(0)
    network = superglue.make_network(superglue.SuperGlueOptions())
    network.save_pretrained(tmp_path)
    path = folder / "superglue_outdoor.safetensors"
    (tmp_path / "model.safetensors").rename(path)
    options = {"detection_threshold": 0.0, "filter_threshold": 1e-9}
    matcher = load("superglue_outdoor", **options)
    a, b = (matcher.encode(data(texture(96, 128, seed), str(seed))) for seed in (0, 1))
    assert len(matcher.match(a, b)) > 5
    assert matcher.weights_hashes.keys() == {path.name}
    verdict = weight_checks.verify(path)
    assert verdict.good is True, verdict.detail
    assert "SuperGlue" in verdict.detail
    path.write_bytes(path.read_bytes()[:-1000])
    assert weight_checks.verify(path).good is False
    with pytest.raises(WeightsError, match=f"{path.name}.*cut off"):
        load("superglue_outdoor", **options)
    path.unlink()


@needs_transformers
def test_superglue_through_transformers() -> None:
    from gim_hloc.matchers import superglue

    options = superglue.SuperGlueOptions(detection_threshold=0.0, filter_threshold=1e-9)
    torch.manual_seed(0)
    network = superglue.make_network(options)
    matcher = superglue.SuperGlueMatcher(
        "superglue_outdoor", options=options, device=torch.device("cpu"), network=network
    )
    a = matcher.encode(data(texture(96, 128)))
    b = matcher.encode(data(texture(88, 120, 1), "b"))
    assert len(a) != len(b)
    assert len(a) > 20
    found = matcher.match(a, b)  # of unequal numbers of keypoints
    assert found.keypoints0.shape == (len(found), 2)
    same = matcher.match(a, a)
    assert len(same) > 5
    assert torch.equal(same.keypoints0, same.keypoints1)
    nothing = matcher.encode(data(np.zeros((8, 8), np.float32)))
    assert len(matcher.match(a, nothing)) == 0
