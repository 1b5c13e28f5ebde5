"""Do workers change a result? One reconstruction by one process, devices, array jobs, and Ray.

    python -m gim_hloc.evaluation.benchmarks.parallel IMAGES [--matcher sift] [--quality fast]

Each way goes as far as COLMAP's database, in a folder of its own. Keypoints and matches must be the
same to the byte, the database in every row of every table. The exit code is 1 where one is not.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from gim_hloc.cli import common
from gim_hloc.evaluation.benchmarks.measure import (
    PROC,
    BenchmarkError,
    descendants,
    machine,
    now,
    versions,
)
from gim_hloc.types import Quality

logger = logging.getLogger(__name__)

STEPS = (("encode", "pairs"), ("match", "rotations"), ("verify", "verify"))
"""A step that array jobs do, and the step up to which one job then goes."""
_FILES = ("features.h5", "matches.h5", "database.db")
_HEADER = f"| way | wall s | processor s | {' | '.join(_FILES)} |\n|---|--:|--:|---|---|---|"


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Reconstruct the same images in several ways, and compare what comes out."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of images."""
    matcher: str = "aliked_lightglue"
    """Matcher."""
    quality: Quality = "fast"
    """Its operating point."""
    max_size: int | None = None
    """Long side of the images in pixels, instead of the operating point's."""
    ways: tuple[str, ...] = ("one", "devices", "shards", "ray", "killed")
    """one: one process; devices: two processes; shards: two array jobs a step, each in a folder of
    its own, brought together by gim-merge; ray: two workers of Ray; killed: one of which is killed
    while it matches. The first one is what the others are compared with."""
    work: Path | None = field(default=None)
    """Where to keep the runs; a temporary folder otherwise."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a way took, and which files are those of the first way."""

    way: str
    wall_s: float
    processor_s: float
    same: dict[str, bool]

    def line(self) -> str:
        """One line of the table."""
        words = ["same" if same else "DIFFERENT" for same in self.same.values()]
        cells = [self.way, f"{self.wall_s:.1f}", f"{self.processor_s:.1f}", *words]
        return f"| {' | '.join(cells)} |"


class _Processor(threading.Thread):
    """Adds up the processor time of all descendants of this process, those of Ray included."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._ticks: dict[int, int] = {}

    def run(self) -> None:
        """Look until `stop`."""
        while not self._ended.wait(0.5):
            for pid in descendants(os.getpid()):
                try:
                    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                self._ticks[pid] = int(fields[11]) + int(fields[12])

    def stop(self) -> float:
        """End; returns seconds."""
        self._ended.set()
        self.join()
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")


class Comparison:
    """The ways of one set of options."""

    def __init__(self, options: ParallelOptions, work: Path) -> None:
        self.options, self.work = options, work
        self.ways: dict[str, tuple[str, Callable[[Path], None]]] = {
            "one": ("one process", self._whole),
            "devices": (
                "two processes (`--devices cpu cpu`)",
                lambda out: self._whole(out, "--devices", "cpu", "cpu"),
            ),
            "shards": ("two shards of each step, one after the other, `gim-merge`", self._shards),
            "ray": (
                "Ray, two workers",
                lambda out: self._whole(out, "--engine", "ray", "--workers", "2"),
            ),
            "killed": ("Ray, two workers, one killed", self._killed),
        }

    def rows(self) -> Iterator[Row]:
        """Go each way."""
        first = self.work / self.options.ways[0]
        for way in self.options.ways:
            name, go = self.ways[way]
            output = self.work / way
            processor, start = _Processor(), time.perf_counter()
            processor.start()
            go(output)
            wall = time.perf_counter() - start
            seconds = processor.stop()
            same = {file: same_file(first / file, output / file) for file in _FILES}
            yield Row(way=name, wall_s=wall, processor_s=seconds, same=same)

    def _command(self, output: Path, *more: str) -> list[str]:
        options = self.options
        size = () if options.max_size is None else ("--max-size", str(options.max_size))
        return [
            *(_program("gim-reconstruct"), str(options.images), str(output), "--device", "cpu"),
            *("--matcher", options.matcher, "--quality", options.quality, *size, *more, "--quiet"),
        ]

    def _whole(self, output: Path, *more: str) -> None:
        _run(self._command(output, "--stop-after", "verify", *more))

    def _shards(self, output: Path) -> None:
        parts = [output.with_name(f"{output.name}-{index}") for index in range(2)]
        for step, barrier in STEPS:
            for index, part in enumerate(parts):
                shutil.rmtree(part, ignore_errors=True)
                if output.exists():
                    shutil.copytree(output, part)
                _run(self._command(part, "--step", step, "--shard", f"{index}/{len(parts)}"))
            _run([_program("gim-merge"), str(output), *map(str, parts)])
            _run(self._command(output, "--stop-after", barrier))

    def _killed(self, output: Path) -> None:
        arguments = ("--stop-after", "verify", "--engine", "ray", "--workers", "2")
        process = subprocess.Popen(self._command(output, *arguments))
        log = output / "log.txt"
        while process.poll() is None:
            if log.is_file() and " matched " in log.read_text(encoding="utf-8"):
                os.kill(_actor(process.pid), signal.SIGKILL)
                break
            time.sleep(0.01)
        if process.wait() != 0:
            raise BenchmarkError(f"The run did not survive its worker: {log}")
        if "A worker on cpu died" not in log.read_text(encoding="utf-8"):
            raise BenchmarkError(f"No worker died while it had something to do: {log}")


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)} left with {done.returncode}: {done.stderr}")


def _actor(driver: int) -> int:
    """Process of an actor of the Ray that a process started."""
    for pid in descendants(driver):
        if (PROC / str(pid) / "cmdline").read_bytes().startswith(b"ray::_Body"):
            return pid
    raise BenchmarkError("Ray has no actor of ours.")


def same_file(a: Path, b: Path) -> bool:
    """Whether two files are the same: databases in every row of every table, others to the byte."""
    if a.suffix == ".db":
        return _tables(a) == _tables(b)
    return a.read_bytes() == b.read_bytes()


def _tables(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, in their order."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {name: database.execute(f"SELECT * FROM {name}").fetchall() for (name,) in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the module."""
    options = tyro.cli(ParallelOptions, args=common.prog(argv))
    common.configure_logging()

    def run() -> int:
        packages = ("torch", "pycolmap", "ray", "h5py")
        sys.stdout.write(f"{now()}\nmachine: {machine()}\nversions: {versions(packages)}\n")
        sys.stdout.write(f"{options.images}, {options.matcher} {options.quality}\n\n{_HEADER}\n")
        different = 0
        with tempfile.TemporaryDirectory() as folder:
            for row in Comparison(options, options.work or Path(folder)).rows():
                sys.stdout.write(row.line() + "\n")
                sys.stdout.flush()
                different += not all(row.same.values())
        return int(different > 0)

    return common.run(run)


if __name__ == "__main__":
    sys.exit(main())
