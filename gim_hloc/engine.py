"""Runs matchers over images and pairs: threads, prefetching, batches, progress.

Pairs are the unit of work. Results are handed to a callback as soon as they exist, in whatever
order they finish; each result depends on its own pair only, so order and number of workers never
change a number.

On a processor, small networks gain little from threads inside one operator: two pairs on one
thread each finish sooner than one pair after the other on two. ``workers`` threads therefore run
the network side by side, each with ``cores // workers`` threads inside (PyTorch releases the GIL).
On a GPU one thread feeds batches while another decodes images.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from gim_hloc.matchers.base import Encoding, ImageData, Matcher, Matches

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # type: ignore[attr-defined,unused-ignore]
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def default_workers(device: torch.device, deterministic: bool) -> int:
    """Network threads side by side: one on a GPU or when asked for one thread, else a few."""
    if deterministic or device.type != "cpu":
        return 1
    return max(1, min(4, usable_cores()))


class EncodingCache:
    """Least recently used encodings in memory, read back from the store when they went.

    Args:
        read: name -> encoding.
        budget: bytes of keypoints and descriptors (and what matchers derive from them) to hold.
    """

    def __init__(self, read: Callable[[str], Encoding], budget: int = 2 << 30) -> None:
        self._read = read
        self._budget = budget
        self._held: OrderedDict[str, Encoding] = OrderedDict()
        self._mutex = threading.Lock()
        self.reads = 0

    def get(self, name: str) -> Encoding:
        """The encoding of one image."""
        with self._mutex:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        encoding = self._read(name)
        with self._mutex:
            self.reads += 1
            self._held[name] = encoding
            # Matchers add to encodings later, so sizes are summed anew; not for every image.
            if self.reads % 16 == 0:
                while len(self._held) > 2 and self._bytes() > self._budget:
                    self._held.popitem(last=False)
        return encoding

    def _bytes(self) -> int:
        return sum(encoding_bytes(e) for e in self._held.values())


def encoding_bytes(value: Any) -> int:
    """Bytes of the tensors that an encoding holds, what matchers cached in it included."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(encoding_bytes(v) for v in value.values())
    if isinstance(value, (tuple, list)):
        return sum(encoding_bytes(v) for v in value)
    if isinstance(value, Encoding):
        return sum(encoding_bytes(v) for v in vars(value).values())
    return 0


def run_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    done: Callable[[Item, Result], None],
    inner_threads: int | None = None,
) -> None:
    """Run ``work`` on items in threads; ``done`` is called in this thread, in finishing order.

    No more than ``2 * workers`` items are taken ahead. The first error stops the rest and is
    raised.

    Args:
        work: called in a worker thread.
        items: taken one by one.
        workers: threads; with 1 everything runs in this thread, in order.
        done: called with each item and its result.
        inner_threads: threads inside each PyTorch operator of a worker.
    """
    if workers <= 1:
        for item in items:
            done(item, work(item))
        return

    def start() -> None:
        if inner_threads is not None:
            torch.set_num_threads(inner_threads)  # of this thread only, with OpenMP

    before = torch.get_num_threads()
    iterator = iter(items)
    running: dict[Future[Result], Item] = {}
    pool = ThreadPoolExecutor(max_workers=workers, initializer=start)
    try:
        while True:
            while len(running) < 2 * workers:
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                running[pool.submit(work, item)] = item
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done(running.pop(future), future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def encode_images(
    matcher: Matcher,
    names: Sequence[str],
    read: Callable[[str], ImageData],
    done: Callable[[str, Encoding], None],
    *,
    workers: int = 1,
) -> None:
    """Encode each image once.

    Args:
        matcher: what encodes.
        names: images.
        read: name -> image as the matcher wants it; runs ahead of the network.
        done: called in this thread with each encoding.
        workers: see ``run_threads``.
    """
    cores = usable_cores()
    if workers > 1:
        run_threads(
            lambda name: matcher.encode(read(name)),
            names,
            workers=workers,
            done=done,
            inner_threads=max(1, cores // workers),
        )
        return
    # One network thread: decode the next images while it works.
    with ThreadPoolExecutor(max_workers=2) as pool:
        ahead: list[tuple[str, Future[ImageData]]] = []
        remaining = iter(names)
        for name in remaining:
            ahead.append((name, pool.submit(read, name)))
            if len(ahead) >= 3:
                _encode_next(matcher, ahead, done)
        while ahead:
            _encode_next(matcher, ahead, done)


def _encode_next(
    matcher: Matcher,
    ahead: list[tuple[str, Future[ImageData]]],
    done: Callable[[str, Encoding], None],
) -> None:
    name, future = ahead.pop(0)
    done(name, matcher.encode(future.result()))


def match_pairs(
    matcher: Matcher,
    pairs: Sequence[Pair],
    get: Callable[[str], Encoding],
    done: Callable[[Pair, Matches], None],
    *,
    workers: int = 1,
    batch_size: int = 1,
) -> None:
    """Match each pair once.

    Args:
        matcher: what matches.
        pairs: name pairs.
        get: name -> encoding.
        done: called in this thread with each pair and its matches.
        workers: see ``run_threads``.
        batch_size: pairs a network call (GPU); halved when memory runs out.
    """
    if batch_size <= 1:
        run_threads(
            lambda pair: matcher.match(get(pair[0]), get(pair[1])),
            pairs,
            workers=workers,
            done=done,
            inner_threads=max(1, usable_cores() // workers),
        )
        return
    start = 0
    while start < len(pairs):
        chunk = pairs[start : start + batch_size]
        try:
            results = matcher.match_batch([(get(a), get(b)) for a, b in chunk])
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
            torch.cuda.empty_cache()
            batch_size = max(1, batch_size // 2)
            logger.warning("GPU memory ran out: %d pairs a batch from here on.", batch_size)
            continue
        for pair, result in zip(chunk, results, strict=True):
            done(pair, result)
        start += len(chunk)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed wall time in seconds."""
        return time.perf_counter() - self._start
