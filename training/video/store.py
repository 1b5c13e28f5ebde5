"""Labels of one video by one labeller: one h5 file, and parts that survive a kill.

While labels are made, each worker appends to a part of its own beside the h5 file; a record is
complete or recognisably torn, and a torn one is passed over. `LabelStore.merge` writes everything
to one h5 file under a temporary name and renames it. A reader sees both, so that nothing has to be
merged to be used.

The h5 file has a dataset ``<i>_<j>`` (n, 4) float32 for every labelled pair of frames, and in the
group ``index`` the datasets ``pairs`` (P, 2) int64, ``counts`` (P,) int64, ``failed`` (F, 2) int64
and ``reasons`` (F,) text, all sorted by pair. Its attributes are those of `StoreInfo`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import h5py
import numpy as np

from gim_hloc.errors import InputError, OutputError

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<4sqqiII")  # magic, i, j, rows, bytes, crc32 of all that follows the magic
_MAGIC = b"GLP1"
_FAILED = -1  # rows of a record that says why there are no labels
_INFO = -2  # rows of the first record of a part: the attributes
_INDEX = "index"


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What the labels of a store are about.

    ``steps`` and ``gap`` say which pairs were asked for, in all runs together; all else decides the
    labels.
    """

    video: str  # id of the video
    labeller: str  # name of the matcher
    zoom: bool  # crops of the common region, enlarged alike, instead of whole frames
    steps: tuple[int, ...]  # distances j - i of pairs, frames
    size: tuple[int, int]  # (width, height) of the frames, pixels
    fps: float  # frames per second on the video's time grid
    gap: int  # distance of sampled frames, frames
    settings: Mapping[str, Any] = field(default_factory=dict)  # all that decides the labels

    def to_json(self) -> str:
        """The same as text, with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str) -> StoreInfo:
        """The inverse of `to_json`."""
        values = json.loads(text)
        values["steps"] = tuple(values["steps"])
        values["size"] = tuple(values["size"])
        return cls(**values)

    def differences(self, other: StoreInfo) -> list[str]:
        """Names of what decides labels and differs."""
        mine, theirs = (json.loads(info.to_json()) for info in (self, other))
        found = [key for key in ("video", "labeller", "zoom", "size") if mine[key] != theirs[key]]
        settings = [mine["settings"], theirs["settings"]]
        for key in sorted(settings[0].keys() | settings[1].keys()):
            if settings[0].get(key) != settings[1].get(key):
                found.append(key)
        return found


class LabelStore:
    """See the module. Make one with `LabelStore.open`; it is a context manager.

    Attributes:
        path: of the h5 file.
        info: what the labels are about.
    """

    def __init__(self, path: Path, info: StoreInfo, parts: list[_Part], mine: _Part | None) -> None:
        self.path = path
        self.info = info
        self._parts = parts
        self._mine = mine
        self._file: h5py.File | None = None
        self._counts: dict[tuple[int, int], int] = {}
        self._failures: dict[tuple[int, int], str] = {}
        self._places: dict[tuple[int, int], _Part] = {}
        if path.exists():
            self._read_index()
        for part in parts:
            for key, (rows, _, _) in part.records.items():
                self._note(key, rows, part)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "a"] = "r",
        *,
        info: StoreInfo | None = None,
        part: str = "0",
    ) -> LabelStore:
        """Open the labels of a labeller.

        Args:
            path: of the h5 file, which need not exist while there are parts.
            mode: "r" to read, "a" to add pairs.
            info: what the labels are about; needed to begin a store, and compared with what is
                there.
            part: name of the part that this process adds to; every writer has its own.

        Raises:
            InputError: there is nothing to read.
            OutputError: what is there was made with other settings, or is damaged.
        """
        path = Path(path)
        folder = _parts_folder(path)
        mine: _Part | None = None
        names = sorted(folder.glob("*.part")) if folder.is_dir() else []
        parts = [_Part(name) for name in names if mode == "r" or name.stem != part]
        parts = [read for read in parts if read.info is not None]
        known = [(read.path, read.info) for read in parts if read.info is not None]
        if path.exists():
            known.append((path, _file_info(path)))
        if info is None and not known and mode == "r":
            raise InputError(f"There are no labels in {path}: label the video first.")
        if info is None:
            if not known:
                raise InputError(f"{path} is new; to begin it, say what its labels are about.")
            info = known[-1][1]
        for place, other in known:
            _require_same(place, info, other)
        # Runs may have asked for different pairs.
        every = [info, *(other for _, other in known)]
        steps = sorted({step for one in every for step in one.steps})
        info = dataclasses.replace(info, steps=tuple(steps), gap=min(one.gap for one in every))
        if mode == "a":
            folder.mkdir(parents=True, exist_ok=True)
            mine = _Part(folder / f"{part}.part", write=info)
            parts.append(mine)
        return cls(path, info, parts, mine)

    @property
    def attrs(self) -> dict[str, Any]:
        """The fields of ``info`` by name."""
        return {f.name: getattr(self.info, f.name) for f in dataclasses.fields(self.info)}

    @property
    def unmerged(self) -> bool:
        """Whether there are parts beside the h5 file."""
        return bool(self._parts)

    def pairs(self) -> np.ndarray:
        """(P, 2) int64 frame indices i, j of the labelled pairs, sorted."""
        return np.array(sorted(self._counts), dtype=np.int64).reshape(-1, 2)

    def counts(self) -> np.ndarray:
        """(P,) int64 labels of the pairs, in the order of `pairs`."""
        return np.array([self._counts[key] for key in sorted(self._counts)], dtype=np.int64)

    def failures(self) -> list[tuple[int, int, str]]:
        """Pairs without labels and why, sorted."""
        return [(i, j, self._failures[i, j]) for i, j in sorted(self._failures)]

    def has(self, i: int, j: int) -> bool:
        """Whether the pair has labels."""
        return (int(i), int(j)) in self._counts

    def failure(self, i: int, j: int) -> str | None:
        """Why the pair has no labels; None if it has some or was never tried."""
        return self._failures.get((int(i), int(j)))

    def read(self, i: int, j: int) -> np.ndarray:
        """(n, 4) float32 x0, y0, x1, y1 in pixels of the frames, hloc's frame.

        Raises:
            InputError: the pair has no labels.
            OutputError: they are damaged.
        """
        key = (int(i), int(j))
        if key not in self._counts:
            why = self._failures.get(key, "it was never tried")
            raise InputError(f"{self.path} has no labels of frames {i} and {j}: {why}.")
        if key in self._places:
            return self._places[key].read(key)
        try:
            if self._file is None:
                self._file = h5py.File(self.path, "r")
            labels: np.ndarray = self._file[f"{i}_{j}"][()]
        except (OSError, KeyError) as error:
            raise _damaged(self.path, error) from error
        return labels

    def write(self, i: int, j: int, labels: np.ndarray) -> None:
        """Add the labels of a pair; they survive the process as soon as this returns.

        Args:
            i: first frame.
            j: second frame.
            labels: (n, 4) x0, y0, x1, y1 in pixels of the frames, hloc's frame; n > 0.

        Raises:
            OutputError: the disk is full, or the store is open for reading only.
        """
        array = np.ascontiguousarray(labels, dtype="<f4")
        if array.ndim != 2 or array.shape[1] != 4 or not len(array):
            raise ValueError(f"Labels must be (n, 4) with n > 0; they are {array.shape}.")
        part = self._writer()
        part.append(int(i), int(j), len(array), array.tobytes())
        self._note((int(i), int(j)), len(array), part)

    def fail(self, i: int, j: int, reason: str) -> None:
        """Note that a pair was tried and has no labels.

        Raises:
            OutputError: as `write`.
        """
        part = self._writer()
        part.append(int(i), int(j), _FAILED, reason.encode())
        self._note((int(i), int(j)), _FAILED, part)

    def forget_failures(self) -> int:
        """Let failed pairs count as never tried in this process; returns how many."""
        count = len(self._failures)
        self._failures.clear()
        return count

    def merge(self) -> Path:
        """Write everything to the h5 file and remove the parts. No other process may be writing.

        Raises:
            OutputError: the file cannot be written; everything is then as it was.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        pairs = self.pairs()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(temporary, "w", libver="latest") as file:
                for i, j in pairs.tolist():
                    file.create_dataset(f"{i}_{j}", data=self.read(i, j))
                failures = self.failures()
                index = file.create_group(_INDEX)
                index["pairs"] = pairs
                index["counts"] = self.counts()
                index["failed"] = np.array([f[:2] for f in failures], np.int64).reshape(-1, 2)
                index.create_dataset(
                    "reasons", data=[f[2] for f in failures], dtype=h5py.string_dtype()
                )
                for key, value in self.attrs.items():
                    # Settings may exceed what an attribute can hold in old versions of the format.
                    file.attrs[key] = self.info.to_json() if key == "settings" else value
            self.close()
            os.replace(temporary, self.path)
        except OSError as error:
            raise OutputError(f"Cannot write {self.path}: {error}. Make room and repeat.") from None
        finally:
            temporary.unlink(missing_ok=True)
        for part in self._parts:
            part.path.unlink(missing_ok=True)
        with_rest = _parts_folder(self.path)
        if with_rest.is_dir() and not any(with_rest.iterdir()):
            with_rest.rmdir()
        self._parts, self._places = [], {}
        return self.path

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for part in self._parts:
            part.close()

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _writer(self) -> _Part:
        if self._mine is None:
            raise OutputError(f"{self.path} is open for reading only.")
        return self._mine

    def _note(self, key: tuple[int, int], rows: int, part: _Part) -> None:
        """Labels win over a failure, whichever came first: a pair may be tried again."""
        if rows == _FAILED:
            if key not in self._counts:
                self._failures[key] = part.reason(key)
            return
        self._counts[key] = rows
        self._places[key] = part
        self._failures.pop(key, None)

    def _read_index(self) -> None:
        try:
            with h5py.File(self.path, "r") as file:
                index = file[_INDEX]
                pairs, counts = index["pairs"][()].tolist(), index["counts"][()].tolist()
                failed = index["failed"][()].tolist()
                reasons = [text.decode() for text in index["reasons"][()]]
        except (OSError, KeyError) as error:
            raise _damaged(self.path, error) from error
        self._counts = {(i, j): n for (i, j), n in zip(pairs, counts, strict=True)}
        self._failures = {(i, j): text for (i, j), text in zip(failed, reasons, strict=True)}


def begin_anew(path: str | os.PathLike[str]) -> None:
    """Remove the labels of a labeller. No other process may be writing."""
    path = Path(path)
    path.unlink(missing_ok=True)
    folder = _parts_folder(path)
    if folder.is_dir():
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)


class _Part:
    """Records of one worker.

    Args:
        path: of the file.
        write: append to the file, which is begun with this or must have been; None reads it as far
            as it is complete and never changes it, since another process may be writing.
    """

    def __init__(self, path: Path, write: StoreInfo | None = None) -> None:
        self.path = path
        self.info: StoreInfo | None = None
        self.records: dict[tuple[int, int], tuple[int, int, int]] = {}  # rows, offset, bytes
        self._reasons: dict[tuple[int, int], str] = {}
        self._file: BinaryIO | None = None
        self._mutex = threading.Lock()
        self._end = self._scan() if path.exists() else 0
        if write is None:
            return
        if self.info is not None:
            _require_same(path, write, self.info)
        self.info = write
        try:
            self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._file.truncate(self._end)
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error}.") from None
        if self._end == 0:
            self.append(0, 0, _INFO, write.to_json().encode())
            self.records.clear()

    def _scan(self) -> int:
        """Index the complete records; returns where they end."""
        end = 0
        with open(self.path, "rb") as file:
            for i, j, rows, body in _records(file):
                start = file.tell() - len(body)
                end = file.tell()
                if rows == _INFO:
                    self.info = StoreInfo.from_json(body.decode())
                    continue
                self.records[i, j] = (rows, start, len(body))
                if rows == _FAILED:
                    self._reasons[i, j] = body.decode(errors="replace")
                else:
                    self._reasons.pop((i, j), None)
        return end

    def reason(self, key: tuple[int, int]) -> str:
        """Why a pair failed."""
        return self._reasons[key]

    def read(self, key: tuple[int, int]) -> np.ndarray:
        """(n, 4) float32 labels of a pair."""
        rows, start, size = self.records[key]
        with self._mutex:  # crops are read ahead in several threads
            if self._file is None:
                self._file = open(self.path, "rb")  # noqa: SIM115
            self._file.seek(start)
            body = self._file.read(size)
        if len(body) != size:
            raise _damaged(self.path, "it has become shorter")
        return np.frombuffer(body, "<f4").reshape(rows, 4).astype(np.float32)

    def append(self, i: int, j: int, rows: int, body: bytes) -> None:
        """Add a record with one write."""
        if self._file is None:
            raise OutputError(f"{self.path} is not open for writing.")
        head = _HEADER.pack(_MAGIC, i, j, rows, len(body), 0)
        crc = zlib.crc32(body, zlib.crc32(head[4:-4]))
        try:
            with self._mutex:
                self._file.seek(self._end)
                self._file.write(head[:-4] + struct.pack("<I", crc) + body)
                self._file.flush()
        except OSError as error:
            raise OutputError(
                f"Cannot write {self.path}: {error}. What was finished is kept; make room and "
                "repeat the command."
            ) from None
        self.records[i, j] = (rows, self._end + _HEADER.size, len(body))
        if rows == _FAILED:
            self._reasons[i, j] = body.decode()
        self._end += _HEADER.size + len(body)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _records(file: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield i, j, rows and body of the complete records; stops at the first torn one."""
    while True:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return
        magic, i, j, rows, size, crc = _HEADER.unpack(head)
        if magic != _MAGIC:
            return
        body = file.read(size)
        if len(body) < size or zlib.crc32(body, zlib.crc32(head[4:-4])) != crc:
            return
        yield i, j, rows, body


def _parts_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _file_info(path: Path) -> StoreInfo:
    try:
        with h5py.File(path, "r") as file:
            return StoreInfo.from_json(file.attrs["settings"])
    except (OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _require_same(place: Path, mine: StoreInfo, other: StoreInfo) -> None:
    different = other.differences(mine)
    if different:
        raise OutputError(
            f"{place} was made with other settings ({', '.join(different)}): choose another output "
            "folder, or begin anew (--overwrite)."
        )


def _damaged(path: Path, error: object) -> OutputError:
    return OutputError(f"{path} is damaged ({error}): delete it and label the video again.")
