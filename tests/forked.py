"""Processes of tests, forked from one that has imported everything (``conftest``)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process
