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

import gc
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from gim_hloc.schedule import EncodingPool, encoding_bytes, memory_budget, order_pairs
from gim_hloc.types import E, Encoding, ImageData, Matcher
from gim_hloc.workers import usable_cores

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers(device: torch.device, deterministic: bool) -> int:
    """Network threads side by side: one on a GPU or when asked for one thread, else a few."""
    if deterministic or device.type != "cpu":
        return 1
    return max(1, min(4, usable_cores()))


def in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    inner_threads: int | None = None,
    ahead: int | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Run ``work`` on items in threads and yield each item with its result, in finishing order.

    No more than ``ahead`` items are taken (twice the workers by default). The first error stops
    the rest and is raised.

    Args:
        work: called in a worker thread.
        items: taken one by one.
        workers: threads; with 1 everything runs in this thread, in order.
        inner_threads: threads inside each PyTorch operator of a worker.
        ahead: items in work or waiting at a time.
    """
    if workers <= 1:
        for item in items:
            yield item, work(item)
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
            for item in itertools.islice(iterator, (ahead or 2 * workers) - len(running)):
                running[pool.submit(work, item)] = item
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def encode(
    matcher: Matcher[E],
    names: Sequence[str],
    read: Callable[[str], ImageData],
    *,
    workers: int = 1,
) -> Iterator[tuple[str, E]]:
    """Encode each image once; yields names with their encodings.

    Args:
        matcher: what encodes.
        names: images.
        read: name -> image as the matcher wants it; runs ahead of the network.
        workers: see ``in_threads``.
    """
    if workers > 1:
        yield from in_threads(
            lambda name: matcher.encode(read(name)),
            names,
            workers=workers,
            inner_threads=max(1, usable_cores() // workers),
        )
        return
    # One network thread: decode the next images while it works.
    with ThreadPoolExecutor(max_workers=2) as pool:
        ahead: deque[tuple[str, Future[ImageData]]] = deque()
        left = iter(names)
        while True:
            for name in itertools.islice(left, 3 - len(ahead)):
                ahead.append((name, pool.submit(read, name)))
            if not ahead:
                return
            name, image = ahead.popleft()
            yield name, matcher.encode(image.result())


@dataclass(kw_only=True)
class ScheduleReport:
    """How a scheduled run went.

    Attributes:
        encoded: images in the order in which they were encoded; twice where memory was short.
        capacity: encodings that fit in the budget at once.
        batch_size: pairs a network call at the end, after halving for lack of memory.
        notes: sentences for the user, e.g. that the resolution was halved.
    """

    encoded: list[str] = field(default_factory=list)
    capacity: int = 0
    batch_size: int = 1
    notes: list[str] = field(default_factory=list)


class Encoder(Protocol):
    """What matching needs of a matcher."""

    device: torch.device

    def encode(self, image: Any) -> Any:
        """What depends on one image only."""
        ...

    def smaller(self) -> bool:
        """Make do with less memory from here on, if that is possible."""
        ...


def match(
    matcher: Encoder,
    pairs: Sequence[Pair],
    read: Callable[[str], Any],
    work: Callable[[list[tuple[Any, Any]]], Sequence[Result]],
    *,
    encode: Callable[[Any], Encoding] | None = None,
    device: torch.device | None = None,
    cache_gb: float | None = None,
    batch_size: int = 1,
    workers: int = 1,
    report: ScheduleReport | None = None,
) -> Iterator[tuple[Pair, Result]]:
    """Match each pair once; yields pairs with what ``work`` gave, in finishing order.

    Encodings are made, or read back, when a pair needs them, and the order of the pairs is chosen
    such that this happens once per image while the budget allows it. When memory runs out, the
    batch is halved, then the matcher's resolution (``matcher.smaller()``), and the log says so.

    Args:
        matcher: what encodes.
        pairs: name pairs, each once.
        read: name -> image as the matcher wants it, or what was stored; called ahead, in threads.
        work: encodings of some pairs -> one result per pair.
        encode: what ``read`` gave -> encoding; by default the matcher's own.
        device: where encodings are held; by default the matcher's.
        cache_gb: memory for encodings, 10^9 bytes; ``None`` chooses (see ``memory_budget``).
        batch_size: pairs that ``work`` gets at once.
        workers: threads that run ``work`` side by side (processor only).
        report: filled in.
    """
    report = report or ScheduleReport()
    report.batch_size = batch_size
    left = list(pairs)
    while left:
        try:
            yield from _run_schedule(
                encode or matcher.encode, device or matcher.device,
                left, read, work, cache_gb, workers, report,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:  # torch raises several classes
            if not is_out_of_memory(error):
                raise
            if report.batch_size > 1:
                report.batch_size //= 2
                note = f"Memory ran out: {report.batch_size} pairs a batch from here on."
            elif workers > 1:
                workers = 1
                note = "Memory ran out: one pair at a time from here on."
            elif matcher.smaller():
                note = (
                    "Memory ran out: the matcher's resolution was halved for the pairs from here "
                    "on. Choose --quality fast, or a smaller size, to match all of them alike."
                )
            else:
                raise
            logger.warning("%s", note)
            report.notes.append(note)
        else:
            continue
        release_memory(matcher.device)


# Words of errors that are no OutOfMemoryError: CUDA's own (for pinned memory and contexts), those
# of its libraries (CUBLAS_STATUS_ALLOC_FAILED, ...), and those of main memory.
_NO_MEMORY = ("out of memory", "_ALLOC_FAILED", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device or main memory ran out."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def is_of_the_device(error: BaseException) -> bool:
    """Whether an error is no fault of the image or pair in work, and others would fail likewise.

    Memory ran out, or CUDA reported an error: most of these last until the process ends.
    """
    return is_out_of_memory(error) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def release_memory(device: torch.device) -> None:
    """Free what an error held; to be called when the ``except`` block is left.

    An error holds the frames that it passed, and these the tensors of the work that failed. Futures
    that hold the error in turn make a circle of it, which only the collector opens.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _run_schedule(
    encode: Callable[[Any], Encoding],
    device: torch.device,
    left: list[Pair],
    read: Callable[[str], Any],
    work: Callable[[list[tuple[Any, Any]]], Sequence[Result]],
    cache_gb: float | None,
    workers: int,
    report: ScheduleReport,
) -> Iterator[tuple[Pair, Result]]:
    """Match ``left``; pairs that are done are taken out of it."""
    budget = memory_budget(device, cache_gb)
    first = left[0][0]
    encoding = encode(read(first))
    size = max(1, encoding_bytes(encoding))
    # Every worker needs two encodings whatever the budget says.
    report.capacity = max(2 * workers, report.batch_size + 1, int(budget.total // size))
    order = order_pairs(left, report.capacity)
    batches = [
        (start, order[start : start + report.batch_size])
        for start in range(0, len(order), report.batch_size)
    ]

    def run(batch: tuple[int, list[Pair]]) -> Sequence[Result]:
        start, chunk = batch
        encodings = pool.acquire(chunk, start)
        try:
            return work(encodings)
        finally:
            pool.release(chunk)

    matched: set[Pair] = set()
    with EncodingPool(read, encode, order, budget, device) as pool:
        pool.put(first, encoding)
        del encoding
        try:
            for (_, chunk), results in in_threads(
                run,
                batches,
                workers=workers,
                inner_threads=max(1, usable_cores() // workers),
                ahead=workers,
            ):
                for pair, result in zip(chunk, results, strict=True):
                    matched.add(pair)
                    yield pair, result
        finally:
            left[:] = [pair for pair in left if pair not in matched]
            report.encoded += pool.encoded
