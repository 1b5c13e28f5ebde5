"""Encodings that are kept from one call to the next, found again by the image's content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch

from gim_hloc.schedule import encoding_bytes, memory_budget
from gim_hloc.types import Encoding

# Odd constants with well mixed bits (splitmix64), as signed 64-bit numbers.
_A = -7046029254386353131
_B = -4658895280553007687
_C = -7723592293110705685


def content_key(image: torch.Tensor) -> str:
    """Something that equal images share and others do not.

    On a GPU it is computed there, so that one number is all that is transferred.
    """
    sides = "x".join(str(side) for side in image.shape)
    values = image.detach().float().contiguous()
    if values.device.type == "cpu":
        digest = hashlib.sha1(values.numpy().data, usedforsecurity=False).hexdigest()[:16]
    else:
        digest = f"{mixed_sum(values) % 2**64:016x}"
    return f"{sides}-{digest}"


def mixed_sum(values: torch.Tensor) -> int:
    """Sum of all numbers, each mixed with its place: equal by chance once in 2^64 images."""
    bits = values.view(torch.int32).flatten().long()
    mixed = torch.arange(1, len(bits) + 1, device=bits.device)
    mixed.mul_(_A).bitwise_xor_(bits).mul_(_B)
    mixed ^= mixed >> 31
    mixed.mul_(_C)
    mixed ^= mixed >> 29
    return int(mixed.sum())


class EncodingMemory:
    """Least recently used encodings within a budget.

    Args:
        device: where encodings are.
        gigabytes: 10^9 bytes to hold; None takes half of what is free when the first one comes.
    """

    def __init__(self, device: torch.device, gigabytes: float | None = None) -> None:
        self._device, self._gigabytes = device, gigabytes
        self._budget: int | None = None
        self._held: OrderedDict[str, tuple[Encoding, int]] = OrderedDict()
        self._bytes = 0
        self.encoded = 0  # times that an encoding was made

    def get(self, key: str, make: Callable[[], Encoding]) -> Encoding:
        """The encoding of a key, made if it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        if self._budget is None:
            self._budget = memory_budget(self._device, self._gigabytes).device
        encoding = make()
        self.encoded += 1
        size = encoding_bytes(encoding)
        self._held[key] = (encoding, size)
        self._bytes += size
        while self._bytes > self._budget and len(self._held) > 2:  # a pair is always held
            _, (_, size) = self._held.popitem(last=False)
            self._bytes -= size
        return encoding

    def __len__(self) -> int:
        return len(self._held)
