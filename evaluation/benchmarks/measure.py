"""Run a program and measure it from outside: wall time, processor time and peak memory.

Two measures of memory, because each misses something:

* ``peak_rss_mib``: resident memory of the largest single process, as the kernel counted it. Exact,
  but blind to how many processes there are.
* ``peak_tree_mib``: memory of the program and all its descendants together, shared pages counted
  once (the kernel's proportional set size), sampled. What the machine must have free. Only on
  Linux; NaN elsewhere.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gim_hloc.errors import GimError

PROC = Path("/proc")
WAITER = Path(__file__).with_name("_wait4.py")


class BenchmarkError(GimError):
    """A program under measurement failed, or what it promised to write is missing."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one run of a program took."""

    wall_s: float
    cpu_s: float  # user and system time of the program and of the children it waited for
    peak_rss_mib: float
    peak_tree_mib: float


class TreeSampler(threading.Thread):
    """Samples the memory of all descendants of a process until stopped."""

    def __init__(self, pid: int, *, interval_s: float = 0.25) -> None:
        """Watch below process ``pid``; ``interval_s`` is the time between two samples."""
        super().__init__(daemon=True)
        self.pid = pid
        self.interval_s = interval_s
        self.peak_kib = 0
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._stop_event.is_set():
            self.peak_kib = max(self.peak_kib, sum(map(_pss_kib, descendants(self.pid))))
            self._stop_event.wait(self.interval_s)

    def stop(self) -> float:
        """End the sampling; returns the peak in MiB, NaN where nothing could be read."""
        self._stop_event.set()
        self.join()
        return self.peak_kib / 1024 if self.peak_kib else math.nan


def descendants(pid: int) -> list[int]:
    """Return all processes below one; empty where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    for entry in PROC.glob("[0-9]*/stat"):
        try:
            # The command in parentheses may itself hold blanks and parentheses.
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found = []
    queue = children.get(pid, [])
    while queue:
        current = queue.pop()
        found.append(current)
        queue += children.get(current, [])
    return found


def _pss_kib(pid: int) -> int:
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass  # it ended between listing and reading
    return 0


def measured_run(
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    interval_s: float = 0.25,
) -> Usage:
    """Run a program to its end.

    Args:
        command: program and arguments.
        log: file for its output and messages.
        environment: variables to set beside the present ones.
        interval_s: seconds between two samples of memory.

    Raises:
        BenchmarkError: it cannot be started or leaves with another code than 0.
    """
    arguments = [str(part) for part in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, log.open("wb") as output:
        result = Path(temporary) / "usage.json"
        # Isolated and without site-packages: it is to stay small.
        waiter = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WAITER), str(result), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        sampler = TreeSampler(waiter.pid, interval_s=interval_s)
        sampler.start()
        waiter.wait()
        tree = sampler.stop()
        try:
            usage = json.loads(result.read_text())
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"{arguments[0]} was stopped; its output is in {log}") from error
    if "error" in usage:
        raise BenchmarkError(f"cannot start {arguments[0]}: {usage['error']}")
    if usage["code"] != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise BenchmarkError(
            f"{arguments[0]} left with code {usage['code']}; all of its output is in {log}, "
            "the end of it:\n  " + "\n  ".join(tail)
        )
    # Linux counts in KiB, macOS in bytes.
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024
    return Usage(
        wall_s=usage["wall_s"],
        cpu_s=usage["cpu_s"],
        peak_rss_mib=usage["maxrss"] / unit,
        peak_tree_mib=tree,
    )


def median_usage(usages: Sequence[Usage]) -> Usage:
    """Return the median of each field on its own."""
    return Usage(
        **{
            field: statistics.median(getattr(usage, field) for usage in usages)
            for field in Usage.__dataclass_fields__
        }
    )


def machine() -> dict[str, Any]:
    """Describe the machine that a number was measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "ram_gib": _ram_gib(),
        "load_1min": round(os.getloadavg()[0], 2),
        "gpu": _gpu(),
        "system": platform.platform(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of Python and of packages."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit(folder: Path) -> str:
    """Return the git commit of ``folder``, with ``-dirty`` when changed, or ``unknown``."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip() or "unknown"


def now() -> str:
    """Return the time with its zone, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _cpu_model() -> str:
    try:
        for line in (PROC / "cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
