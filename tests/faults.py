"""Runs that are killed, or find the disk full, at a chosen moment; each in a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_matcher
import forked
import torch

from gim_hloc import colmap, store
from gim_hloc.cache import Cache
from gim_hloc.cli import localize as localize_command
from gim_hloc.cli import reconstruct as reconstruct_command
from gim_hloc.colmap import mapping
from gim_hloc.pipelines import exports, reconstruct
from gim_hloc.pipelines import run as run_module

# Step -> what of it is called, and the call at which the process is killed: the step before is
# finished then, and the step itself has begun.
MOMENTS: dict[str, tuple[Any, str, int, Callable[..., bool]]] = {
    "encode": (store.H5Store, "put", 3, lambda self, *_, **__: self.path.stem == "features"),
    "pairs": (run_module, "_fingerprint", 1, lambda path, *_: path.name == "pairs.txt"),
    "match": (store.H5Store, "put", 6, lambda self, *_, **__: self.path.stem == "matches"),
    "finalize": (store.H5Store, "get", 4, lambda self, *_: self.path.stem == "matches"),
    "verify": (Cache, "put", 5, lambda self, *_: self.path.stem == "database"),
    "database": (colmap, "write_database", 1, lambda *_, **__: True),
    "map": (mapping, "map_once", 1, lambda *_, **__: True),
    "refine": (colmap, "extract_colours", 1, lambda *_, **__: True),
    "export": (exports, "export_model", 2, lambda *_, **__: True),
    "report": (reconstruct, "write_report", 1, lambda *_, **__: True),
    "queries": (store.H5Store, "put", 2, lambda self, *_, **__: self.path.stem == "poses"),
}


def kill_at(step: str, number: signal.Signals) -> None:
    """Have this process get a signal at that moment."""
    owner, name, wanted, counts = MOMENTS[step]
    original = getattr(owner, name)
    lock, calls = threading.Lock(), 0

    def wrapped(*given: Any, **options: Any) -> Any:
        nonlocal calls
        with lock:
            calls += counts(*given, **options)
            if calls == wanted:
                calls += 1
                os.kill(os.getpid(), number)
        return original(*given, **options)

    setattr(owner, name, wrapped)


def _work(
    arguments: list[str], step: str | None, number: signal.Signals, limit: int | None, log: Path
) -> None:
    torch.set_num_threads(1)
    fake_matcher.register()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    if step is not None:
        kill_at(step, number)
    if limit is not None:  # of every file; what is beyond fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.dont_write_bytecode = True  # Python would keep half of what it compiles
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most[1]))
    said = io.StringIO()
    command = localize_command if arguments[0] == "localize" else reconstruct_command
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = command.main(arguments[1:])
    except BaseException:
        import traceback

        said.write(traceback.format_exc())
        code = 99
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    log.write_text(said.getvalue())
    sys.exit(code)


def run(
    arguments: list[str],
    log: Path,
    *,
    step: str | None = None,
    number: signal.Signals = signal.SIGKILL,
    limit: int | None = None,
) -> tuple[int, str]:
    """Exit code and error output of ``reconstruct ARGUMENTS`` or ``localize ARGUMENTS``."""
    process = forked.start(_work, arguments, step, number, limit, log)
    try:
        process.join(300)
        code = process.exitcode
    finally:  # Ctrl-C included: pytest would wait for it at its own end
        process.kill()
        process.join()
    if code is None:
        raise TimeoutError
    return code, log.read_text() if log.exists() else ""
