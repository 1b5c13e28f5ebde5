"""Propagated labels on disk: one h5 file per video, which training reads.

Pairs are named by the frames that were *asked for*; the frames that the labels truly belong to
stand beside them. Labels are original frame pixels in hloc's frame (integer = pixel centre).

Finished pairs go to a cache beside the file, which keeps them for when options change back; the h5
file itself is replaced in one step when all starts are done. Layout: one group ``<a>_<b>`` a
requested pair with the dataset ``labels`` (n, 4) float32 and attributes; the file's attribute
``records`` lists all starts, failed ones included, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gim_hloc import cache
from gim_hloc.errors import InputError, OutputError
from gim_hloc.training.video.store import h5_aside, told_damage, write_checked

logger = logging.getLogger(__name__)

_CURE = "Run `gim-video propagate` again, which writes it anew."
#: Part of the settings: raised when the same labels would be propagated to other values.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What the labels of a video say about it."""

    video: str  # id, or name of the file or folder without suffix
    size: tuple[int, int]  # (width, height) of its frames in pixels
    fps: float | None = None  # frame indices a second; None where it is not known
    gap: int | None = None  # between sampled frames, in frame indices


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """What became of one start frame, without its labels.

    Attributes:
        start, target: the pair of frames asked for; the target is in practice the video's end.
        reached: first and last frame of the chain; None where there is none. What was recorded is
            always where the chain truly begins, also when that is later than ``start``.
        joined: labels at the end of the chain, before the last robust fit.
        count: labels kept; 0 for a failed start.
        hops: segments of the chain.
        ended: why the chain went no further.
        failure: why there are no labels; empty for a success.
    """

    start: int
    target: int
    reached: tuple[int, int] | None
    joined: int
    count: int
    hops: int
    ended: str
    failure: str = ""

    @property
    def name(self) -> str:
        """Name in the store."""
        return pair_name(self.start, self.target)

    @property
    def distance(self) -> int:
        """Frames between the two ends of the chain; 0 where there is none."""
        return 0 if self.reached is None else self.reached[1] - self.reached[0]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StartRecord:
        """The inverse of ``dataclasses.asdict`` after a round trip through JSON."""
        reached = value["reached"]
        return cls(**{**value, "reached": None if reached is None else tuple(reached)})


def pair_name(start: int, target: int) -> str:
    """Name of a requested pair in the store."""
    return f"{start}_{target}"


class PropagatedStore:
    """Reads the propagated labels of one video.

    It may be sent to other processes (loaders of training data): the file is opened again there.

    Attributes:
        settings: options, steps and rounds of labels that decided the content.
        facts: of the video.
        records: what became of every start frame, by start.
        notes: on the whole video, for instance why there are no starts.

    Args:
        path: the h5 file.

    Raises:
        InputError: no such file, an unfinished one, or not one of ours.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._owner = -1
        if not self.path.is_file():
            unfinished = _cache_path(self.path).exists()
            raise InputError(
                f"{self.path} is not finished: repeat the same `gim-video propagate`."
                if unfinished
                else f"There are no propagated labels {self.path}: run `gim-video propagate`."
            )
        with told_damage(self.path, "its records", _CURE):
            attributes = self._open().attrs
            names = ("settings", "facts", "records", "notes")
            self.about: dict[str, Any] = {name: json.loads(attributes[name]) for name in names}
            self.settings: dict[str, Any] = self.about["settings"]
            facts = self.about["facts"]
            self.facts = VideoFacts(**{**facts, "size": tuple(facts["size"])})
            self.records = [StartRecord.from_json(r) for r in self.about["records"]]
            self.notes: list[str] = self.about["notes"]
        self._made = {(r.start, r.target): r for r in self.records if not r.failure}

    def pairs(self) -> np.ndarray:
        """(P, 2) int64: pairs of frames asked for, by start; names for `read`."""
        return np.array(list(self._made), dtype=np.int64).reshape(-1, 2)

    def reached(self) -> np.ndarray:
        """(P, 2) int64: frames that the labels of each of `pairs` belong to."""
        rows = [r.reached for r in self._made.values()]
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def counts(self) -> np.ndarray:
        """(P,) int64: labels of each of `pairs`."""
        return np.array([r.count for r in self._made.values()], dtype=np.int64)

    def read(self, start: int, target: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Labels of a pair.

        Args:
            start: first frame asked for.
            target: last frame asked for.

        Returns:
            (n, 4) float32 x0, y0, x1, y1 in original frame pixels, hloc's frame; and the two frames
            (i, j) that they belong to.

        Raises:
            InputError: the file has no labels of this pair, or is damaged.
        """
        record = self._made.get((int(start), int(target)))
        if record is None or record.reached is None:
            raise InputError(f"{self.path} has no labels of the pair {start}, {target}.")
        with told_damage(self.path, f"the pair {start}, {target}", _CURE):
            labels: np.ndarray = self._open()[record.name]["labels"][()]
        return labels, record.reached

    def failures(self) -> list[tuple[int, int, str]]:
        """Failed starts: frames asked for, and the reason."""
        return [(r.start, r.target, r.failure) for r in self.records if r.failure]

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._made)

    def _open(self) -> h5py.File:
        # A handle that was inherited by a fork shares its file position with the parent's.
        if self._file is None or self._owner != os.getpid():
            self._file = h5py.File(self.path, "r")
            self._owner = os.getpid()
        return self._file

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._file is not None and self._owner == os.getpid():
            self._file.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": -1}

    def __enter__(self) -> PropagatedStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PropagatedWriter:
    """Writes the propagated labels of one video; killed at any moment, it goes on from there.

    A context manager. One process at a time has it.

    Args:
        path: the h5 file to make.
        settings: whatever decides the labels: options, and the state of the labels they are made
            from. What was made with others is kept and not used.
        facts: of the video.
        overwrite: start anew in any case.

    Raises:
        LockedError: another process has the cache.
        OutputError: it cannot be written.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], facts: VideoFacts, *, overwrite: bool = False
    ) -> None:
        self.path = path
        self._facts = facts
        self._settings = {**settings, "format": FORMAT}
        self._stamp = cache.key(self._settings)
        self._cache = cache.Cache(_cache_path(path))
        try:
            if overwrite:
                mine = set(filter(lambda key: key.startswith(self._stamp), self._cache.keys()))
                self._cache.prune(set(self._cache.keys()) - mine)
            elif path.exists():
                self._take_over()
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        """Keep what only the h5 file has, such as one of 0.1."""
        try:
            with PropagatedStore(self.path) as store:
                stamp = cache.key(store.settings)
                for record in store.records:
                    if f"{stamp}/{record.name}" in self._cache:
                        continue
                    labels = None if record.failure else store.read(record.start, record.target)[0]
                    self._cache.put(f"{stamp}/{record.name}", _entry(record, labels))
        except InputError as error:
            logger.warning("%s", error)

    def _get(self, name: str) -> tuple[StartRecord, np.ndarray | None] | None:
        arrays = self._cache.get(f"{self._stamp}/{name}")
        if arrays is None:
            return None
        return StartRecord.from_json(json.loads(str(arrays["record"]))), arrays.get("labels")

    def done(self, start: int, target: int) -> StartRecord | None:
        """What became of a start in an earlier run; None where it is still to do."""
        found = self._get(pair_name(start, target))
        return None if found is None else found[0]

    def put(self, record: StartRecord, labels: np.ndarray | None) -> None:
        """Keep what became of a start; it survives the process as soon as this returns."""
        self._cache.put(f"{self._stamp}/{record.name}", _entry(record, labels))

    def finish(self, records: Sequence[StartRecord], notes: Sequence[str] = ()) -> None:
        """Write the h5 file with exactly these starts, and notes on the whole video.

        Raises:
            OutputError: it cannot be written; what was there is then as it was.
        """
        about = {
            "settings": self._settings,
            "facts": asdict(self._facts),
            "records": [asdict(record) for record in records],
            "notes": list(notes),
        }

        def whole(path: Path) -> bool:
            try:
                with PropagatedStore(path) as store:
                    for start, target in store:
                        store.read(start, target)
                    return store.about == json.loads(json.dumps(about))
            except InputError:
                return False

        if whole(self.path):
            return
        with h5_aside(self.path, whole) as file:
            for record in records:
                group = file.create_group(record.name)
                group.attrs["record"] = json.dumps(asdict(record))
                if record.failure:
                    continue
                labels = (self._get(record.name) or (record, None))[1]
                if labels is None:
                    raise OutputError(
                        f"{self._cache.path} lost the labels of {record.name}. Repeat the command: "
                        "they are made again."
                    )
                write_checked(group, "labels", labels)
            for name, value in about.items():
                # Longer than attributes may be in old versions of the format.
                file.attrs.create(name, json.dumps(value), dtype=h5py.string_dtype())

    def close(self) -> None:
        """Give the cache back; what is finished stays in it."""
        self._cache.close()

    def __enter__(self) -> PropagatedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cache_path(path: Path) -> Path:
    return path.with_suffix(".cache")


def _entry(record: StartRecord, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    arrays = {"record": np.array(json.dumps(asdict(record)))}
    if labels is not None:
        arrays["labels"] = labels.astype(np.float32)
    return arrays
