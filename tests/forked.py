"""Processes of tests, forked from one that has imported everything (``conftest``)."""

from __future__ import annotations

import multiprocessing.context
import os
from collections.abc import Callable
from typing import Any


class Forked(multiprocessing.context.ForkServerProcess):
    """Has the environment of who starts it, as a spawned process has."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environment = dict(os.environ)

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
