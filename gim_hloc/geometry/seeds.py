"""Seeds that depend on what is computed, not on when or where."""

from __future__ import annotations

import hashlib


def pair_seed(seed: int, *names: str) -> int:
    """Seed of a pair: depends on the names alone, not on order of work or number of workers."""
    text = "\0".join([str(seed), *names]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
