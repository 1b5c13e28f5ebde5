"""Which pair when, and which encodings to hold: each image is encoded as rarely as memory allows.

A pair needs both its encodings at once, and encodings of dense matchers are too large to hold for
every image or to store. The pairs are therefore put in an order in which few images serve many
pairs, and an encoding that must go is the one whose next pair is farthest away (Belady's rule,
optimal for a known order).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gim_hloc.types import Encoding

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
_NEVER = 1 << 62


def order_pairs(pairs: Sequence[Pair], capacity: int) -> list[Pair]:
    """Put pairs in an order that needs few encodings.

    Two orders are tried and the better one is taken: a sliding one (good for sequences) and one by
    blocks, in which ``capacity - 1`` images stay while every other image that is paired with them
    passes by once (for exhaustive pairs no order does better: an image that comes in can serve at
    most ``capacity - 1`` new pairs).

    Args:
        pairs: name pairs, each at most once.
        capacity: encodings that fit in memory, at least 2.

    Returns:
        The same pairs in another order.
    """
    names = sorted({name for pair in pairs for name in pair})
    index = {name: i for i, name in enumerate(names)}
    sliding = sorted(
        pairs,
        key=lambda p: (max(index[p[0]], index[p[1]]), min(index[p[0]], index[p[1]])),
    )
    if capacity >= len(names):
        return sliding
    blocks = _by_blocks(pairs, names, max(2, capacity))
    return min((blocks, sliding), key=lambda order: len(loads(order, capacity)))


def _by_blocks(pairs: Sequence[Pair], names: Sequence[str], capacity: int) -> list[Pair]:
    left: dict[str, dict[str, Pair]] = {name: {} for name in names}
    for a, b in pairs:
        left[a][b] = left[b][a] = (a, b)
    order: list[Pair] = []

    def take(a: str, b: str) -> None:
        order.append(left[a].pop(b))
        del left[b][a]

    rank = {name: i for i, name in enumerate(names)}
    while True:
        open_names = [name for name in names if left[name]]
        if not open_names:
            return order
        # The block grows by the image that has most pairs with it.
        block: list[str] = []
        ties = dict.fromkeys(open_names, 0)
        while len(block) < capacity - 1 and ties:
            best = max(ties, key=lambda name: (ties[name], -rank[name]))
            if block and ties[best] == 0:
                break
            del ties[best]
            for other in left[best]:
                if other in ties:
                    ties[other] += 1
            for member in block:
                if member in left[best]:
                    take(member, best)
            block.append(best)
        passing = sorted({o for member in block for o in left[member]}, key=rank.__getitem__)
        for other in passing:
            for member in block:
                if member in left[other]:
                    take(member, other)


def loads(order: Sequence[Pair], capacity: int) -> list[str]:
    """Images in the order in which they are encoded when ``capacity`` encodings fit."""
    uses = _Uses(order)
    held: set[str] = set()
    loaded = []
    for position, pair in enumerate(order):
        for name in pair:
            if name not in held:
                if len(held) >= max(2, capacity):
                    held.remove(
                        max(held - set(pair), key=lambda other: uses.following(other, position))
                    )
                held.add(name)
                loaded.append(name)
    return loaded


class _Uses:
    """When each image is needed."""

    def __init__(self, order: Iterable[Pair]) -> None:
        self._positions: dict[str, list[int]] = defaultdict(list)
        for position, pair in enumerate(order):
            for name in pair:
                self._positions[name].append(position)

    def following(self, name: str, position: int) -> int:
        """Position of the first pair after ``position`` that needs the image."""
        positions = self._positions[name]
        i = bisect_right(positions, position)
        return positions[i] if i < len(positions) else _NEVER


def encoding_bytes(value: Any) -> int:
    """Bytes of the tensors that an encoding holds, what matchers cached in it included."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(encoding_bytes(v) for v in value.values())
    if isinstance(value, (tuple, list)):
        return sum(encoding_bytes(v) for v in value)
    if isinstance(value, Encoding):
        return sum(encoding_bytes(v) for v in vars(value).values())
    return 0


def move_encoding(value: Any, device: torch.device) -> Any:
    """The same encoding with its tensors on another device."""
    if isinstance(value, torch.Tensor):
        # Towards main memory it would come in pinned pages, rounded up to powers of two and never
        # given back, and could be read before it is there.
        return value.to(device, non_blocking=device.type != "cpu")
    if isinstance(value, Mapping):
        return {key: move_encoding(v, device) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move_encoding(v, device) for v in value)
    if isinstance(value, Encoding):
        return dataclasses.replace(
            value, **{key: move_encoding(v, device) for key, v in vars(value).items()}
        )
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory for encodings, bytes."""

    device: int  # on the matcher's device
    host: int = 0  # in main memory, for encodings that the device has no room for

    @property
    def total(self) -> int:
        """Both together."""
        return self.device + self.host


def memory_budget(device: torch.device, gigabytes: float | None) -> Budget:
    """Share out the memory for encodings: the device first, then the host.

    Args:
        device: where the networks run.
        gigabytes: in all (10^9 bytes); ``None`` takes half of the free device memory and, if that
            is not main memory, a third of the free main memory.
    """
    if device.type != "cuda":
        share = _free_host_bytes() // 2 if gigabytes is None else int(gigabytes * 1e9)
        return Budget(device=share)
    free, _ = torch.cuda.mem_get_info(device)
    # PyTorch keeps what it freed; the driver counts that as taken.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if gigabytes is None:
        return Budget(device=free // 2, host=_free_host_bytes() // 3)
    on_device = min(int(gigabytes * 1e9), free // 2)
    return Budget(device=on_device, host=int(gigabytes * 1e9) - on_device)


def _free_host_bytes() -> int:
    free = 8 << 30  # unknown system: what a small machine has
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as stream:
        for line in stream:
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min(free, *_free_in_control_groups())


def _free_in_control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Free bytes under each limit on this process: containers and batch systems set them.

    Args:
        root: where control groups are mounted.
        own: file that names the groups of this process, lines of number:controllers:path.
    """
    found = [1 << 62]
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                base, names = root, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                base = root / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            inner = base / path.strip("/")
            for folder in (inner, *inner.parents):
                if folder != base and base not in folder.parents:
                    break
                # Inside a container the path may be the host's: what is missing is passed over.
                with contextlib.suppress(OSError, ValueError):
                    limit, used = (int((folder / name).read_text()) for name in names[:2])
                    statistics = dict(
                        row.split() for row in (folder / "memory.stat").read_text().splitlines()
                    )
                    # Files that are held only because there was room make place when asked to.
                    found.append(max(0, limit - used + int(statistics.get(names[2], 0))))
    return found


class EncodingPool:
    """Encodings made on demand and held within a budget. May be used from several threads.

    Args:
        read: name -> image as the matcher wants it; runs ahead in threads of its own.
        encode: image -> encoding on ``device``.
        order: all pairs in the order in which they will be asked for.
        budget: memory for encodings. Those of the pairs in work are held whatever it says.
        device: where matching wants them.
    """

    def __init__(
        self,
        read: Callable[[str], Any],
        encode: Callable[[Any], Encoding],
        order: Sequence[Pair],
        budget: Budget,
        device: torch.device,
    ) -> None:
        self._read, self._encode = read, encode
        self._order, self._budget, self._device = list(order), budget, device
        self._uses = _Uses(order)
        self._position = -1  # of the last pair that was asked for
        self._held: dict[str, Encoding] = {}
        self._hosted: dict[str, Encoding] = {}
        self._bytes: dict[str, int] = {}
        self._pinned: dict[str, int] = defaultdict(int)
        self._making: dict[str, Future[Encoding]] = {}
        self._ahead: dict[str, Future[Any]] = {}
        self._mutex = threading.Lock()
        self._readers = ThreadPoolExecutor(max_workers=2)
        self.encoded: list[str] = []  # names in the order in which they were encoded

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)
        self.clear()

    def clear(self) -> None:
        """Forget all encodings, for instance because the matcher's resolution changed."""
        with self._mutex:
            self._held.clear()
            self._hosted.clear()
            self._bytes.clear()

    def put(self, name: str, encoding: Encoding) -> None:
        """Take over an encoding that was made elsewhere."""
        with self._mutex:
            self._held[name] = encoding
            self._bytes[name] = encoding_bytes(encoding)
            self.encoded.append(name)

    def acquire(self, pairs: Sequence[Pair], first: int) -> list[tuple[Encoding, Encoding]]:
        """Encodings of consecutive pairs, held until ``release``.

        Args:
            pairs: ``order[first : first + len(pairs)]``.
            first: position of the first of them.
        """
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        with self._mutex:
            self._position = max(self._position, first + len(pairs) - 1)
            for name in names:
                self._pinned[name] += 1
        try:
            self._prefetch()
            found = {name: self._get(name) for name in names}
        except BaseException:
            self.release(pairs)
            raise
        return [(found[a], found[b]) for a, b in pairs]

    def release(self, pairs: Sequence[Pair]) -> None:
        """Say that the encodings of pairs are no longer in work."""
        with self._mutex:
            for name in dict.fromkeys(name for pair in pairs for name in pair):
                self._pinned[name] -= 1
            self._shrink()

    def _get(self, name: str) -> Encoding:
        with self._mutex:
            if name in self._held:
                return self._held[name]
            if name in self._hosted:
                self._held[name] = move_encoding(self._hosted.pop(name), self._device)
                self._shrink()
                return self._held[name]
            future = self._making.get(name)
            mine = future is None
            if future is None:
                future = self._making[name] = Future()
            image = self._ahead.pop(name, None) if mine else None
        if not mine:
            return future.result()
        try:
            encoding = self._encode(image.result() if image is not None else self._read(name))
        except BaseException as error:
            with self._mutex:
                del self._making[name]
            future.set_exception(error)
            raise
        with self._mutex:
            self._bytes[name] = encoding_bytes(encoding)
            self._held[name] = encoding
            self.encoded.append(name)
            del self._making[name]
            self._shrink()
        future.set_result(encoding)
        return encoding

    def _shrink(self) -> None:
        """Move or drop what has no room; called with the mutex held."""
        for place, limit in ((self._held, self._budget.device), (self._hosted, self._budget.host)):
            used = sum(self._bytes[name] for name in place)
            if used <= limit:
                continue
            for name in self._farthest(place):
                if used <= limit:
                    break
                used -= self._bytes[name]
                encoding = place.pop(name)
                done = self._uses.following(name, self._position) == _NEVER
                if place is self._held and not done and self._budget.host > 0:
                    self._hosted[name] = move_encoding(encoding, torch.device("cpu"))

    def _farthest(self, place: Mapping[str, Encoding]) -> Iterator[str]:
        free = [name for name in place if not self._pinned[name]]
        key = {name: self._uses.following(name, self._position) for name in free}
        return iter(sorted(free, key=lambda name: -key[name]))

    def _prefetch(self, depth: int = 2) -> None:
        """Begin to read the images that will be encoded next."""
        with self._mutex:
            busy = self._held.keys() | self._hosted.keys() | self._making.keys()
            for pair in self._order[self._position + 1 : self._position + 64]:
                for name in pair:
                    if len(self._ahead) >= depth:
                        return
                    if name not in busy and name not in self._ahead:
                        self._ahead[name] = self._readers.submit(self._read, name)
