"""Processes of tests, forked from one that has imported everything (``conftest``)."""

from __future__ import annotations

import multiprocessing.context
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any


class Forked(multiprocessing.context.ForkServerProcess):
    """Has the environment of who starts it, as a spawned process has."""

    def __init__(self, *arguments: Any, more: Mapping[str, str] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self._environment = os.environ | (more or {})

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class Context(multiprocessing.context.ForkServerContext):
    Process = Forked  # type: ignore[assignment]


CONTEXT = Context()


def start(function: Callable[..., Any], *arguments: Any) -> Forked:
    """A process that calls a function of a module."""
    process = Forked(target=function, args=arguments)
    process.start()
    return process


def codes(function: Callable[..., int], *arguments: Any, processes: int = 1) -> list[int | None]:
    """Exit codes of processes that return a function's result, several as under torchrun.

    torchrun itself and its processes start in ten seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        names: dict[str, Any] = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank,
            "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
        }  # fmt: skip
        more = {name: str(value) for name, value in names.items()} if processes > 1 else {}
        started.append(Forked(target=_exit, args=(function, *arguments), more=more))
        started[-1].start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def _exit(function: Callable[..., int], *arguments: Any) -> None:
    sys.exit(function(*arguments))
