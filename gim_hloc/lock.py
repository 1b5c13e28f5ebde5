"""Who works in a folder: a file with host, process and heartbeat, on any file system.

Locks of the system are not used: on shared file systems they are missing (Lustre), hang (NFS
without its lock service) or count on one machine only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

from gim_hloc.errors import LockedError, OutputError

_BEAT_SECONDS = 10.0
_DEAD_SECONDS = 180.0  # without a heartbeat; COLMAP's solvers may hold the interpreter for a while
_SETTLE_SECONDS = 0.1  # until two who took over at once see who was last


class FolderLock:
    """Holds a folder until it is closed or the process ends.

    Args:
        folder: made if missing.
        name: of the work. ``run`` keeps everybody else out; works of other names may be in the
            folder at once, each name once.

    Raises:
        LockedError: another run works there.
        OutputError: the folder cannot be written, or a file of the user has the lock's name.
    """

    def __init__(self, folder: Path, name: str = "run") -> None:
        self.folder = folder
        self.path = folder / (".lock" if name == "run" else f".lock-{name}")
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
            rivals = folder.glob(".lock-*") if name == "run" else [folder / ".lock"]
            for rival in rivals:
                if _alive(rival, self._now()):
                    self.path.unlink(missing_ok=True)
                    self._refuse(rival)
        except OSError as error:
            raise OutputError(f"Cannot write to {folder}: {error}") from None
        threading.Thread(target=self._beat, daemon=True).start()

    def _take(self) -> None:
        text = json.dumps(
            {
                "token": self._token,
                "host": _host(),
                "pid": os.getpid(),
                "started": _started(os.getpid()),
            }
        )
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(text)
            return
        except FileExistsError:
            pass
        if not _ours(self.path):
            raise OutputError(
                f"{self.path} is no lock file of gim-hloc. Move it away, or choose another folder."
            )
        if _alive(self.path, self._now()):
            self._refuse(self.path)
        temporary = self.folder / f".lock.{self._token}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)
        time.sleep(_SETTLE_SECONDS)
        if _read(self.path).get("token") != self._token:
            self._refuse(self.path)

    def _now(self) -> float:
        """Time of the file system, whose clock may be another machine's."""
        probe = self.folder / f".lock.{self._token}.now"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _refuse(self, path: Path) -> NoReturn:
        owner = _read(path)
        who = f"process {owner.get('pid', '?')} on {str(owner.get('host', '?')).split('/')[0]}"
        raise LockedError(
            f"Another run is working in {self.folder} ({who}). Wait for it, or choose another "
            f"output folder. If that machine was switched off, delete {path}."
        )

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def close(self) -> None:
        """Give the folder back."""
        self._ended.set()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _ours(path: Path) -> bool:
    """Whether a lock file is one of ours: as above, of 0.1 (a number), or cut by a kill (empty)."""
    text = path.read_bytes()[:100].strip()
    return not text or text.isdigit() or "token" in _read(path)


def _alive(path: Path, now: float) -> bool:
    """Whether the process that a lock file names still works."""
    try:
        beat = path.stat().st_mtime
        owner = _read(path)
    except OSError:
        return False
    if not owner:  # of 0.1, whose files stay, or in the making
        return path.stat().st_size == 0 and now - beat < _BEAT_SECONDS
    if owner.get("host") == _host() and owner.get("started") is not None:
        return _started(owner.get("pid")) == owner["started"]
    return now - beat < _DEAD_SECONDS


def _host() -> str:
    """This machine, and in it the space in which process numbers mean something."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: Any) -> str | None:
    """When a running process was started, in the kernel's words; None where it cannot be known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


__all__ = ["FolderLock"]
