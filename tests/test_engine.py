"""The engine: every item once, whatever the number of threads; memory that runs out."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_matcher import FakeMatcher, Options, register, write_images
from synthetic import make_scene

from gim_hloc import engine, images
from gim_hloc.matchers.base import Encoding, Matches
from gim_hloc.matchers.sparse import make_encoding
from gim_hloc.schedule import encoding_bytes

register()


@pytest.mark.parametrize("workers", [1, 4])
def test_every_item_is_done_once(workers: int) -> None:
    seen: dict[int, int] = {}
    before = torch.get_num_threads()
    engine.run_threads(
        lambda i: i * i, range(50), workers=workers, done=seen.__setitem__, inner_threads=1
    )
    assert seen == {i: i * i for i in range(50)}
    assert torch.get_num_threads() == before


def test_results_are_taken_in_the_calling_thread() -> None:
    threads: set[int] = set()
    engine.run_threads(str, range(9), workers=3, done=lambda *_: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def test_items_are_not_taken_far_ahead() -> None:
    taken: list[int] = []
    finished: list[int] = []

    def items():
        for i in range(40):
            taken.append(i)
            assert len(taken) - len(finished) <= 2 * 3
            yield i

    engine.run_threads(lambda i: i, items(), workers=3, done=lambda i, _: finished.append(i))
    assert sorted(finished) == list(range(40))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_stops_the_rest(workers: int) -> None:
    done: list[int] = []

    def work(i: int) -> int:
        if i == 5:
            raise ValueError("five")
        return i

    with pytest.raises(ValueError, match="five"):
        engine.run_threads(work, range(1000), workers=workers, done=lambda i, _: done.append(i))
    assert len(done) < 50


@pytest.mark.parametrize("workers", [1, 3])
def test_images_are_encoded_once_each(tmp_path: Path, workers: int) -> None:
    scene = make_scene(images=5, points=50)
    found = images.scan(write_images(tmp_path, scene))
    matcher = FakeMatcher(Options())
    FakeMatcher.calls.clear()
    encodings: dict[str, Encoding] = {}
    engine.encode_images(
        matcher,
        found.names,
        lambda name: images.load(found[name], matcher.image_options),
        encodings.__setitem__,
        workers=workers,
    )
    assert sorted(FakeMatcher.calls) == found.names
    assert sorted(encodings) == found.names


class LittleMemory(FakeMatcher):
    """Fails on more than two pairs at once, as a small GPU would."""

    batches: list[int] = []  # noqa: RUF012 - shared on purpose

    def match_batch(self, pairs) -> list[Matches]:
        if len(pairs) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        self.batches.append(len(pairs))
        return super().match_batch(pairs)


def encoding(name: str, points: int = 20) -> Encoding:
    return make_encoding(
        name=name,
        size=(10, 10),
        network_size=(10, 10),
        to_original=np.eye(2, 3),
        keypoints=torch.rand(points, 2),
        descriptors=torch.arange(points)[:, None].float().expand(-1, 16),
        scores=torch.ones(points),
    )


def test_batches_are_halved_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d"), ("d", "e")]
    found: dict[tuple[str, str], Matches] = {}
    matcher = LittleMemory(Options())
    engine.match_pairs(matcher, pairs, encoding, found.__setitem__, batch_size=8)
    assert list(found) == pairs
    assert LittleMemory.batches == [2, 2, 2, 1]
    assert all(len(matches) == 20 for matches in found.values())
    assert "2 pairs a batch" in caplog.text


def test_cache_stays_within_its_budget() -> None:
    reads: list[str] = []

    def read(name: str) -> Encoding:
        reads.append(name)
        return encoding(name)

    size = encoding_bytes(encoding("x"))
    cache = engine.EncodingCache(read, budget=4 * size)
    names = [f"{i}" for i in range(64)]
    for name in names:
        assert cache.get(name).name == name
    assert cache.get("63") is cache.get("63")
    assert len(reads) == 64
    assert cache._bytes() <= (4 + 16) * size  # sizes are summed every 16 reads
    cache.get("0")  # went long ago
    assert reads[-1] == "0"


def test_size_counts_what_matchers_add() -> None:
    value = encoding("x")
    before = encoding_bytes(value)
    value.cache["start"] = (torch.zeros(100), [torch.zeros(10, dtype=torch.float16)])
    assert encoding_bytes(value) == before + 420
