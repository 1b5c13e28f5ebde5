"""The engine: every item once, whatever the number of threads; memory that runs out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_matcher import FakeMatcher, Options, register, write_images
from synthetic import make_scene

from gim_hloc import engine, images
from gim_hloc.schedule import encoding_bytes
from gim_hloc.types import Encoding, Matches, SparseEncoding

register()


@pytest.mark.parametrize("workers", [1, 4])
def test_every_item_is_done_once(workers: int) -> None:
    seen: dict[int, int] = {}
    before = torch.get_num_threads()
    for i, square in engine.in_threads(
        lambda i: i * i, range(50), workers=workers, inner_threads=1
    ):
        assert i not in seen
        seen[i] = square
    assert seen == {i: i * i for i in range(50)}
    assert torch.get_num_threads() == before


def test_items_are_not_taken_far_ahead() -> None:
    taken: list[int] = []
    finished: list[int] = []

    def items():
        for i in range(40):
            taken.append(i)
            assert len(taken) - len(finished) <= 2 * 3
            yield i

    for i, _ in engine.in_threads(lambda i: i, items(), workers=3):
        finished.append(i)
    assert sorted(finished) == list(range(40))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_stops_the_rest(workers: int) -> None:
    done: list[int] = []

    def work(i: int) -> int:
        if i == 5:
            raise ValueError("five")
        return i

    with pytest.raises(ValueError, match="five"):
        done.extend(i for i, _ in engine.in_threads(work, range(1000), workers=workers))
    assert len(done) < 50


@pytest.mark.parametrize("workers", [1, 3])
def test_images_are_encoded_once_each(tmp_path: Path, workers: int) -> None:
    scene = make_scene(images=5, points=50)
    found = images.scan(write_images(tmp_path, scene))
    matcher = FakeMatcher(Options())
    FakeMatcher.calls.clear()
    encodings = dict(
        engine.encode(
            matcher,
            found.names,
            lambda name: images.load(found[name], matcher.image_options),
            workers=workers,
        )
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
    return SparseEncoding.make(
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
    matcher = LittleMemory(Options())
    found = dict(
        engine.match(
            matcher, pairs, encoding, matcher.match_batch, encode=lambda one: one, batch_size=8
        )
    )
    assert sorted(found) == pairs
    assert LittleMemory.batches == [2, 2, 2, 1]
    assert all(len(matches) == 20 for matches in found.values())
    assert "2 pairs a batch" in caplog.text


def test_size_counts_what_matchers_add() -> None:
    value = encoding("x")
    before = encoding_bytes(value)
    value.cache["start"] = (torch.zeros(100), [torch.zeros(10, dtype=torch.float16)])
    assert encoding_bytes(value) == before + 420
