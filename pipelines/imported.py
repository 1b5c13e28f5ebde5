"""Keypoints and matches that come from hloc's files instead of a matcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gim_hloc.errors import InputError, some
from gim_hloc.hloc_files import find, open_h5, read
from gim_hloc.matchers.common import MatcherBase
from gim_hloc.store import H5Store, PairMissingError, digest, read_matches
from gim_hloc.types import (
    Encoding,
    ImageData,
    ImageOptions,
    MatcherInfo,
    Matches,
    SparseEncoding,
)

if TYPE_CHECKING:
    import h5py

    from gim_hloc.images import ImageRecord

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class ImportedOptions:
    """Where imported files are."""

    features: str
    matches: str


class ImportedMatcher(MatcherBase[Encoding]):
    """Stands where a matcher would: its encodings and matches are files.

    Accepts what hloc writes: keypoints in half precision, files without scores, pairs in either
    order, pair keys of old versions (``a_b``), and nested names.

    Args:
        features: h5 file with a group an image that holds ``keypoints`` (N, 2), integer = centre of
            a pixel of the stored image.
        matches: h5 file with a group a pair that holds ``matches0`` (N0,), -1 = none.

    Raises:
        InputError: a file is not there or no h5 file.
    """

    def __init__(self, features: Path, matches: Path) -> None:
        self.features, self.matches = features, matches
        for path, what in ((features, "file of features"), (matches, "file of matches")):
            with open_h5(path, what):
                pass  # that it can be opened is all
        info = MatcherInfo(
            name="imported",
            kind="sparse",
            checkpoint=(),
            licence="that of the program which made the files",
            commercial=False,
            colour="rgb",
            summary="keypoints and matches from files in hloc's layout",
            rotation_invariant=True,  # nothing can be matched again
        )
        super().__init__(
            info=info,
            options=ImportedOptions(features=str(features), matches=str(matches)),
            image_options=ImageOptions(max_size=None),
            device=torch.device("cpu"),
        )

    def encode_settings(self) -> dict[str, Any]:
        """The file and when it was written."""
        return {"imported": _stamp(self.features)}

    def match_settings(self) -> dict[str, Any]:
        """The same of the matches."""
        return {"imported": _stamp(self.matches)}

    def encode(self, image: ImageData) -> SparseEncoding:
        """Nothing is computed here."""
        raise InputError(f"{self.features} holds keypoints; no further images can be encoded.")

    def match(self, a: Encoding, b: Encoding) -> Matches:
        """Nothing is computed here."""
        raise InputError(f"{self.matches} holds matches; no further pairs can be matched.")

    def take_over(
        self,
        records: Mapping[str, ImageRecord],
        pairs: Sequence[Pair],
        features: H5Store,
        matches: H5Store,
        progress: Callable[[], Any] = lambda: None,
    ) -> list[str]:
        """Check both files and write what is used of them into a run's own.

        Args:
            records: the images.
            pairs: the pairs wanted, names in order.
            features: gets the keypoints.
            matches: gets the matches of the pairs.
            progress: called once a pair.

        Returns:
            Notes for the user.

        Raises:
            InputError: naming the images or pairs that are missing or do not fit.
        """
        notes: list[str] = []
        counts: dict[str, int] = {}
        with open_h5(self.features, "file of features") as file:
            missing = [n for n in records if find(file, f"{n}/keypoints") is None]
            if missing:
                raise InputError(
                    f"{self.features} holds no keypoints of {len(missing)} of {len(records)} "
                    f"images: {some(missing)}. Names must be paths relative to the image folder."
                )
            half = []
            for name, record in records.items():
                arrays, exact = _features(file, record)
                counts[name] = len(arrays["keypoints"])
                if not exact:
                    half.append(name)
                features.put(name, arrays, digest(record.sha256))
        if half:
            step = 2.0 ** np.floor(np.log2(max(max(records[n].size) for n in half) - 1)) / 1024
            notes.append(
                f"{self.features} holds keypoints in half precision (hloc's as_half), rounded to "
                f"{step:g} px in the far part of the images: as_half=False keeps them exact."
            )
        with open_h5(self.matches, "file of matches") as file:
            missing_pairs = []
            for a, b in pairs:
                try:
                    rows, scores = read_matches(file, a, b)
                except PairMissingError:
                    missing_pairs.append(f"{a} {b}")
                    continue
                progress()
                if len(missing_pairs):
                    continue
                arrays = _matches(rows, scores, counts[a], counts[b], f"{self.matches}, {a} {b}")
                matches.put(f"{a}\t{b}", arrays, digest([records[a].sha256, records[b].sha256]))
        if missing_pairs:
            raise InputError(
                f"{self.matches} holds no matches of {len(missing_pairs)} of {len(pairs)} pairs of "
                f"the list: {some(missing_pairs)}."
            )
        features.finalize(list(records), {"matcher": self.info.name})
        matches.finalize([f"{a}\t{b}" for a, b in pairs], {"matcher": self.info.name})
        return notes


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _features(file: h5py.File, record: ImageRecord) -> tuple[dict[str, np.ndarray], bool]:
    """An image's keypoints, and whether they are exact to the pixel and better."""
    stored = read(file, f"{record.name}/keypoints")
    keypoints = stored.astype(np.float32)
    where = f"{file.filename}, {record.name}"
    if keypoints.size == 0:
        keypoints = np.zeros((0, 2), np.float32)
    if keypoints.ndim != 2 or keypoints.shape[1] < 2 or not np.isfinite(keypoints).all():
        raise InputError(f"{where}: keypoints are not finite (N, 2) coordinates.")
    keypoints = np.ascontiguousarray(keypoints[:, :2])
    size = record.size
    if find(file, f"{record.name}/image_size") is not None:
        width, height = _pair_of_numbers(read(file, f"{record.name}/image_size"), where)
        size = width, height
    # Half precision rounds up to 2 px beyond the border of a 4000 px image.
    low, high = keypoints.min(0, initial=0), keypoints.max(0, initial=0)
    if size != record.size or low.min() < -3 or (high > np.array(record.size) + 2).any():
        raise InputError(
            f"{where}: keypoints of an image of {size[0]}x{size[1]} px reach ({high[0]:.0f}, "
            f"{high[1]:.0f}), but the image file is {record.width}x{record.height}. Were they "
            "computed on other files (resized, or turned by EXIF)?"
        )
    exact = stored.dtype != np.float16 or max(record.size) <= 512
    return {"keypoints": keypoints, "image_size": np.array(record.size, dtype=np.int64)}, exact


def _pair_of_numbers(values: np.ndarray, where: str) -> tuple[int, int]:
    if values.size != 2 or not np.isfinite(values).all():
        raise InputError(f"{where}: image_size is not (width, height).")
    return int(values.flat[0]), int(values.flat[1])


def _matches(
    rows: np.ndarray, scores: np.ndarray, count0: int, count1: int, where: str
) -> dict[str, np.ndarray]:
    """``matches0`` and ``matching_scores0`` of a pair, whichever order the file has it in."""
    if len(rows) and (rows[:, 0].max() >= count0 or rows[:, 1].max() >= count1):
        raise InputError(
            f"{where}: matches name keypoint {rows[:, 0].max()} and {rows[:, 1].max()} of images "
            f"with {count0} and {count1}. The matches belong to another file of features."
        )
    matches0 = np.full(count0, -1, dtype=np.int32)
    scores0 = np.zeros(count0, dtype=np.float16)
    matches0[rows[:, 0]] = rows[:, 1]
    scores0[rows[:, 0]] = scores
    return {"matches0": matches0, "matching_scores0": scores0}


__all__ = ["ImportedMatcher", "ImportedOptions"]
