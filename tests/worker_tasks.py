"""Toy tasks for test_workers.py, in a module that workers load quickly."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Powers:
    """Squares numbers; notes each in a file, and dies or stops at some of them."""

    notes: Path
    dies_at: tuple[int, ...] = ()  # every time
    dies_once_at: tuple[int, ...] = ()
    raises_at: int | None = None
    error: Exception | None = None

    def open(self, device: str) -> Callable[[Sequence[int]], Iterable[tuple[int, Any]]]:
        logging.getLogger("gim_hloc.powers").info("opened on %s", device)
        self.note("open")
        return self.work

    def work(self, items: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for item in items:
            died = f"died {item}" in self.noted()
            if item in self.dies_at or (item in self.dies_once_at and not died):
                self._wait_until_taken(item - 1)
                self.note(f"died {item}")
                os.kill(os.getpid(), signal.SIGKILL)
            if item == self.raises_at and self.error is not None:
                raise self.error
            self.note(str(item))
            yield item, np.full(3, item**2)

    def taken(self, item: int) -> None:
        """The caller has this result."""
        self.notes.with_suffix(f".taken{item}").touch()

    def _wait_until_taken(self, item: int) -> None:
        """What Ray still carries to the caller dies with the worker, and is rightly done anew."""
        deadline = time.monotonic() + 60
        while (
            str(item) in self.noted()
            and not self.notes.with_suffix(f".taken{item}").exists()
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)

    def note(self, text: str) -> None:
        with self.notes.open("a") as file:
            file.write(f"{text}\n")

    def noted(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []


@dataclass(frozen=True)
class Sleeper:
    """Says who it is, and never ends."""

    notes: Path

    def open(self, device: str) -> Callable[[Sequence[int]], Iterable[tuple[int, Any]]]:
        (self.notes / str(os.getpid())).touch()
        return self.work

    def work(self, items: Sequence[int]) -> Iterator[tuple[int, Any]]:
        time.sleep(600)
        yield from ()
