"""Locks of folders: of this process, of others here, of other machines, and dead ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gim_hloc.errors import LockedError, OutputError
from gim_hloc.lock import FolderLock

_HOLDER = """
import sys, time
from pathlib import Path
from gim_hloc.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def _owner(folder: Path, **changed: object) -> Path:
    """A lock file as a holder left it, with some values changed."""
    lock = FolderLock(folder)
    owner = json.loads(lock.path.read_text())
    lock.close()
    lock.path.write_text(json.dumps({**owner, "token": "another", **changed}))
    return lock.path


def test_a_folder_is_held_once_and_given_back(tmp_path: Path) -> None:
    with (
        FolderLock(tmp_path / "new"),
        pytest.raises(LockedError, match=f"process {os.getpid()} on"),
    ):
        FolderLock(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    FolderLock(tmp_path / "new").close()


def test_parts_of_a_job_share_a_folder_but_not_with_a_run(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "encode-1-of-2"), FolderLock(tmp_path, "encode-2-of-2"):
        with pytest.raises(LockedError):
            FolderLock(tmp_path, "encode-1-of-2")
        with pytest.raises(LockedError):
            FolderLock(tmp_path)
        assert not (tmp_path / ".lock").exists()
    with FolderLock(tmp_path), pytest.raises(LockedError):
        FolderLock(tmp_path, "encode-1-of-2")


def test_a_killed_holder_does_not_hold(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} on"):
            FolderLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
    FolderLock(tmp_path).close()


def test_a_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    path = _owner(tmp_path, started="1")  # this process's number, of before the machine started
    with FolderLock(tmp_path):
        assert json.loads(path.read_text())["token"] != "another"


def test_another_machine_holds_while_its_heart_beats(tmp_path: Path) -> None:
    path = _owner(tmp_path, host="another/pid:[1]")
    with pytest.raises(LockedError, match=r"on another.*delete"):
        FolderLock(tmp_path)
    os.utime(path, (time.time() - 1000, time.time() - 1000))
    FolderLock(tmp_path).close()


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gim_hloc.lock._BEAT_SECONDS", 0.01)
    with FolderLock(tmp_path) as lock:
        os.utime(lock.path, (1e9, 1e9))
        for _ in range(500):
            if lock.path.stat().st_mtime > 1e9 + 1:
                break
            time.sleep(0.01)
        assert lock.path.stat().st_mtime > 1e9 + 1


@pytest.mark.parametrize("left", ["4091", "", '{"token": "cut'])
def test_files_of_earlier_versions_and_of_kills_hold_nothing(tmp_path: Path, left: str) -> None:
    (tmp_path / ".lock").write_text(left)
    os.utime(tmp_path / ".lock", (1e9, 1e9))
    if left.startswith("{"):
        with pytest.raises(OutputError, match="no lock file of gim-hloc"):
            FolderLock(tmp_path)
    else:
        FolderLock(tmp_path).close()


def test_a_file_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("npm install\n")
    with pytest.raises(OutputError, match="Move it away"):
        FolderLock(tmp_path)
    assert (tmp_path / ".lock").read_text() == "npm install\n"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        FolderLock(tmp_path / "file")
