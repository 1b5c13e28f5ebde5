"""Figures of one set: AUC of pose errors, bootstrap intervals, ranks, failures, worst pairs.

Angles are in degrees, AUC and precision are fractions in [0, 1]. NumPy only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.evaluation.dumps import Dump, DumpRecord
from gim_hloc.geometry import pose

THRESHOLDS = (5.0, 10.0, 20.0)
"""Degrees. ZEB's published tables have the first only."""

FAILED = 180.0
"""Error in degrees of a pair without a pose: the largest there is."""

# Pairs gathered at a time while resampling: the block stays in the processor's cache.
_BLOCK = 1 << 18


def pose_errors(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Each pair's error: the larger of its two angles, `FAILED` where one is not finite.

    Args:
        rotation: (N,) degrees; inf and NaN mean failure.
        translation: (N,) degrees.
    """
    rotation = np.asarray(rotation, dtype=np.float64)
    translation = np.asarray(translation, dtype=np.float64)
    finite = np.isfinite(rotation) & np.isfinite(translation)
    return np.where(finite, np.maximum(rotation, translation), FAILED)


def failed(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """The mask (N,) of pairs without a pose."""
    return ~(np.isfinite(rotation) & np.isfinite(translation))


def auc(errors: np.ndarray | Sequence[float], thresholds: Sequence[float]) -> list[float]:
    """ZEB's AUC at each threshold (`gim_hloc.geometry.pose.auc`).

    Args:
        errors: (N,) degrees, from `pose_errors`.
        thresholds: degrees, in (0, 180].

    Raises:
        InputError: no errors, or a threshold outside (0, 180].
    """
    check_thresholds(thresholds)
    return pose.auc(errors, thresholds)


def check_thresholds(thresholds: Sequence[float], *, unit: str = "degrees") -> None:
    """Raise InputError unless thresholds are given and lie in (0, 180].

    Args:
        thresholds: of AUC.
        unit: in the message; errors of homographies are pixels, of which a failure has 180 too.
    """
    if not thresholds:
        raise InputError("no AUC threshold given: give at least one, such as 5")
    for threshold in thresholds:
        if not 0 < threshold <= FAILED:
            raise InputError(f"AUC threshold {threshold} is not in (0, 180] {unit}")


def bootstrap_auc(
    errors: np.ndarray, thresholds: Sequence[float], *, samples: int, seed: int, name: str = ""
) -> np.ndarray:
    """The AUC (samples, T) of resamplings of the pairs with replacement.

    With M the number of errors below t, the area under ZEB's polyline is, by summation by parts,
    ``(sum of (t - e) over errors e < t) + (largest e < t) / 2``, over ``N t``. So no resampling
    needs sorting.

    Args:
        errors: (N,) degrees.
        thresholds: degrees.
        samples: how many resamplings.
        seed: together with ``name`` it fixes the resamplings: matchers on the same pairs get the
            same ones (their difference has a paired interval), different sets independent ones.
        name: of the set.
    """
    check_thresholds(thresholds)
    errors = np.asarray(errors, dtype=np.float64).ravel()
    if errors.size == 0:
        raise InputError("no errors to resample: give at least one pair to judge")
    count = len(errors)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    limits = np.asarray(thresholds, dtype=np.float64)
    # Two rows a threshold: what a pair adds to the area, and its error where it is below.
    below = errors < limits[:, None]
    gain = np.where(below, limits[:, None] - errors, 0.0)
    reached = np.where(below, errors, 0.0)
    result = np.empty((samples, len(limits)))
    step = max(1, _BLOCK // count)
    for start in range(0, samples, step):
        rows = slice(start, min(start + step, samples))
        # One draw a row, so that the result does not depend on the block size.
        index = generator.integers(0, count, (rows.stop - rows.start, count), dtype=np.int32)
        for column, limit in enumerate(limits):
            area = gain[column][index].sum(1) + reached[column][index].max(1) / 2
            result[rows, column] = area / (count * limit)
    return result


def interval(samples: np.ndarray, *, level: float = 0.95) -> np.ndarray:
    """The percentile interval (2, ...) of bootstrap samples (S, ...)."""
    tail = (1 - level) / 2
    return np.quantile(samples, [tail, 1 - tail], axis=0)


@dataclass(frozen=True, kw_only=True)
class SetMetrics:
    """What one matcher reached on one set."""

    pairs: int  # judged, failures included
    failures: int  # pairs without a pose
    thresholds: tuple[float, ...]  # degrees
    auc: tuple[float, ...]  # per threshold
    samples: np.ndarray  # (S, T) bootstrap AUC; S = 0 where none was asked for
    precision_before: float  # mean over pairs of the fraction of correct matches, before RANSAC
    precision_after: float  # the same among RANSAC's inliers; failures count 0
    matches: float  # mean number of matches a pair before RANSAC; NaN where not recorded
    correct_before: float  # mean number of correct matches a pair
    correct_after: float  # mean number of correct inliers a pair
    rotation_median: float  # degrees, failures count 180
    translation_median: float  # degrees, failures count 180

    def interval(self, *, level: float = 0.95) -> np.ndarray:
        """The bootstrap interval (2, T); NaN without samples."""
        if len(self.samples) == 0:
            return np.full((2, len(self.thresholds)), np.nan)
        return interval(self.samples, level=level)


def measure(
    records: Sequence[DumpRecord],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    samples: int = 1000,
    seed: int = 0,
    name: str = "",
) -> SetMetrics:
    """All figures of one matcher on one set.

    Args:
        records: of its pairs.
        thresholds: of AUC, in the unit of the records' errors.
        samples: bootstrap resamplings; 0 leaves intervals out.
        seed: of the bootstrap.
        name: of the set (`bootstrap_auc`).

    Raises:
        InputError: no pairs, or a bad threshold.
    """
    rotation = np.array([record.rotation_error for record in records])
    translation = np.array([record.translation_error for record in records])
    precision = np.array([(r.precision_before, r.precision_after) for r in records])
    precision = np.nan_to_num(precision.reshape(-1, 2), nan=0.0)
    correct = np.array([(r.correct_before, r.correct_after) for r in records], dtype=np.float64)
    errors = pose_errors(rotation, translation)
    thresholds = tuple(float(threshold) for threshold in thresholds)
    values = auc(errors, thresholds)
    drawn = np.empty((0, len(thresholds)))
    if samples:
        drawn = bootstrap_auc(errors, thresholds, samples=samples, seed=seed, name=name)
    return SetMetrics(
        pairs=len(errors),
        failures=int(failed(rotation, translation).sum()),
        thresholds=thresholds,
        auc=tuple(values),
        samples=drawn,
        precision_before=float(precision[:, 0].mean()),
        precision_after=float(precision[:, 1].mean()),
        matches=_mean_matches(precision[:, 0], correct[:, 0]),
        correct_before=float(correct[:, 0].mean()),
        correct_after=float(correct[:, 1].mean()),
        rotation_median=float(np.median(pose_errors(rotation, rotation))),
        translation_median=float(np.median(pose_errors(translation, translation))),
    )


def _mean_matches(precision: np.ndarray, correct: np.ndarray) -> float:
    """The mean number of matches over the pairs that tell it.

    Dumps hold the number of correct matches and their fraction, so the number of all is known
    wherever one match is correct.
    """
    known = (precision > 0) & (correct > 0)
    if not known.any():
        return math.nan
    return float(np.rint(correct[known] / precision[known]).mean())


@dataclass(frozen=True, kw_only=True)
class PairGap:
    """One pair as two matchers see it."""

    identifier: str  # scene#name0#name1
    error0: float  # degrees, of the first matcher; 180 on failure
    error1: float  # of the second
    gap: float  # error0 - error1, both cut at the limit: positive where the second is better


def most_different(
    dump0: Dump, dump1: Dump, *, count: int = 20, limit: float = 20.0
) -> list[PairGap]:
    """The pairs on which two matchers differ most, largest difference first.

    Args:
        dump0: of the first matcher.
        dump1: of the second, on the same set; pairs that only one has are left out.
        count: at most this many.
        limit: degrees at which errors are cut: two useless poses do not differ, be they 40 or 160
            degrees wrong.

    Raises:
        InputError: the two have no pair in common.
    """
    errors1 = {record.identifier: record.pose_error for record in dump1.unique}
    gaps = [
        PairGap(
            identifier=record.identifier,
            error0=record.pose_error,
            error1=errors1[record.identifier],
            gap=min(record.pose_error, limit) - min(errors1[record.identifier], limit),
        )
        for record in dump0.unique
        if record.identifier in errors1
    ]
    if not gaps:
        raise InputError(
            f"{dump0.matcher} on {dump0.dataset} and {dump1.matcher} on {dump1.dataset} have no "
            "pair in common: give dumps of the same set"
        )
    # Among equal differences the pair that one of them has best, then the name: a fixed order.
    gaps.sort(key=lambda pair: (-abs(pair.gap), min(pair.error0, pair.error1), pair.identifier))
    return gaps[:count]


def worst(dump: Dump, *, count: int = 20) -> list[tuple[str, float]]:
    """Identifier and error in degrees of the worst pairs, failures (180) first."""
    found = [(record.identifier, record.pose_error) for record in dump.unique]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:count]
