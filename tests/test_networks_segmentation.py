"""The segmentation network, and the masks that are written from it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import filled
from PIL import Image

from gim_hloc.errors import InputError, WeightsError
from gim_hloc.images import scan
from gim_hloc.masks import MaskFolder, exclusion_masks, load_segmentation, load_segmentation_state
from gim_hloc.networks import segmentation
from gim_hloc.networks.segmentation import CLASSES, Segmentation


@functools.cache
def published(part: str) -> dict[str, torch.Tensor]:
    """A made-up file of the published pair, with what its training library left in it."""
    module = getattr(Segmentation(), part)
    keys: dict[str, list[object]] = {}
    for key, value in module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        keys[key] = [list(value.shape), "float32"]
        if key.endswith("running_var"):
            stem = key.removesuffix("running_var")
            keys |= {f"{stem}_tmp_running_{x}": keys[key] for x in ("mean", "var")}
            keys[f"{stem}_running_iter"] = [[1], "float32"]
    return filled.fill_state_dict(f"semseg_{part}", keys)


@functools.lru_cache(maxsize=1)
def network() -> Segmentation:
    model = Segmentation()
    for part in ("encoder", "decoder"):
        load_segmentation_state(getattr(model, part), published(part), path=part)
    return model.eval().requires_grad_(False)


def test_files_load_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    for part in ("encoder", "decoder"):
        torch.save(published(part), tmp_path / f"{part}_epoch_20.pth")
    model = load_segmentation("cpu")
    assert not model.training
    states = [net.state_dict()["decoder.conv_last.4.bias"] for net in (model, network())]
    assert torch.equal(states[0], states[1])
    wrong = dict(published("decoder"))
    del wrong["ppm.2.1.weight"]
    torch.save(wrong, tmp_path / "decoder_epoch_20.pth")
    with pytest.raises(WeightsError, match=r"ppm\.2\.1\.weight"):
        load_segmentation("cpu")


def test_without_weights_the_message_says_what_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(WeightsError, match=r"encoder_epoch_20\.pth"):
        exclusion_masks([], tmp_path / "masks")


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        ((240, 184), 168, (168, 128)),  # 128.8 is cut off
        ((184, 240), 168, (128, 168)),
        ((1920, 1080), 1920, (1920, 1080)),
        ((100, 4000), 1920, (48, 1920)),
        ((2, 4000), 100, (1, 100)),
    ],
)
def test_reduced_size(size: tuple[int, int], limit: int, expected: tuple[int, int]) -> None:
    assert segmentation.reduced_size(*size, limit) == expected


@pytest.mark.parametrize("size", [(40, 56), (37, 61), (5, 7), (300, 11)])
def test_labels_in_blocks_are_those_of_the_whole(size: tuple[int, int]) -> None:
    logits = torch.randn(150, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    best = whole.softmax(0).topk(2, 0)
    clear = best.values[0] - best.values[1] > 1e-5
    for rows in (1, 7, 64):
        found = segmentation.labels(logits, size, rows=rows)
        assert found.dtype == torch.uint8
        assert torch.equal(found[clear].long(), best.indices[0][clear])
    assert clear.float().mean() > 0.99


def test_segment() -> None:
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    labels = network().segment(image)
    assert labels.shape == (50, 70)
    assert labels.dtype == np.uint8
    assert labels.max() < 150
    assert network().segment(image, max_size=35).shape == (25, 35)


class Painted:
    """Stands for the network: the red channel of the image is the label."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def segment(self, image: np.ndarray, *, max_size: int) -> np.ndarray:
        self.shapes.append(image.shape)
        labels: np.ndarray = image[..., 0][::2, ::2]  # at half the size, as a reduced one
        return labels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Upright: sky above, wall below, a person on the right; one file is stored turned."""
    root = tmp_path / "images"
    (root / "cam 0").mkdir(parents=True)
    labels = np.zeros((80, 120), np.uint8)
    labels[:20] = CLASSES["sky"]
    labels[20:, 80:] = CLASSES["person"]
    rgb = np.stack([labels, np.random.default_rng(0).integers(0, 255, labels.shape)], 2)
    rgb = np.concatenate([rgb, rgb[..., 1:]], 2).astype(np.uint8)
    Image.fromarray(rgb).save(root / "cam 0" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    stored = np.rot90(rgb).copy()
    stored[0, 0] = 1  # other bytes
    Image.fromarray(stored).save(root / "turned.png", exif=exif)
    return root


def test_masks_leave_out_the_right_classes(photos: Path, tmp_path: Path) -> None:
    model = Painted()
    images = scan(photos)
    out = tmp_path / "masks"
    paths = exclusion_masks(images, out, ("person", "sky"), network=model)
    assert paths == [out / "cam 0" / "a.png.png", out / "turned.png.png"]
    assert model.shapes == [(80, 120, 3)] * 2  # the network sees them upright
    folder = MaskFolder(out, erode_px=0)
    assert not folder.check(images.names)
    expected = np.ones((80, 120), bool)
    expected[:20] = False
    expected[20:, 80:] = False
    keep = folder.load(images["cam 0/a.png"])
    assert keep is not None
    assert np.array_equal(keep, expected)
    turned = folder.load(images["turned.png"])
    assert turned is not None
    assert turned.shape == (120, 80)  # as stored
    assert np.array_equal(turned[1:, 1:], np.rot90(expected)[1:, 1:])
    only_sky = exclusion_masks([images["cam 0/a.png"]], tmp_path / "sky", ("sky",), network=model)
    keep = np.asarray(Image.open(only_sky[0])) > 0
    assert keep[20:].all()
    assert not keep[:20].any()


def test_unknown_classes_are_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No class named dog; choose from wall, sky"):
        exclusion_masks(scan(photos), tmp_path, ("sky", "dog"), network=Painted())
    with pytest.raises(InputError, match="none given"):
        exclusion_masks(scan(photos), tmp_path, (), network=Painted())


def test_command_writes_the_masks_that_are_missing(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gim_hloc import masks
    from gim_hloc.cli.masks import main

    model = Painted()
    monkeypatch.setattr(masks, "load_segmentation", lambda device: model)
    out = tmp_path / "masks"
    assert main([str(photos), str(out), "--classes", "person", "sky"]) == 0
    assert "2 masks written" in capsys.readouterr().out
    (out / "turned.png.png").unlink()
    assert main([str(photos), str(out), "--classes", "person", "sky"]) == 0
    assert len(model.shapes) == 3
    assert "1 masks written" in capsys.readouterr().out
    assert not MaskFolder(out).check(scan(photos).names)
    assert main([str(photos), str(tmp_path / "other"), "--classes", "dog"]) == 2
    assert "No class named dog" in capsys.readouterr().err
