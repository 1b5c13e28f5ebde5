"""One file of results by key, which a kill, damage or another process cannot spoil.

A key is a digest of all that a result depends on (`key`), so what was made stays usable when lists,
folders or options change and change back. An entry is acknowledged when `Cache.put` returns.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np

from gim_hloc.errors import LockedError, OutputError

logger = logging.getLogger(__name__)

_LARGEST = 10**9  # bytes of an entry, SQLite's own bound
_WAIT_SECONDS = 30.0  # for another process that writes
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries"
    " (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, checksum INTEGER, data BLOB)"
)

_T = TypeVar("_T")


def key(*parts: Any) -> str:
    """Digest of settings and sources: numbers, texts and containers of these."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """Arrays by key in one file. Threads may share an object, processes the file.

    Where the file system has no shared memory or locks, the file belongs to one process at a time:
    give each worker its own and `merge` them.

    Args:
        path: the file; made where it is missing.

    Raises:
        LockedError: another process holds the file.
        OutputError: it cannot be written, or is no cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._owner: filelock.BaseFileLock | None = None
        self._told = False
        self._database = sqlite3.connect(":memory:")  # until the file is open
        try:
            self._guarded(self._open)
        except OutputError:
            self.close()
            raise

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is pending into the one file, and let others have it."""
        with self._lock:
            self._database.close()
            if self._owner is not None:
                self._owner.release()

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays under a key, or None. A damaged entry is removed and counts as none."""

        def read() -> dict[str, np.ndarray] | None:
            query = "SELECT checksum, data FROM entries WHERE key = ?"
            row = self._database.execute(query, (key,)).fetchone()
            if row is None:
                return None
            if row[0] == _checksum(key, row[1]):
                return _unpacked(row[1])
            self._database.execute("DELETE FROM entries WHERE key = ?", (key,))
            self._tell("an entry is damaged")
            return None

        return self._guarded(read)

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under a key, in place of what was there; no kill undoes it after the return.

        Raises:
            OutputError: the disk is full, the file cannot be written, or the arrays are too large.
        """
        self._insert(key, _packed(arrays))

    def __contains__(self, key: object) -> bool:
        query = "SELECT 1 FROM entries WHERE key = ?"
        return self._guarded(lambda: self._database.execute(query, (key,)).fetchone() is not None)

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        """All keys, in the order of their making. Their entries may still prove damaged."""
        query = "SELECT key FROM entries ORDER BY id"
        return self._guarded(lambda: [row[0] for row in self._database.execute(query)])

    def merge(self, path: Path) -> int:
        """Take over what another file has and this one lacks; the number of entries.

        Args:
            path: another cache, such as a worker's; read and left as it is, but for repairs.
        """
        count = 0
        with Cache(path) as other:
            for name in other.keys():  # noqa: SIM118
                if name in self or (arrays := other.get(name)) is None:
                    continue
                self.put(name, arrays)
                count += 1
        return count

    def prune(self, keep: Container[str]) -> int:
        """Remove all entries but those with keys to keep; the number of entries removed."""

        def remove() -> int:
            away = [(name,) for name in self.keys() if name not in keep]
            self._database.execute("BEGIN")
            self._database.executemany("DELETE FROM entries WHERE key = ?", away)
            self._database.execute("COMMIT")
            with contextlib.suppress(sqlite3.OperationalError):  # on a disk without room for it
                self._database.execute("VACUUM")
            return len(away)

        return self._guarded(remove)

    def _insert(self, key: str, data: bytes) -> None:
        if len(data) + 1000 > _LARGEST:
            raise OutputError(
                f"{self.path}: the entry {key} has {len(data):,} bytes, more than the {_LARGEST:,} "
                "that fit."
            )
        query = "INSERT OR REPLACE INTO entries (key, checksum, data) VALUES (?, ?, ?)"
        row = (key, _checksum(key, data), data)
        self._guarded(lambda: self._database.execute(query, row))

    # ---------------------------------------------------------------------------------- faults

    def _guarded(self, act: Callable[[], _T]) -> _T:
        """Do something with the database; what is damaged is repaired first, all else is said."""
        with self._lock:
            try:
                try:
                    return act()
                except sqlite3.DatabaseError as error:
                    # A damaged header may ask for a newer SQLite, or for reading only.
                    header = getattr(error, "sqlite_errorname", "") in (
                        "SQLITE_ERROR",
                        "SQLITE_READONLY",
                    )
                    writable = os.access(self.path, os.W_OK) and self.path.is_file()
                    if not (_named(error, "CORRUPT", "NOTADB") or (header and writable)):
                        raise
                    self._repair()
                    return act()
            except (sqlite3.Error, OSError) as error:
                if _named(error, "BUSY", "LOCKED"):
                    raise LockedError(f"Another process holds {self.path}; wait for it.") from None
                raise OutputError(
                    f"{self.path} cannot be used ({error}). What is in it was left as it is."
                ) from None

    def _tell(self, what: str) -> None:
        logger.log(
            logging.DEBUG if self._told else logging.WARNING,
            "%s: %s; what cannot be read is computed again.",
            self.path,
            what,
        )
        self._told = True

    def _open(self) -> None:
        self._database.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = _with_log(self.path) or self._alone()
        with _closed_on_error(database):
            database.execute("PRAGMA synchronous=NORMAL")
            tables = {row[0] for row in database.execute("SELECT tbl_name FROM sqlite_master")}
            if tables not in (set(), {"entries"}):
                raise OutputError(f"{self.path} is no cache; move it away.")
            database.execute(_SCHEMA)
        self._database = database

    def _alone(self) -> sqlite3.Connection:
        """Open where write-ahead logging does not work: files as locks, a journal to roll back."""
        if self._owner is None:
            self._owner = filelock.SoftFileLock(f"{self.path}.owner")
        try:
            if not self._owner.is_locked:
                self._owner.acquire(timeout=0)
        except filelock.Timeout:
            raise LockedError(
                f"Another process holds {self.path}. If none does, delete {self.path}.owner."
            ) from None
        with contextlib.suppress(FileNotFoundError):  # of a holder that was killed
            os.rmdir(f"{self.path}.lock")
        uri = f"{self.path.absolute().as_uri()}?vfs=unix-dotfile"
        database = _connected(uri)
        with _closed_on_error(database):
            database.execute("PRAGMA locking_mode=EXCLUSIVE")  # before a log of earlier is read
            database.execute("PRAGMA journal_mode=DELETE")
        return database

    def _repair(self) -> None:
        """Put a new file in the place of a damaged one, with the entries that still can be read."""
        self._tell("the file is damaged")
        damaged = self.path.with_name(f"{self.path.name}.damaged")
        self._database.close()
        for ending in ("", "-wal", "-journal"):
            Path(f"{damaged}{ending}").unlink(missing_ok=True)  # of earlier
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{ending}", f"{damaged}{ending}")
        Path(f"{self.path}-shm").unlink(missing_ok=True)
        self._open()
        self._database.execute("PRAGMA wal_checkpoint")  # so that the file has its header
        _mend_header(damaged, self.path)
        uri = damaged.absolute().as_uri() + ("?vfs=unix-dotfile" if self._owner else "")
        with contextlib.closing(_connected(uri)) as old:
            old.execute("PRAGMA locking_mode=EXCLUSIVE")  # its log may need it
            old.execute("PRAGMA writable_schema=ON")  # reads files that are shorter than they say
            for name, checksum, data in _readable(old):
                whole = isinstance(name, str) and isinstance(data, bytes)
                if whole and checksum == _checksum(name, data):
                    self._insert(name, data)


def _named(error: Exception, *names: str) -> bool:
    """Whether an error of SQLite is one of those, or of a kind of them."""
    found: str = getattr(error, "sqlite_errorname", "")
    return found.startswith(tuple(f"SQLITE_{name}" for name in names))


def _connected(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(
        uri, uri=True, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
    )


def _with_log(path: Path) -> sqlite3.Connection | None:
    """Open with write-ahead logging; None where the file system cannot have it."""
    database = _connected(path.absolute().as_uri())
    with _closed_on_error(database):
        try:
            if database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",):
                return database
        except sqlite3.OperationalError as error:
            if not _named(error, "PROTOCOL", "IOERR_SHM", "IOERR_LOCK"):
                raise
    database.close()
    return None


@contextlib.contextmanager
def _closed_on_error(database: sqlite3.Connection) -> Iterator[None]:
    """A connection left open would lock the file for the next one, under a new name as well."""
    try:
        yield
    except BaseException:
        database.close()
        raise


def _mend_header(damaged: Path, fresh: Path) -> None:
    """Restore the header's constants, where the file is one of ours at all."""
    with damaged.open("r+b") as old, fresh.open("rb") as new:
        have, right = bytearray(old.read(100)), new.read(100)
        constant = [*range(24), *range(44, 72)]
        if 0 < sum(have[place : place + 1] != right[place : place + 1] for place in constant) <= 4:
            for place in constant:
                have[place] = right[place]
            old.seek(0)
            old.write(have)


def _readable(database: sqlite3.Connection) -> Iterator[tuple[Any, Any, Any]]:
    """Rows of a damaged file: found from both ends of its two trees, each looked up by itself."""
    found = set()
    for order in ("id", "id DESC", "key", "key DESC"):
        with contextlib.suppress(sqlite3.DatabaseError):
            for row in database.execute(f"SELECT id FROM entries ORDER BY {order}"):
                found.add(row)
    for row in sorted(found):
        with contextlib.suppress(sqlite3.DatabaseError):
            query = "SELECT key, checksum, data FROM entries WHERE id = ?"
            yield from database.execute(query, row)


# ---------------------------------------------------------------------------------------- entries


def _checksum(key: str, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key.encode()))


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Names, types and shapes as a line of JSON, then the numbers."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if any(array.dtype.hasobject or array.dtype.fields for array in arrays.values()):
        raise TypeError("an entry holds numbers and text, not objects")
    header = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    return b"\n".join([json.dumps(header).encode(), b""]) + b"".join(
        array.tobytes() for array in arrays.values()
    )


def _unpacked(data: bytes) -> dict[str, np.ndarray]:
    end = data.index(b"\n") + 1
    arrays = {}
    for name, kind, shape in json.loads(data[:end]):
        dtype, count = np.dtype(kind), math.prod(shape)
        # Copied: arrays of a bytes object cannot be written to.
        arrays[name] = np.frombuffer(data, dtype, count, end).reshape(shape).copy()
        end += count * dtype.itemsize
    return arrays
