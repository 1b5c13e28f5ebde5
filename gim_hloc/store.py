"""Features and matches on disk: kept in a cache, exchanged in hloc's h5 layout.

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
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gim_hloc import cache, hloc_files
from gim_hloc.errors import InputError, OutputError
from gim_hloc.types import SparseEncoding

logger = logging.getLogger(__name__)

Entry = tuple[dict[str, np.ndarray], dict[str, Any]]  # datasets, attributes


# ---------------------------------------------------------------------------------------- hashing


def digest(value: Any) -> str:
    """Short stable hash of a JSON-able value (keys sorted)."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


# --------------------------------------------------------------------------------------- h5 files


class H5Store:
    """Entries by name: kept in a cache, and written for others to an h5 file of the current names.

    The cache lies beside the h5 file and keeps what other names, sources and settings left there,
    so that nothing is computed twice when they change back. Entries of an h5 file without a cache
    are read from it. One writer; many readers in this process.

    Args:
        path: the h5 file, which may not exist yet.
        settings: JSON-able; whatever decides the values of all entries.
        key_of: name -> h5 group.
        overwrite: start over.
        cache_file: the cache, where it is not the one beside the h5 file.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        key_of: Callable[[str], str] | None = None,
        overwrite: bool = False,
        cache_file: Path | None = None,
    ) -> None:
        self.path = path
        self.settings = settings
        self.stamp = digest(settings)
        self.changed_settings: list[str] = []  # names of settings that differ from the file's
        self._group = key_of or (lambda name: name)
        self._sources: dict[str, str] = {}  # name -> source of the entry that counts now
        self._written: dict[str, list[Any]] = {}  # name -> source and checksum in the h5 file
        self._file: h5py.File | None = None
        self._mutex = threading.Lock()
        self.cache_file = cache_file or cache_path(path)
        if overwrite:
            remove_cache(self.cache_file)
        elif path.exists():
            self._open_file()
        self._cache = cache.Cache(self.cache_file)

    def _open_file(self) -> None:
        try:
            self._file = h5py.File(self.path, "r")
            old_settings = json.loads(self._file.attrs.get("settings", "{}"))
            if self._file.attrs.get("settings_hash") == self.stamp:
                sources = json.loads(self._file.attrs.get("sources", "{}"))
                # Files of 0.1 have no checksums.
                self._written = {
                    name: given if isinstance(given, list) else [given, None]
                    for name, given in sources.items()
                }
            else:
                keys = {*old_settings, *self.settings}
                self.changed_settings = sorted(
                    k for k in keys if old_settings.get(k) != self.settings.get(k)
                )
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            hloc_files.raise_of_system(error, self.path)
            logger.warning("%s is damaged (%s): it is written again.", self.path, error)
            self._close_file()

    def count(self) -> int:
        """Number of entries that are there for these settings, whatever they were made from."""
        return len({*self._written, *self._sources})

    def has(self, name: str, source: str) -> bool:
        """Whether a whole entry made from ``source`` is there."""
        if self._sources.get(name) == source:
            return True
        found = self._load(name, source) is not None
        if found:
            self._sources[name] = source
        return found

    def put(
        self, name: str, arrays: Mapping[str, np.ndarray], source: str, **attributes: Any
    ) -> None:
        """Store an entry; it survives the process as soon as this returns."""
        self._cache.put(self._key(name, source), _with_attributes(arrays, attributes))
        self._sources[name] = source

    def get(self, name: str) -> Entry:
        """Read an entry that ``has`` found or ``put`` stored.

        Raises:
            OutputError: when it was lost meanwhile.
        """
        source = self.source(name)
        found = None if source is None else self._load(name, source)
        if found is None:
            raise OutputError(
                f"{self.cache_file} lost the entry {name!r}. Repeat the command: it is computed "
                "again."
            )
        return found

    def source(self, name: str) -> str | None:
        """What the entry is made from that ``get`` gives; None where there is none."""
        return self._sources.get(name) or self._written.get(name, [None])[0]

    def _key(self, name: str, source: str) -> str:
        return cache.key(self.stamp, name, source)

    def _load(self, name: str, source: str) -> Entry | None:
        arrays = self._cache.get(self._key(name, source))
        if arrays is not None:
            return _without_attributes(arrays, source)
        given, checksum = self._written.get(name, (None, None))
        if given != source:
            return None
        found = self._read_file(name)
        if found is not None and checksum in (None, _checksum(found[0])):
            return found
        logger.warning("%s: the entry %r is damaged; it is computed again.", self.path, name)
        del self._written[name]
        return None

    def _read_file(self, name: str) -> Entry | None:
        try:
            with self._mutex:
                if self._file is None:
                    return None
                group = self._file[self._group(name)]
                arrays = {k: v[()] for k, v in group.items() if isinstance(v, h5py.Dataset)}
                return arrays, {k: _plain(v) for k, v in group.attrs.items()}
        except (KeyError, OSError, ValueError, AttributeError, RuntimeError, TypeError) as error:
            hloc_files.raise_of_system(error, self.path)
            return None  # h5py has many words for damage

    def finalize(
        self, names: Sequence[str], attributes: Mapping[str, Any], *, keep: bool = True
    ) -> None:
        """Write the h5 file with exactly ``names``, unless it holds them already.

        Args:
            names: of entries that are there.
            attributes: of the file.
            keep: keep the cache; else all is in the h5 file alone.
        """
        if not self._holds(names):
            self._write(names, attributes)
        if not keep:
            self._cache.close()
            remove_cache(self.cache_file)
            self._cache = cache.Cache(self.cache_file)

    def _holds(self, names: Sequence[str]) -> bool:
        """Whether the h5 file has exactly these entries, all of them whole."""
        if self._file is None or set(self._written) != set(names):
            return False
        for name in names:
            source, checksum = self._written[name]
            wanted = self._sources.get(name, source)
            found = self._read_file(name) if source == wanted else None
            if checksum is None or found is None or _checksum(found[0]) != checksum:
                return False
        return True

    def _write(self, names: Sequence[str], attributes: Mapping[str, Any]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        written: dict[str, list[Any]] = {}
        try:
            with h5py.File(temporary, "w", libver="latest") as file:
                for name in names:
                    arrays, entry_attributes = self.get(name)
                    group = file.create_group(self._group(name))
                    for label, value in arrays.items():
                        group.create_dataset(label, data=value)
                    group.attrs.update(entry_attributes)
                    if "keypoints" in arrays:
                        group["keypoints"].attrs["uncertainty"] = entry_attributes.get(
                            "uncertainty", 1.0
                        )
                    written[name] = [entry_attributes["source"], _checksum(arrays)]
                file.attrs["settings"] = json.dumps(self.settings, sort_keys=True, default=str)
                file.attrs["settings_hash"] = self.stamp
                # One JSON text rather than thousands of attribute reads when the file is opened.
                _large_attribute(file, "sources", json.dumps(written, ensure_ascii=False))
                for label, value in attributes.items():
                    file.attrs[label] = value
        except OSError as error:
            raise OutputError(
                f"Cannot write {temporary}: {error}. What was finished is kept; make room and "
                "repeat the command."
            ) from None
        self._close_file()
        os.replace(temporary, self.path)
        self._file = h5py.File(self.path, "r")
        self._written = written

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self, path: Path) -> int:
        """Take over what a part of an array job left in its cache; the number of entries."""
        return self._cache.merge(path)

    def kept(self) -> tuple[cache.Cache, set[str]]:
        """The cache, and the keys in it that were asked for or put here."""
        return self._cache, {self._key(name, source) for name, source in self._sources.items()}

    def close(self) -> None:
        """Close all files."""
        self._close_file()
        self._cache.close()


def cache_path(path: Path) -> Path:
    """The cache that belongs to an h5 file."""
    return path.with_suffix(".cache")


def remove_cache(path: Path) -> None:
    """Delete a cache with what SQLite keeps beside it."""
    for ending in ("", "-wal", "-shm", "-journal", ".damaged"):
        Path(f"{path}{ending}").unlink(missing_ok=True)


_ATTRIBUTES = "__attributes__"  # name of the array that holds an entry's attributes as JSON


def _with_attributes(
    arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    text = json.dumps(attributes, ensure_ascii=False).encode()
    return {**arrays, _ATTRIBUTES: np.frombuffer(text, np.uint8)}


def _without_attributes(arrays: dict[str, np.ndarray], source: str) -> Entry:
    text = arrays.pop(_ATTRIBUTES).tobytes()
    return arrays, {**json.loads(text), "source": source}


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        crc = zlib.crc32(f"{name} {value.dtype.str} {value.shape}".encode(), crc)
        crc = zlib.crc32(value.tobytes(), crc)
    return crc


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _large_attribute(file: h5py.File, name: str, text: str) -> None:
    # Needs libver="latest": the old format limits an attribute to 64 KiB.
    file.attrs.create(name, text, dtype=h5py.string_dtype())


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


def read_encoding(path: Path, name: str) -> SparseEncoding:
    """Read the encoding of an image back from a finished file of ours."""
    with hloc_files.open_h5(path) as file:
        group = hloc_files.group(file, name)
        if group is None:
            raise InputError(f"{path} holds no features of {name!r}.")
        arrays = {k: hloc_files.read(group, k) for k in group if hloc_files.find(group, k)}
        return SparseEncoding.from_arrays(name, arrays, dict(group.attrs))


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
