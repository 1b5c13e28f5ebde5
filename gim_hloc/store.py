"""Features and matches on disk: hloc's h5 layout, safe against being killed at any moment.

HDF5 files that are cut off in the middle of a write are often lost as a whole. While a run works,
finished entries are therefore appended to a *journal* beside the h5 file (one checksummed record an
entry); when the step is complete, the journal and what is still valid of an earlier h5 file are
written to a new h5 file, which replaces the old one in one step. A torn record at the end of a
journal is recognised by its checksum and only that entry is computed again.

Layout (hloc's, ``hloc/utils/io.py``): one group a name, ``keypoints`` (N, 2) float32 in stored
pixels with integer = pixel centre, ``descriptors`` (D, N) float16, ``scores`` (N), ``image_size``
(2) w, h; one group a pair, ``matches0`` (N0) int32 with -1 = none, ``matching_scores0`` (N0).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch

from gim_hloc import hloc_files
from gim_hloc.errors import InputError, LockedError, OutputError
from gim_hloc.matchers.base import Matches, SparseEncoding
from gim_hloc.matchers.sparse import make_encoding

logger = logging.getLogger(__name__)

_MAGIC = b"GIMJ"
_HEADER = struct.Struct("<4sIII")  # magic, length of the head, length of the body, crc32 of both

Entry = tuple[dict[str, np.ndarray], dict[str, Any]]  # datasets, attributes


# ---------------------------------------------------------------------------------------- hashing


def digest(value: Any) -> str:
    """Short stable hash of a JSON-able value (keys sorted)."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


# ---------------------------------------------------------------------------------------- locking


_PRODUCTS = ("sparse", "database.db", "features.h5", "matches.h5", "report.html", "report.json")


def refuse_foreign(folder: Path, *, other: str) -> None:
    """Refuse an output folder that holds what a run would replace, but that no such run made.

    A scene's own folder, with a COLMAP model in ``sparse/``, is easily given as the output.

    Args:
        folder: output folder; it need not exist.
        other: a file that only the other command leaves.

    Raises:
        OutputError: names what is in the way.
    """
    ours = any((folder / name).exists() for name in (".lock", "log.txt", "run.yaml"))
    found = [name for name in _PRODUCTS if (folder / name).exists()]
    if found and (not ours or (folder / other).exists()):
        raise OutputError(
            f"{folder} holds {' and '.join(found)} of something else, which would be replaced: "
            "choose another output folder, or move that away."
        )


class OutputLock:
    """Holds an output folder for one run. The system releases it when the process ends.

    Args:
        folder: output folder; made if missing.

    Raises:
        LockedError: when another run holds the folder.
        OutputError: when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 - held until close
        except OSError as error:
            raise OutputError(f"Cannot write to {folder}: {error}") from None
        try:
            _lock_file(self._file)
        except OSError:
            self._file.seek(0)
            owner = self._file.read(100).decode(errors="replace").strip()
            self._file.close()
            raise LockedError(
                f"Another run is working in {folder}"
                + (f" (process {owner})" if owner else "")
                + ". Wait for it, or choose another output folder."
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()).encode())
        self._file.flush()

    def close(self) -> None:
        """Give the folder back. The lock file stays: removing it would race with a waiting run."""
        self._file.close()

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock_file(file: BinaryIO) -> None:
    if os.name == "nt":
        import msvcrt

        # The byte lies far past the end so that other runs can still read the owner.
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        file.seek(0)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------------------------------- journal


class Journal:
    """Append-only file of named entries, each complete or recognisably torn.

    Thread-safe. The system keeps what was written when the process is killed.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        self.settings = settings
        self.torn = 0  # bytes dropped from the end of an earlier run's journal
        self._offsets: dict[str, tuple[int, int, int]] = {}
        self._attributes: dict[str, dict[str, Any]] = {}
        self._mutex = threading.Lock()
        end = self._scan() if path.exists() else 0
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._file.truncate(end)
        self._file.seek(end)
        self._end = end
        if end == 0:
            self._write({"settings": settings}, b"")

    def _scan(self) -> int:
        """Index the complete records; returns where they end, 0 if the settings differ."""
        size = self.path.stat().st_size
        position = 0
        with open(self.path, "rb") as file:
            while True:
                raw = file.read(_HEADER.size)
                if len(raw) < _HEADER.size:
                    break
                magic, head_length, body_length, crc = _HEADER.unpack(raw)
                start = position + _HEADER.size
                if magic != _MAGIC or start + head_length + body_length > size:
                    break
                head_bytes, body = file.read(head_length), file.read(body_length)
                if zlib.crc32(body, zlib.crc32(head_bytes)) != crc:
                    break
                head = json.loads(head_bytes)
                if position == 0:
                    if head.get("settings") != self.settings:
                        logger.info("%s was written with other settings: started anew.", self.path)
                        return 0
                else:
                    self._offsets[head["name"]] = (start, head_length, body_length)
                    self._attributes[head["name"]] = head["attributes"]
                position = start + head_length + body_length
        self.torn = size - position
        if self.torn:
            logger.warning(
                "%s ends in a torn record (the run was killed while writing it): %d bytes dropped,"
                " that entry is computed again.",
                self.path,
                self.torn,
            )
        return position

    def _write(self, head: dict[str, Any], body: bytes) -> tuple[int, int, int]:
        head_bytes = json.dumps(head, ensure_ascii=False).encode()
        crc = zlib.crc32(body, zlib.crc32(head_bytes))
        record = _HEADER.pack(_MAGIC, len(head_bytes), len(body), crc) + head_bytes + body
        self._file.seek(self._end)
        self._file.write(record)
        self._file.flush()
        place = (self._end + _HEADER.size, len(head_bytes), len(body))
        self._end += len(record)
        return place

    def append(self, name: str, arrays: Mapping[str, np.ndarray], attributes: dict) -> None:
        """Add an entry; it survives the process as soon as this returns."""
        described, parts = [], []
        for key, value in arrays.items():
            value = np.ascontiguousarray(value)
            described.append([key, value.dtype.str, list(value.shape)])
            parts.append(value.tobytes())
        head = {"name": name, "arrays": described, "attributes": attributes}
        with self._mutex:
            try:
                self._offsets[name] = self._write(head, b"".join(parts))
            except OSError as error:
                raise OutputError(
                    f"Cannot write {self.path}: {error}. What was finished is kept; make room and "
                    "repeat the command."
                ) from None
            self._attributes[name] = attributes

    def read(self, name: str) -> Entry:
        """Read an entry back."""
        start, head_length, body_length = self._offsets[name]
        with self._mutex:
            self._file.seek(start)
            head = json.loads(self._file.read(head_length))
            body = self._file.read(body_length)
        arrays, position = {}, 0
        for key, dtype, shape in head["arrays"]:
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(body, np.dtype(dtype), count, position).reshape(shape)
            arrays[key] = array
            position += array.nbytes
        return arrays, head["attributes"]

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of an entry without reading its arrays."""
        return self._attributes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def names(self) -> list[str]:
        """Names of the entries, oldest first."""
        return list(self._offsets)

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and delete it when its content stands elsewhere."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- h5 files


class H5Store:
    """An h5 file of entries with its journal. One writer; many readers in this process.

    An entry is valid when the file's settings equal ``settings`` and its ``source`` attribute
    equals the hash of what it was made from.

    Args:
        path: the h5 file, which may not exist yet.
        settings: JSON-able; whatever decides the values of all entries.
        key_of: name -> h5 group.
        overwrite: start over.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        key_of: Callable[[str], str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.settings = settings
        self.stamp = digest(settings)
        self.changed_settings: list[str] = []  # names of settings that differ from the file's
        self._key = key_of or (lambda name: name)
        self._old: h5py.File | None = None
        self._valid: dict[str, str] = {}  # name -> source
        self._mutex = threading.Lock()
        journal_path = path.with_name(path.name + ".journal")
        if overwrite:
            journal_path.unlink(missing_ok=True)
        elif path.exists():
            self._open_old()
        self._journal_path = journal_path
        self._journal: Journal | None = (
            Journal(journal_path, self.stamp) if journal_path.exists() else None
        )

    def _open_old(self) -> None:
        try:
            file = h5py.File(self.path, "r")
            stamp = file.attrs.get("settings_hash")
            old_settings = json.loads(file.attrs.get("settings", "{}"))
            if stamp == self.stamp:
                self._valid = dict(json.loads(file.attrs.get("sources", "{}")))
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s is damaged (%s): its content is computed again.", self.path, error)
            return
        if stamp != self.stamp:
            keys = {*old_settings, *self.settings}
            self.changed_settings = sorted(
                k for k in keys if old_settings.get(k) != self.settings.get(k)
            )
            file.close()
            return
        self._old = file

    def count(self) -> int:
        """Number of entries that are there, whatever they were made from."""
        journal = self._journal.names() if self._journal is not None else []
        return len({*self._valid, *journal})

    def has(self, name: str, source: str) -> bool:
        """Whether a valid entry made from ``source`` is there."""
        if self._journal is not None and name in self._journal:
            return bool(self._journal.attributes(name).get("source") == source)
        return self._valid.get(name) == source

    def put(
        self, name: str, arrays: Mapping[str, np.ndarray], source: str, **attributes: Any
    ) -> None:
        """Store an entry; it survives the process as soon as this returns."""
        with self._mutex:
            if self._journal is None:
                self._journal = Journal(self._journal_path, self.stamp)
        self._journal.append(name, arrays, {"source": source, **attributes})

    def get(self, name: str) -> Entry:
        """Read an entry.

        Raises:
            OutputError: when the file lost it.
        """
        if self._journal is not None and name in self._journal:
            return self._journal.read(name)
        try:
            with self._mutex:
                if self._old is None:
                    raise KeyError(name)
                group = self._old[self._key(name)]
                arrays = {k: v[()] for k, v in group.items() if isinstance(v, h5py.Dataset)}
                return arrays, {k: _plain(v) for k, v in group.attrs.items()}
        except (KeyError, OSError) as error:
            raise OutputError(
                f"{self.path} lost the entry {name!r} ({error}): repeat with --overwrite."
            ) from None

    def finalize(self, names: Sequence[str], attributes: Mapping[str, Any]) -> None:
        """Write the h5 file with exactly ``names`` and drop the journal.

        Nothing is rewritten when the file holds them already.
        """
        if self._old is not None and not self._journal and set(self._valid) == set(names):
            self._drop_journal()
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        sources = {}
        try:
            with h5py.File(temporary, "w", libver="latest") as file:
                for name in names:
                    arrays, entry_attributes = self.get(name)
                    group = file.create_group(self._key(name))
                    for key, value in arrays.items():
                        group.create_dataset(key, data=value)
                    group.attrs.update(entry_attributes)
                    if "keypoints" in arrays:
                        group["keypoints"].attrs["uncertainty"] = entry_attributes.get(
                            "uncertainty", 1.0
                        )
                    sources[name] = entry_attributes["source"]
                file.attrs["settings"] = json.dumps(self.settings, sort_keys=True, default=str)
                file.attrs["settings_hash"] = self.stamp
                # One JSON text rather than thousands of attribute reads when the file is opened.
                _large_attribute(file, "sources", json.dumps(sources, ensure_ascii=False))
                for key, value in attributes.items():
                    file.attrs[key] = value
        except OSError as error:
            raise OutputError(
                f"Cannot write {temporary}: {error}. What was finished is kept; make room and "
                "repeat the command."
            ) from None
        if self._old is not None:
            self._old.close()
        os.replace(temporary, self.path)
        self._drop_journal()
        self._old = h5py.File(self.path, "r")
        self._valid = sources

    def _drop_journal(self) -> None:
        if self._journal is not None:
            self._journal.close(remove=True)
            self._journal = None

    def close(self) -> None:
        """Close all files; the journal stays for the next run if it holds anything."""
        if self._old is not None:
            self._old.close()
            self._old = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _large_attribute(file: h5py.File, name: str, text: str) -> None:
    # Needs libver="latest": the old format limits an attribute to 64 KiB.
    file.attrs.create(name, text, dtype=h5py.string_dtype())


# --------------------------------------------------------------------------------------- features


def encoding_to_arrays(encoding: SparseEncoding) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Datasets and attributes of a feature group in hloc's layout."""
    arrays: dict[str, np.ndarray] = {
        "keypoints": encoding.keypoints.cpu().numpy().astype(np.float32),
        "descriptors": encoding.descriptors.cpu().numpy().astype(np.float16).T,
        "scores": encoding.scores.cpu().numpy().astype(np.float32),
        "image_size": np.array(encoding.size, dtype=np.int64),
    }
    attributes: dict[str, Any] = {
        "network_size": [int(v) for v in encoding.network_size],
        "to_original": [float(v) for v in np.asarray(encoding.to_original).ravel()],
    }
    return arrays, attributes


def encoding_from_arrays(
    name: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> SparseEncoding:
    """Rebuild an encoding from its stored arrays; it matches exactly as the fresh one."""
    width, height = (int(v) for v in arrays["image_size"])
    network_width, network_height = (int(v) for v in attributes["network_size"])
    return make_encoding(
        name=name,
        size=(width, height),
        network_size=(network_width, network_height),
        to_original=np.asarray(attributes["to_original"], dtype=np.float64).reshape(2, 3),
        keypoints=torch.from_numpy(np.array(arrays["keypoints"], dtype=np.float32)),
        descriptors=torch.from_numpy(np.array(arrays["descriptors"].T, order="C")),
        scores=torch.from_numpy(np.array(arrays["scores"], dtype=np.float32)),
    )


# ---------------------------------------------------------------------------------------- matches


def pair_keys(names: Sequence[str]) -> dict[str, str]:
    """h5 key part of every image name.

    hloc writes ``/`` as ``-``, so that ``a/b.jpg`` and ``a-b.jpg`` collide. Names whose hloc key is
    unique keep it; of colliding ones, those with a slash are escaped (``%2F``) instead, which our
    reader knows and hloc's does not.
    """
    plain: dict[str, list[str]] = {}
    for name in names:
        plain.setdefault(name.replace("/", "-"), []).append(name)
    keys = {}
    for key, owners in plain.items():
        for name in owners:
            if len(owners) == 1 or "/" not in name:
                keys[name] = key
            else:
                keys[name] = name.replace("%", "%25").replace("/", "%2F")
    return keys


def matches_to_arrays(matches: Matches, num_keypoints0: int) -> dict[str, np.ndarray]:
    """``matches0`` (N0) int32 with -1 = none and ``matching_scores0`` (N0) float16."""
    matches0 = np.full(num_keypoints0, -1, dtype=np.int32)
    scores0 = np.zeros(num_keypoints0, dtype=np.float16)
    if matches.indices is None:
        raise InputError("These matches have no keypoint indices; link them into tracks first.")
    indices = matches.indices.cpu().numpy()
    matches0[indices[:, 0]] = indices[:, 1]
    scores0[indices[:, 0]] = matches.scores.cpu().numpy()
    return {"matches0": matches0, "matching_scores0": scores0}


def rows_from_matches0(matches0: np.ndarray) -> np.ndarray:
    """(M, 2) rows into the two images' keypoints from an hloc ``matches0`` array."""
    rows0 = np.flatnonzero(matches0 > -1)
    return np.stack([rows0, matches0[rows0]], axis=1).astype(np.uint32)


def scored_rows(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows (M, 2) of a pair's matches and their confidences (M,), None where there are none."""
    rows = rows_from_matches0(arrays["matches0"])
    scores = arrays.get("matching_scores0")
    return rows, None if scores is None else scores[rows[:, 0]].astype(np.float32)


# ---------------------------------------------------------------------------------- reading hloc's


def read_features(path: Path, name: str) -> dict[str, np.ndarray]:
    """Read one image's features from any file in hloc's layout."""
    with hloc_files.open_h5(path) as file:
        group = hloc_files.group(file, name)
        if group is None:
            raise InputError(f"{path} holds no features of {name!r}.")
        return {k: hloc_files.read(group, k) for k in group if hloc_files.find(group, k)}


@contextlib.contextmanager
def _opened(path: Path | h5py.File) -> Iterator[h5py.File]:
    """A file to read: opened here, or open already."""
    if isinstance(path, h5py.File):
        yield path
        return
    with hloc_files.open_h5(path) as file:
        yield file


def read_matches(path: Path | h5py.File, name0: str, name1: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one pair's matches from a file in hloc's layout, in either order.

    Returns:
        (M, 2) int64 rows into the keypoints of ``name0`` and ``name1``, and (M,) scores (1 where
        the file has none).

    Raises:
        InputError: the pair is not there, or what is there are no matches.
    """
    with _opened(path) as file:
        for a, b, swap in ((name0, name1, False), (name1, name0, True)):
            for key in _candidate_keys(a, b):
                if hloc_files.find(file, f"{key}/matches0") is not None:
                    rows, scores = _hlocs_matches(file, key)
                    return (rows[:, ::-1] if swap else rows), scores
    raise PairMissingError(f"{path} holds no matches of {name0!r} and {name1!r}.")


class PairMissingError(InputError):
    """A file holds no matches of a pair."""


def _hlocs_matches(file: h5py.File, key: str) -> tuple[np.ndarray, np.ndarray]:
    matches0 = hloc_files.read(file, f"{key}/matches0")
    if matches0.ndim != 1 or matches0.dtype.kind not in "iu":
        raise InputError(
            f"{file.filename}, {key}: matches0 are no row numbers (N,) but {matches0.dtype} of "
            f"shape {matches0.shape}."
        )
    rows0 = np.flatnonzero(matches0.astype(np.int64) > -1)
    rows = np.stack([rows0, matches0[rows0].astype(np.int64)], axis=1)
    scores = np.ones(len(rows), np.float32)
    if hloc_files.find(file, f"{key}/matching_scores0") is not None:
        stored = hloc_files.read(file, f"{key}/matching_scores0")
        if stored.shape != matches0.shape:
            raise InputError(
                f"{file.filename}, {key}: there are {len(matches0)} matches0 and "
                f"{stored.shape} matching_scores0."
            )
        scores = stored[rows0]
    return rows, scores


def _candidate_keys(a: str, b: str) -> Iterator[str]:
    def escaped(name: str) -> str:
        return name.replace("%", "%25").replace("/", "%2F")

    plain_a, plain_b = a.replace("/", "-"), b.replace("/", "-")
    # Escaped keys first: where they exist, the plain key belongs to another image.
    if "/" in a or "/" in b:
        yield f"{escaped(a) if '/' in a else a}/{escaped(b) if '/' in b else b}"
        yield f"{escaped(a) if '/' in a else a}/{plain_b}"
        yield f"{plain_a}/{escaped(b) if '/' in b else b}"
    yield f"{plain_a}/{plain_b}"
    yield f"{plain_a}_{plain_b}"  # hloc's old layout
