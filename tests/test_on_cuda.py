"""The paths that only a GPU takes, on a pretended one (see ``fake_cuda``)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda

from gim_hloc import engine
from gim_hloc.matchers.base import Encoding
from gim_hloc.schedule import Budget, EncodingPool, memory_budget, order_pairs

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

    def halve(self) -> bool:
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
        report = engine.match_scheduled(
            matcher,
            pairs,
            lambda name: name,
            matcher.match,
            results.__setitem__,
            batch_size=4,
            cache_gb=4e-5,
        )
        assert gpu.allocated() == 0
    assert results == right(pairs)
    assert (report.batch_size, matcher.scale) == (batch_size, halved)
    assert len(gpu.held) == len(report.notes)
    assert not any(gpu.held)


def test_batches_of_matches_are_halved_without_what_failed() -> None:
    matcher, pairs = Matcher(), pairs_of(4)
    matcher.match_batch = matcher.match  # type: ignore[attr-defined]
    results: dict[tuple[str, str], float] = {}
    with FakeCuda(70_000) as gpu:
        held = {name: matcher.encode(name) for name in ("000", "001", "002", "003")}
        gpu.events.clear()
        engine.match_pairs(matcher, pairs, held.__getitem__, results.__setitem__, batch_size=6)
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
