"""Labels of one video by one labeller in one round: kept in a cache, given to others as an h5 file.

The cache beside the h5 file holds what was made with whatever settings, so that no pair is labelled
twice when they change and change back; a shard has one of its own, which the next run on the whole
takes over. The h5 file has the labels of one setting. It is written when all pairs were tried, and
what it held before stands until then.

Its layout: a dataset ``<i>_<j>`` (n, 4) float32 for every labelled pair of frames, and in the group
``index`` the datasets ``pairs`` (P, 2) int64, ``counts`` (P,) int64, ``failed`` (F, 2) int64 and
``reasons`` (F,) text, all sorted by pair. Its attributes are those of `StoreInfo`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gim_hloc import cache
from gim_hloc.errors import InputError, OutputError

logger = logging.getLogger(__name__)

Pair = tuple[int, int]

_INDEX = "index"
_CURE = "Repeat the same gim-video label, which writes it again."
_FAILED = "/failed"  # end of the keys of entries that say why a pair has no labels


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What labels are about; ``steps`` and ``gap`` say which pairs, all else decides the labels."""

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

    @property
    def name(self) -> str:
        """Name of the labelling round, for people."""
        return f"{self.labeller}{' (zoom)' if self.zoom else ''}"

    def _decisive(self) -> dict[str, Any]:
        values = json.loads(self.to_json())
        names = ("video", "labeller", "zoom", "size")
        return {**values["settings"], **{name: values[name] for name in names}}

    @property
    def stamp(self) -> str:
        """Digest of what decides the labels."""
        return cache.key(self._decisive())

    def differences(self, other: StoreInfo) -> list[str]:
        """Names of what decides labels and differs."""
        mine, theirs = self._decisive(), other._decisive()
        return [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]


class LabelStore:
    """The h5 file of a labelling round, for reading; a context manager.

    Args:
        path: of the file.

    Raises:
        InputError: there is none, or it is damaged.
        OutputError: the system does not let it be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise InputError(f"There are no labels {path}: label the video first.")
        with told_damage(path, "the file", _CURE):
            self._file = h5py.File(path, "r")
        try:
            with told_damage(path, "its index", _CURE):
                self.info = StoreInfo.from_json(self._file.attrs["settings"])
                index = {name: data[()] for name, data in self._file[_INDEX].items()}
                rows = zip(index["pairs"].tolist(), index["counts"].tolist(), strict=True)
                self._counts: dict[Pair, int] = {(i, j): n for (i, j), n in rows}
                told = zip(index["failed"].tolist(), index["reasons"], strict=True)
                self._failures: dict[Pair, str] = {(i, j): why.decode() for (i, j), why in told}
        except BaseException:
            self.close()
            raise

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
        return (i, j) in self._counts

    def read(self, i: int, j: int) -> np.ndarray:
        """(n, 4) float32 x0, y0, x1, y1 in pixels of the frames, hloc's frame.

        Raises:
            InputError: the pair has no labels, or they are damaged.
            OutputError: the system does not let the file be read.
        """
        if (i, j) not in self._counts:
            why = self._failures.get((i, j), "it was never tried")
            raise InputError(f"{self.path} has no labels of frames {i} and {j}: {why}.")
        with told_damage(self.path, f"frames {i} and {j}", _CURE):
            labels: np.ndarray = self._file[f"{i}_{j}"][()]
        return labels

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LabelWriter:
    """Labels of a round in the making; a context manager. One process at a time has it.

    Args:
        path: of the h5 file that will hold them.
        info: what they are about.
        shard: (i, N), the part of the pairs that this process labels.
        overwrite: forget what was made with these settings.

    Attributes:
        counts: labels of each pair that has some.
        failures: why other pairs have none.

    Raises:
        LockedError: another process has the cache.
        OutputError: it cannot be written, or there are labels that 0.1 did not finish.
    """

    def __init__(
        self,
        path: Path,
        info: StoreInfo,
        *,
        shard: tuple[int, int] = (0, 1),
        overwrite: bool = False,
    ) -> None:
        self.path, self.info = path, info
        self._stamp = info.stamp
        self.counts: dict[Pair, int] = {}
        self.failures: dict[Pair, str] = {}
        parts = path.with_name(f"{path.name}.parts")
        if parts.exists():
            raise OutputError(
                f"{parts} holds labels that gim-hloc 0.1 did not finish. Finish them with 0.1, or "
                "delete that folder: its pairs are then labelled anew."
            )
        name = path.stem if shard[1] == 1 else f"{path.stem}.{shard[0]}-of-{shard[1]}"
        place = path.with_name(f"{name}.cache")
        self._cache = cache.Cache(place)
        try:
            if shard[1] == 1:
                for other in sorted(path.parent.glob(f"{path.stem}.*-of-*.cache")):
                    self._cache.merge(other)
                    other.unlink()
            if overwrite:
                self._cache.prune(set(itertools.filterfalse(self._mine, self._cache.keys())))
            self._read_all()
            if path.exists():
                self._take_over(overwrite)
        except BaseException:
            self.close()
            raise

    def _take_over(self, overwrite: bool) -> None:
        """Keep what only the h5 file has, such as one of 0.1; tell that it has other settings."""
        try:
            with LabelStore(self.path) as store:
                stamp = store.info.stamp
                if stamp != self._stamp:
                    logger.info(
                        "%s was made with other settings (%s): it stands until these labels are "
                        "complete, and its own are kept.",
                        self.path,
                        ", ".join(self.info.differences(store.info)),
                    )
                elif overwrite:
                    return
                for i, j in store.pairs().tolist():
                    if _key(stamp, i, j) not in self._cache:
                        self._keep(stamp, i, j, store.read(i, j))
                for i, j, why in store.failures():
                    if _key(stamp, i, j) + _FAILED not in self._cache:
                        self._keep(stamp, i, j, why)
        except InputError as error:
            logger.warning("%s", error)

    def _keep(self, stamp: str, i: int, j: int, what: np.ndarray | str) -> None:
        if isinstance(what, str):
            self._cache.put(_key(stamp, i, j) + _FAILED, {"why": np.array(what)})
        else:
            self._cache.put(_key(stamp, i, j), {"labels": what.astype(np.float32)})
        if stamp == self._stamp:
            self._note(i, j, what)

    def _note(self, i: int, j: int, what: np.ndarray | str) -> None:
        """Labels win over a failure, whichever came first: a pair may have been tried again."""
        if not isinstance(what, str):
            self.counts[i, j] = len(what)
            self.failures.pop((i, j), None)
        elif (i, j) not in self.counts:
            self.failures[i, j] = what

    def _mine(self, key: str) -> bool:
        return key.startswith(f"{self._stamp}/")

    def _read_all(self) -> None:
        """Find what is there and whole."""
        for key in filter(self._mine, self._cache.keys()):
            arrays = self._cache.get(key)
            if arrays is None:
                continue
            i, j = (int(n) for n in key.split("/")[1].split("_"))
            self._note(i, j, str(arrays["why"]) if key.endswith(_FAILED) else arrays["labels"])

    def read(self, i: int, j: int) -> np.ndarray:
        """(n, 4) float32 labels of a pair that has some.

        Raises:
            OutputError: they were damaged meanwhile.
        """
        arrays = self._cache.get(_key(self._stamp, i, j))
        if arrays is None:
            raise OutputError(
                f"{self._cache.path} lost the labels of frames {i} and {j}. Repeat the command: "
                "they are made again."
            )
        return arrays["labels"]

    def put(self, i: int, j: int, labels: np.ndarray) -> None:
        """Keep the labels of a pair; they survive the process as soon as this returns.

        Args:
            i: first frame.
            j: second frame.
            labels: (n, 4) x0, y0, x1, y1 in pixels of the frames, hloc's frame; n > 0.

        Raises:
            OutputError: the disk is full.
        """
        if labels.ndim != 2 or labels.shape[1] != 4 or not len(labels):
            raise ValueError(f"Labels must be (n, 4) with n > 0; they are {labels.shape}.")
        self._keep(self._stamp, i, j, labels)

    def fail(self, i: int, j: int, reason: str) -> None:
        """Note that a pair was tried and has no labels.

        Raises:
            OutputError: as `put`.
        """
        self._keep(self._stamp, i, j, reason)

    def write(self) -> None:
        """Write the h5 file with all that is there, unless it says the same.

        Raises:
            OutputError: it cannot be written; what it held before is then as it was.
        """
        found = {j - i for i, j in (*self.counts, *self.failures)}
        info = dataclasses.replace(self.info, steps=tuple(sorted(found | set(self.info.steps))))
        if self._is_in(self.path, info):
            return
        with h5_aside(self.path, lambda path: self._is_in(path, info)) as file:
            for i, j in sorted(self.counts):
                write_checked(file, f"{i}_{j}", self.read(i, j))
            index = file.create_group(_INDEX)
            pairs, failed = sorted(self.counts), sorted(self.failures)
            counts = [self.counts[pair] for pair in pairs]
            write_checked(index, "pairs", np.array(pairs, np.int64).reshape(-1, 2))
            write_checked(index, "counts", np.array(counts, np.int64))
            write_checked(index, "failed", np.array(failed, np.int64).reshape(-1, 2))
            reasons = [self.failures[pair] for pair in failed]
            index.create_dataset("reasons", data=reasons, dtype=h5py.string_dtype())
            for name, value in dataclasses.asdict(info).items():
                # Settings may exceed what an attribute can hold in old versions of the format.
                file.attrs[name] = info.to_json() if name == "settings" else value

    def _is_in(self, path: Path, info: StoreInfo) -> bool:
        """Whether an h5 file says just this, whole."""
        try:
            with LabelStore(path) as store:
                return (
                    store.info.to_json() == info.to_json()
                    and store.failures()
                    == [(*pair, self.failures[pair]) for pair in sorted(self.failures)]
                    and [tuple(pair) for pair in store.pairs().tolist()] == sorted(self.counts)
                    and all(np.array_equal(store.read(*p), self.read(*p)) for p in self.counts)
                )
        except InputError as error:
            if path.exists():
                logger.warning("%s", error)
            return False

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()

    def __enter__(self) -> LabelWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _key(stamp: str, i: int, j: int) -> str:
    return f"{stamp}/{i}_{j}"


@contextlib.contextmanager
def told_damage(path: Path, what: str, cure: str) -> Iterator[None]:
    """Tell damage of an h5 file from what the system refuses.

    Raises:
        InputError: ``what`` is damaged; says ``cure``.
        OutputError: the system does not let it be read.
    """
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise OutputError(f"{path} cannot be read: {_words(error)}.") from None
        raise InputError(f"{path} is damaged ({what}: {_words(error)}). {cure}") from None


def _words(error: Exception) -> str:
    """What went wrong, without the numbers that HDF5 adds on lines of their own."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else f"{error}\n".splitlines()[0]


def write_checked(place: h5py.Group, name: str, data: np.ndarray) -> None:
    """Write a dataset whose damage HDF5 notices when it is read."""
    checked = {"chunks": data.shape, "fletcher32": True} if data.size else {}
    place.create_dataset(name, data=data, **checked)


@contextlib.contextmanager
def h5_aside(path: Path, whole: Callable[[Path], bool]) -> Iterator[h5py.File]:
    """An h5 file that takes the place of ``path`` once it was read back.

    Args:
        path: of the file; its folder must exist.
        whole: whether the file at a path holds what was written.

    Raises:
        OutputError: it cannot be written; what was there is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w", libver="latest") as file:
            yield file
        if not whole(temporary):  # a full disk need not be an error
            raise OSError("what was written cannot be read back")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # of HDF5, when a file is closed
        raise OutputError(
            f"{path} cannot be written: {_words(error)}. What is finished is kept; make room "
            "and repeat the command."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
