"""Run a program and measure it from outside; describe the machine that numbers come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gim_hloc.errors import GimError

PROC = Path("/proc")


class BenchmarkError(GimError):
    """A program under measurement failed, or what it promised to write is missing."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one run of a program took."""

    wall_s: float
    cpu_s: float  # user and system time of the program and of the children it waited for
    peak_mib: float  # of all processes together, sampled; NaN where there is no /proc


class MemorySampler(threading.Thread):
    """Samples the memory of a process and its descendants until stopped.

    Shared pages count once (the kernel's proportional set size).
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_kib = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Sample four times a second."""
        while not self.ended.wait(0.25):
            kib = sum(map(_pss_kib, [self.pid, *descendants(self.pid)]))
            self.peak_kib = max(self.peak_kib, kib)

    def stop(self) -> float:
        """End the sampling; the peak in MiB, NaN where nothing could be read."""
        self.ended.set()
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
    command: Sequence[str | Path], *, log: Path, environment: Mapping[str, str] | None = None
) -> Usage:
    """Run a program to its end; its output goes to ``log``.

    Its bytecode is kept, as that of installed packages is: a checkout is compiled by its first run.

    Raises:
        BenchmarkError: it cannot be started or leaves with another code than 0.
    """
    arguments = [str(part) for part in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                arguments,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(environment or {})},
            )
        except OSError as error:
            raise BenchmarkError(f"cannot start {arguments[0]}: {error}") from error
        sampler = MemorySampler(process.pid)
        sampler.start()
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise BenchmarkError(
            f"{arguments[0]} left with code {process.returncode}; all of its output is in {log}, "
            "the end of it:\n  " + "\n  ".join(tail)
        )
    return Usage(wall_s=wall_s, cpu_s=used.ru_utime + used.ru_stime, peak_mib=sampler.stop())


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
