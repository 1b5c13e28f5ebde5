"""Encode once per image: order of pairs, memory for encodings, and what to do without memory."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc import engine, schedule
from gim_hloc.schedule import (
    Budget,
    EncodingPool,
    encoding_bytes,
    loads,
    move_encoding,
    order_pairs,
)
from gim_hloc.types import Encoding

BYTES = 4000  # of one encoding


def names(count: int) -> list[str]:
    return [f"{i:03d}" for i in range(count)]


def exhaustive(count: int) -> list[tuple[str, str]]:
    return list(itertools.combinations(names(count), 2))


def sequence(count: int, window: int) -> list[tuple[str, str]]:
    return [
        (a, b) for i, a in enumerate(names(count)) for b in names(count)[i + 1 : i + 1 + window]
    ]


@dataclass(kw_only=True)
class Held(Encoding):
    features: dict[str, torch.Tensor]


class Matcher:
    """Counts what it encodes; may run out of memory."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.halved = 0
        self.mutex = threading.Lock()

    def encode(self, name: str) -> Held:
        with self.mutex:
            self.encoded.append(name)
        return Held(
            name=name,
            size=(1, 1),
            network_size=(1, 1),
            to_original=np.eye(2, 3),
            features={"x": torch.full((BYTES // 4,), float(int(name)))},
        )

    def smaller(self) -> bool:
        self.halved += 1
        return self.halved < 3


def sums(pairs: list[tuple[Held, Held]]) -> list[float]:
    return [float(a.features["x"][0] * 1000 + b.features["x"][0]) for a, b in pairs]


def run(matcher: Matcher, pairs: list[tuple[str, str]], work=sums, **kwargs):
    results: dict[tuple[str, str], float] = {}

    report = engine.ScheduleReport()
    for pair, value in engine.match(
        matcher, pairs, lambda name: name, work, report=report, **kwargs
    ):
        assert pair not in results, "a pair came twice"
        results[pair] = value
    return results, report


def right(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    return {(a, b): int(a) * 1000 + int(b) for a, b in pairs}


def test_each_image_is_encoded_once_when_all_fit():
    pairs = exhaustive(12)
    matcher = Matcher()
    results, report = run(matcher, pairs, cache_gb=12 * BYTES / 1e9)
    assert results == right(pairs)
    assert Counter(matcher.encoded) == Counter(names(12))
    assert sorted(report.encoded) == names(12)


@pytest.mark.parametrize(("count", "capacity"), [(12, 4), (24, 6), (40, 10), (60, 20)])
def test_beyond_the_budget_encodings_stay_near_the_optimum(count: int, capacity: int):
    pairs = exhaustive(count)
    matcher = Matcher()
    results, report = run(matcher, pairs, cache_gb=capacity * BYTES / 1e9)
    assert results == right(pairs)
    assert report.capacity == capacity
    # The first `capacity` images serve all pairs among them; each later one at most capacity - 1.
    bound = capacity + (len(pairs) - capacity * (capacity - 1) / 2) / (capacity - 1)
    assert len(matcher.encoded) <= 1.27 * bound
    # What hloc and the reference do: both images of every pair.
    assert len(matcher.encoded) < len(pairs)


@pytest.mark.parametrize(("window", "capacity"), [(5, 6), (5, 8), (10, 20)])
def test_a_sequence_is_encoded_once_with_room_for_its_window(window: int, capacity: int):
    pairs = sequence(100, window)
    assert sorted(loads(order_pairs(pairs, capacity), capacity)) == names(100)


@given(
    st.lists(
        st.tuples(st.integers(0, 15), st.integers(0, 15)).filter(lambda p: p[0] != p[1]),
        max_size=60,
        unique_by=lambda p: (min(p), max(p)),
    ),
    st.integers(2, 8),
)
@settings(deadline=None, max_examples=60)
def test_any_pair_list_keeps_its_pairs_and_directions(numbers, capacity):
    pairs = [(f"{a:03d}", f"{b:03d}") for a, b in numbers]
    order = order_pairs(pairs, capacity)
    assert sorted(order) == sorted(pairs)
    results, _ = run(Matcher(), pairs, cache_gb=capacity * BYTES / 1e9)
    assert results == right(pairs)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_threads_and_batches_change_nothing(workers: int, batch: int):
    pairs = exhaustive(10)
    matcher = Matcher()

    def slow(encodings):
        time.sleep(0.001)
        return sums(encodings)

    results, _ = run(matcher, pairs, slow, cache_gb=1.0, workers=workers, batch_size=batch)
    assert results == right(pairs)
    assert Counter(matcher.encoded) == Counter(names(10))


def test_the_pool_never_holds_more_than_its_budget_and_the_pairs_in_work():
    pairs = order_pairs(exhaustive(10), 4)
    matcher = Matcher()
    budget = Budget(device=3 * BYTES, host=2 * BYTES)
    most = [0, 0]
    with EncodingPool(lambda n: n, matcher.encode, pairs, budget, matcher.device) as pool:
        for position, pair in enumerate(pairs):
            encodings = pool.acquire([pair], position)
            assert sums(encodings) == [right([pair])[pair]]
            most[0] = max(most[0], len(pool._held))
            most[1] = max(most[1], len(pool._hosted))
            pool.release([pair])
    assert most[0] <= 3
    assert most[1] == 2  # what leaves the device waits on the host
    without = len(loads(pairs, 3))
    assert len(pool.encoded) < without


def test_out_of_memory_halves_the_batch_then_the_resolution(caplog):
    pairs = exhaustive(6)
    matcher = Matcher()
    sizes = []

    def work(encodings):
        sizes.append(len(encodings))
        if len(encodings) > 2 or (len(sizes) > 6 and matcher.halved < 1):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return sums(encodings)

    results, report = run(matcher, pairs, work, cache_gb=1.0, batch_size=8)
    assert results == right(pairs)
    assert report.batch_size == 1
    assert matcher.halved == 1
    assert [note for note in report.notes if "resolution was halved" in note]
    assert "4 pairs a batch" in caplog.text


def test_out_of_memory_at_the_lowest_resolution_is_an_error():
    def work(encodings):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 byte")

    with pytest.raises(RuntimeError, match="allocate"):
        run(Matcher(), exhaustive(3), work, cache_gb=1.0)


def test_other_errors_pass_and_nothing_done_is_lost():
    pairs = exhaustive(5)
    seen = []

    def work(encodings):
        if len(seen) == 4:
            raise ValueError("broken")
        return sums(encodings)

    results = engine.match(Matcher(), pairs, lambda n: n, work, cache_gb=1.0)
    with pytest.raises(ValueError, match="broken"):
        seen.extend(pair for pair, _ in results)
    assert len(seen) == 4


def test_moving_an_encoding_keeps_everything():
    encoding = Matcher().encode("007")
    moved = move_encoding(encoding, torch.device("cpu"))
    assert isinstance(moved, Held)
    assert moved.name == "007"
    assert torch.equal(moved.features["x"], encoding.features["x"])
    assert encoding_bytes(moved) == BYTES


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_containers_and_batch_systems_count(version: int, tmp_path: Path) -> None:
    base = tmp_path / "memory" if version == 1 else tmp_path
    limit, used, cache = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    none = str((1 << 63) - 4096) if version == 1 else "max"
    job = base / "slurm/job_7/step_0"
    job.mkdir(parents=True)
    for folder, most in ((job, none), (job.parent, "8000000000"), (job.parent.parent, none)):
        (folder / limit).write_text(most + "\n")
        (folder / used).write_text("3000000000\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} 1000000000\n")
    own = tmp_path / "own"
    own.write_text(f"4:cpu:/x\n{'9:memory' if version == 1 else '0:'}:/slurm/job_7/step_0\n")
    assert min(schedule._free_in_control_groups(tmp_path, own)) == 6_000_000_000
    # In a container the path is the host's, and its own limit lies at the mount's root.
    for name in (limit, used, "memory.stat"):
        (base / name).write_bytes((job.parent / name).read_bytes())
    own.write_text(f"{'9:memory' if version == 1 else '0:'}:/docker/0123\n")
    assert min(schedule._free_in_control_groups(tmp_path, own)) == 6_000_000_000
    assert min(schedule._free_in_control_groups(tmp_path, tmp_path / "none")) == 1 << 62
    assert 0 < schedule._free_host_bytes() < 1 << 50
