"""Encoding images and matching pairs, as far as it is missing: here, in processes, on machines.

What does the work is described by tasks that travel to other processes: a matcher by its name, and
photographs by their records.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch

from gim_hloc import colmap, engine, matchers, workers
from gim_hloc import images as image_module
from gim_hloc.cache import Cache
from gim_hloc.errors import InputError
from gim_hloc.images import ImageRecord
from gim_hloc.masks import MaskFolder
from gim_hloc.options import AnchoredOptions, QuantizedOptions
from gim_hloc.pipelines.run import RunFolder
from gim_hloc.store import H5Store, digest, read_encoding, remove_cache, scored_rows
from gim_hloc.tracks.linker import ImagePoints, Kind, linker_for
from gim_hloc.types import ImageData, ImageOptions, SparseEncoding

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
Arrays = dict[str, np.ndarray]
Entry = tuple[Arrays, dict[str, Any]]  # arrays and attributes of an entry of a store


@dataclass
class Photographs:
    """Images as they are matched: files, masks, and which way up they are.

    Attributes:
        records: of the files, by name.
        masks: what to leave out.
        turns: name -> quarter turns clockwise that show an image upright; others are.
    """

    records: Mapping[str, ImageRecord]
    masks: MaskFolder | None = None
    turns: dict[str, int] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def read(self, name: str, options: ImageOptions, more_turns: int = 0) -> ImageData:
        """An image as a network wants it, turned by some more quarter turns."""
        record = self.records[name]
        mask = self.masks.load(record) if self.masks is not None else None
        turn = (self.turns.get(name, 0) + more_turns) % 4
        return image_module.load(image_module.turned(record, turn), options, mask=mask)

    def source(self, name: str) -> str:
        """Hash of what an image's features are made from: file, mask and turn."""
        if name not in self._hashes:
            mask = self.masks.sha(name) if self.masks else None
            self._hashes[name] = digest([self.records[name].sha256, mask])
        turn = self.turns.get(name, 0)
        return f"{self._hashes[name]}/{90 * turn}" if turn else self._hashes[name]

    def is_source(self, name: str, stored: str) -> bool:
        """Whether features that an earlier run stored are of this image, turned or not."""
        return stored.split("/")[0] == self.source(name).split("/")[0]

    def pair_source(self, pair: Pair) -> str:
        """Hash of what the matches of a pair are made from."""
        return digest([self.source(pair[0]), self.source(pair[1])])

    def __len__(self) -> int:
        return len(self.records)


class Readable(Protocol):
    """Where matchers' images come from."""

    def read(self, name: str, options: ImageOptions) -> ImageData:
        """An image as a network wants it."""
        ...


@dataclass(frozen=True)
class EncodeTask:
    """Encode images of their names."""

    loader: matchers.Loader
    photographs: Photographs
    threads: int

    def open(self, device: str) -> Callable[[Sequence[str]], Iterator[tuple[str, Entry]]]:
        """Load the matcher."""
        matcher = self.loader.load(device)

        def encode(names: Sequence[str]) -> Iterator[tuple[str, Entry]]:
            def read(name: str) -> ImageData:
                return self.photographs.read(name, matcher.image_options)

            for name, encoding in engine.encode(matcher, names, read, workers=self.threads):
                if not isinstance(encoding, SparseEncoding):
                    raise InputError(f"The encodings of {matcher.info.name} hold no keypoints.")
                yield name, encoding.to_arrays()

        return encode


@dataclass(frozen=True)
class Stored:
    """Encodings in a finished h5 file; of each at most so many, the strongest, keypoints."""

    path: Path
    most: int | None = None

    def __call__(self, name: str) -> SparseEncoding:
        """Read one back."""
        found = read_encoding(self.path, name)
        return found if self.most is None else found.strongest(self.most)


@dataclass(frozen=True)
class MatchTask:
    """Match pairs, and reduce each to the arrays that are stored of it.

    Attributes:
        loader: of the matcher.
        photographs: for matchers without keypoints, which encode what they need.
        stored: encodings of others.
        tracks: how matches without keypoints become such.
        anchored: numbers of anchored tracks.
        quantized: numbers of quantised tracks.
        points: what the linker is to know of the images.
        threads: that match side by side.
        batch_size: pairs a network call.
        cache_gb: memory for encodings.
        report: of what was done in this process.
    """

    loader: matchers.Loader
    photographs: Readable
    stored: Callable[[str], SparseEncoding]
    tracks: Kind = "anchored"
    anchored: AnchoredOptions = AnchoredOptions()
    quantized: QuantizedOptions = QuantizedOptions()
    points: Sequence[ImagePoints] = ()
    threads: int = 1
    batch_size: int = 1
    cache_gb: float | None = None
    report: engine.ScheduleReport = field(default_factory=engine.ScheduleReport)

    def open(self, device: str) -> Callable[[Sequence[Pair]], Iterator[tuple[Pair, Arrays]]]:
        """Load the matcher and tell its linker what is known of the images."""
        matcher = self.loader.load(device)
        linker = linker_for(matcher, self.tracks, anchored=self.anchored, quantized=self.quantized)
        linker.prepare(self.points)

        def match(pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Arrays]]:
            common: Any = {
                "cache_gb": self.cache_gb,
                "batch_size": self.batch_size,
                "report": self.report,
            }
            if matcher.info.has_keypoints:
                return engine.match(
                    matcher, pairs, self.stored, linker.reduce, encode=lambda encoding: encoding,
                    device=torch.device("cpu"), workers=self.threads, **common,
                )  # fmt: skip
            return engine.match(
                matcher, pairs, lambda name: self.photographs.read(name, matcher.image_options),
                linker.reduce, workers=self.threads if matcher.info.side_by_side else 1, **common,
            )  # fmt: skip

        return match


@dataclass(frozen=True)
class VerifyTask:
    """Verify pairs.

    Attributes:
        verification: what a pair must pass.
        features: h5 file of the keypoints.
        matches: h5 file of the matches.
        keys: name -> its part of the key of a pair in it.
        threads: pairs at a time.
    """

    verification: colmap.Verification
    features: Path
    matches: Path
    keys: Mapping[str, str]
    threads: int

    def open(self, device: str) -> Callable[[Sequence[Pair]], Iterator[tuple[Pair, Arrays]]]:
        """Open both files."""
        features, matches = (h5py.File(path, "r") for path in (self.features, self.matches))
        one_reads = threading.Lock()

        def verify(pair: Pair) -> Arrays:
            with one_reads:
                xy0, xy1 = (features[f"{name}/keypoints"][()] for name in pair)
                group = matches["/".join(self.keys[name] for name in pair)]
                rows, scores = scored_rows({name: group[name][()] for name in group})
            return self.verification.verify(*pair, xy0, xy1, rows, scores)

        return lambda pairs: engine.in_threads(verify, pairs, workers=self.threads)


def pair_name(pair: Pair) -> str:
    """Name of a pair's entry; the scan refuses names with tabs."""
    return f"{pair[0]}\t{pair[1]}"


def spread(
    task: Any,
    items: Sequence[Any],
    where: workers.Where,
    done: Callable[[Any, Any], None],
    *,
    chunk: int,
) -> None:
    """Do a task here, all items at once, or by other workers, chunk by chunk."""
    here = not where.devices and where.engine == "local"
    workers.run(task, items, where, done, chunk=max(1, len(items)) if here else chunk)


def take_parts(folder: RunFolder, stores: Mapping[str, H5Store | Cache]) -> None:
    """Take over what parts of array jobs have finished.

    Args:
        folder: of the run, which holds it.
        stores: names of caches without their ending -> what takes their entries.
    """
    taken = 0
    for part in folder.parts():
        for name, store in stores.items():
            path = part / f"{name}.cache"
            taken += store.merge(path) if path.exists() else 0
            remove_cache(path)
        with contextlib.suppress(OSError):  # another command's caches are in it
            part.rmdir()
    if taken:
        logger.info("Took over %d results of parts of the run", taken)


def tell_kept(kept: Sequence[tuple[Cache, set[str]]], *, prune: bool) -> None:
    """Say how much is kept for later runs, or remove what this one did not use.

    Args:
        kept: caches, and the keys in them that a whole run used.
        prune: remove all others.
    """
    if prune:
        removed = sum(cache.prune(used) for cache, used in kept)
        logger.info("Removed %d entries that this run did not use", removed)
    unused = sum(len(set(cache.keys()) - used) for cache, used in kept)
    size = sum(cache.path.stat().st_size for cache, _ in kept if cache.path.exists())
    logger.info(
        "Kept for later runs: %.0f MB (*.cache)%s",
        size / 1e6,
        f", {unused} entries of other settings or images (--prune removes them)" if unused else "",
    )
