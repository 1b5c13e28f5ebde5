"""The benchmark of dense matching in hloc: what it says about files, without running hloc."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from gim_hloc.evaluation.benchmarks import _hloc_dense_driver as driver
from gim_hloc.evaluation.benchmarks import hloc_dense


def write(folder: Path, shift: float = 0.0, matched: int = 1, name: str = "f.h5") -> dict[str, str]:
    folder.mkdir()
    with h5py.File(folder / name, "w") as file:
        file["a.png/keypoints"] = np.ones((3, 2), np.float32)
    with h5py.File(folder / "m.h5", "w") as file:
        file["a.png/b.png/keypoints0"] = np.full((4, 2), 5 + shift, np.float32)
        file["a.png/b.png/matches0"] = np.full(2, matched, np.int32)
    return {"features": str(folder / name), "matches": str(folder / "m.h5")}


def test_files_are_compared(tmp_path: Path) -> None:
    results = {
        "hloc": write(tmp_path / "hloc"),
        "quantized": write(tmp_path / "quantized", shift=1e-5),
        "anchored": write(tmp_path / "anchored", shift=3, matched=0),
    }
    assert hloc_dense._differences(results, "quantized") == []
    assert hloc_dense._differences(results, "anchored") == []
    results["quantized"] = write(tmp_path / "other", matched=0)
    assert hloc_dense._differences(results, "quantized") == [
        "quantized: 1 of 2 datasets of m.h5 differ"
    ]
    results["anchored"] = write(tmp_path / "named", name="g.h5")
    assert hloc_dense._differences(results, "anchored") == ["anchored: g.h5 instead of f.h5"]
    with h5py.File(results["anchored"]["matches"], "a") as file:
        file["a.png/c.png/matches0"] = np.zeros(1, np.int32)
    assert "anchored: m.h5 has other groups or datasets than hloc's" in hloc_dense._differences(
        results, "anchored"
    )


def spin(seconds: float) -> None:
    """Use the processor in this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_network_is_not_charged_for_what_the_program_does_beside_it() -> None:
    class Network:
        def work(self, seconds: float) -> None:
            reading = threading.Thread(target=spin, args=(seconds,))
            reading.start()
            spin(seconds)
            reading.join()

        def wait(self) -> None:
            time.sleep(0.2)  # a stranger has the core

    busy = driver.Busy()
    busy.watch(Network, "work")
    busy.watch(Network, "wait")
    for _ in range(2):
        Network().work(0.2)
    assert busy.calls == {"work": 2}
    assert 0.4 <= busy.processor_s < 0.5
    elapsed = busy.wall_s
    assert elapsed >= busy.processor_s
    Network().wait()
    assert busy.wall_s >= elapsed + 0.19
    assert busy.processor_s < 0.5


def test_loaders_of_other_processes_are_told_apart() -> None:
    child = multiprocessing.get_context("fork").Process(target=spin, args=(0.1,), daemon=True)
    before = driver.processor_seconds()
    child.start()
    start = driver.clocks()[2]
    while child.is_alive():
        last = driver.clocks()[2]
        time.sleep(0.01)
    child.join()
    assert driver.processor_seconds() - before >= 0.1
    if Path("/proc/self/schedstat").exists():
        assert last - start >= 0.05


def test_hloc_must_be_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CHECKOUT", "PYTHON"):
        monkeypatch.delenv(f"GIM_HLOC_HLOC_{name}", raising=False)
    monkeypatch.delenv("GIM_HLOC_WITH_HLOC", raising=False)
    assert hloc_dense.main([]) == 2
    assert "missing: python, tool, checkout" in capsys.readouterr().err
