"""Matches of pairs, kept in one cache a matcher, whatever protocol judges them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gim_hloc import cache
from gim_hloc.cache import Cache
from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from gim_hloc.types import Encoding, Matches

FOLDER = "predictions"
_NUMBERS = ("points0", "points1", "scores")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """The matches of one pair.

    Attributes:
        points0: (M, 2) float32 original pixels of image 0, hloc's frame.
        points1: (M, 2) the same in image 1.
        scores: (M,) float32.
        size0: (width, height) of image 0 in pixels.
        size1: of image 1.
    """

    points0: np.ndarray
    points1: np.ndarray
    scores: np.ndarray
    size0: tuple[int, int]
    size1: tuple[int, int]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As they are kept."""
        numbers = {name: np.asarray(getattr(self, name), np.float32) for name in _NUMBERS}
        return {**numbers, "size0": np.array(self.size0), "size1": np.array(self.size1)}

    @classmethod
    def of(cls, matches: Matches, a: Encoding, b: Encoding) -> Prediction:
        """Of what a matcher gave."""
        return cls(
            points0=matches.keypoints0.numpy(),
            points1=matches.keypoints1.numpy(),
            scores=matches.scores.numpy(),
            size0=a.size,
            size1=b.size,
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Prediction:
        """Undo ``to_arrays``."""
        (w0, h0), (w1, h1) = arrays["size0"].tolist(), arrays["size1"].tolist()
        return cls(**{n: arrays[n] for n in _NUMBERS}, size0=(w0, h0), size1=(w1, h1))


@dataclass(frozen=True)
class Predictions:
    """Matches of one matcher on one set.

    Attributes:
        path: of the cache.
        keys: identifier of a pair -> its key in it.
    """

    path: Path
    keys: Mapping[str, str]

    def read(self, identifiers: Iterable[str] | None = None) -> dict[str, Prediction]:
        """By identifier, of all pairs or some; those that were not matched are left out."""
        wanted = self.keys if identifiers is None else [i for i in identifiers if i in self.keys]
        with Cache(self.path) as kept:
            found = {name: kept.get(self.keys[name]) for name in wanted}
        return {
            name: Prediction.from_arrays(arrays)
            for name, arrays in found.items()
            if arrays is not None
        }


@contextlib.contextmanager
def opened(output: Path, stem: str, settings: str, part: tuple[int, int]) -> Iterator[Cache]:
    """The cache that a run writes to: a shard its own, a whole run with what shards left.

    Args:
        output: of the run.
        stem: name of the matcher and digest of its settings.
        settings: the settings, for people.
        part: index of the shard and number of shards.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{stem}.json", settings)
    index, count = part
    if count > 1:
        with Cache(folder / f"{stem}.shard-{index}-of-{count}.db") as kept:
            yield kept
        return
    with Cache(folder / f"{stem}.db") as kept:
        for path in sorted(folder.glob(f"{stem}.shard-*-of-*.db")):
            kept.merge(path)
            path.unlink()
        yield kept


def refuse_old(output: Path) -> None:
    """Refuse what 0.1 kept; ``OutputError`` says how to go on."""
    if any((output / FOLDER).glob("*/*/*.npz")):
        raise OutputError(
            f"{output / FOLDER} holds predictions of an older gim-hloc, which are not read any "
            "more: choose another --out, or delete that folder and match anew."
        )


def find_predictions(output: Path, matcher: str, keys: Mapping[str, str]) -> Predictions:
    """What a run kept of a matcher.

    Args:
        output: of the run.
        matcher: its name, or the name of its cache if there are several settings of it.
        keys: of pairs, by identifier.

    Raises:
        InputError: no predictions of that matcher, or of several settings.
        OutputError: they are of 0.1.
    """
    refuse_old(output)
    names = {path.stem: path for path in sorted((output / FOLDER).glob("*.db"))}
    found = [s for s in names if matcher in (s, s.rpartition("-")[0])]
    if len(found) != 1:
        raise InputError(
            f"Predictions of one setting of {matcher} are needed in {output / FOLDER}, the matches "
            f"that gim-zeb run keeps: {', '.join(found) or 'none'}."
        )
    return Predictions(names[found[0]], keys)


def settings_stem(matcher: str, settings: Mapping[str, object]) -> tuple[str, str]:
    """Name of a matcher's cache, and its settings as text."""
    text = json.dumps(settings, indent=1, sort_keys=True, default=str)
    return f"{matcher}-{cache.key(text)[:8]}", text + "\n"
