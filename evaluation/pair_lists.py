"""Evaluation on lists of pairs (`gim_hloc.evaluation.pair_formats`): as on ZEB.

What is judged depends on the list: relative poses by ZEB's protocols ``gim`` and ``poselib``,
homographies by the corner error with OpenCV's RANSAC or PoseLib; where there is no truth, the
matches that agree with a fundamental matrix are counted and drawn.

Below the output folder, beside what `gim_hloc.evaluation.run` describes::

    results/<list>/results.md|csv|json   one row a matcher and protocol
    results/<list>/pairs.csv             one row a pair, matcher and protocol
    results/<list>/index.html            contact sheet of a list without truth
    results/<list>/pictures/             what it shows
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gim_hloc import images
from gim_hloc.errors import InputError
from gim_hloc.evaluation import _pair_pages, homography, metrics, protocol
from gim_hloc.evaluation.dumps import DumpRecord, Unit
from gim_hloc.evaluation.fundamental import FundamentalProtocol, count_inliers
from gim_hloc.evaluation.homography import HomographyProtocol
from gim_hloc.evaluation.options import PairOptions
from gim_hloc.evaluation.pair_formats import POSED, Format, ImageFile, PairList, read_list
from gim_hloc.evaluation.pair_set import (
    CELL,
    HomographyPair,
    PairSet,
    PosedPair,
    Size,
    floor_to_cell,
    load_image,
)
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.evaluation.protocol import Protocol
from gim_hloc.evaluation.run import RunReport, SetResult
from gim_hloc.evaluation.run import evaluate as run_sets
from gim_hloc.evaluation.zeb.run import reference_options
from gim_hloc.geometry.frames import resize_points
from gim_hloc.images import ImageRecord
from gim_hloc.types import ImageData, ImageOptions

logger = logging.getLogger(__name__)

Kind = Literal["pose", "homography", "none"]

_UNITS: dict[Kind, Unit] = {"pose": "deg", "homography": "px", "none": "deg"}
_PROTOCOLS: dict[Kind, type[Protocol]] = {
    "pose": Protocol,
    "homography": HomographyProtocol,
    "none": FundamentalProtocol,
}
_MIN_SIDE = 1


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Size at which images are shown to matchers. At most one field is set; none: as stored."""

    own: bool = False  # the matcher's operating point decides
    long_side: int | None = None  # px; larger images are reduced
    exact: tuple[int, int] | None = None  # (width, height) px, whatever the shape was

    @property
    def name(self) -> str:
        """As the command line has it."""
        if self.exact is not None:
            return f"{self.exact[0]}x{self.exact[1]}"
        return "matcher" if self.own else str(self.long_side or "stored")

    def target(self, size: Size) -> Size:
        """The (width, height) of an image shown, multiples of 8."""
        if self.exact is not None:
            return floor_to_cell(self.exact)
        factor = 1.0 if self.long_side is None else min(1.0, self.long_side / max(size))
        return floor_to_cell((round(size[0] * factor), round(size[1] * factor)))


def parse_resize(text: str) -> Resize:
    """Read ``stored``, ``matcher``, a long side such as ``1200``, or ``640x480``.

    Raises:
        InputError: it is none of these.
    """
    if text in ("stored", "matcher"):
        return Resize(own=text == "matcher")
    try:
        sides = [int(side) for side in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < CELL:
        raise InputError(
            f"The size {text!r} is none: give stored, matcher, a long side such as 1200 or a width "
            "and height such as 640x480."
        )
    return Resize(exact=(sides[0], sides[1])) if len(sides) == 2 else Resize(long_side=sides[0])


_DEFAULT_RESIZE: dict[Format, Resize] = {
    "superglue": Resize(),
    "megadepth": Resize(long_side=1200),
    "scannet": Resize(exact=(640, 480)),
    "homography": Resize(),
    "pairs": Resize(own=True),
}


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """What one matcher reached on a list by one protocol.

    Attributes:
        matcher: its name.
        protocol: name of its folder.
        pairs: judged, failures included.
        failures: pairs without an estimate.
        thresholds: of AUC; degrees, or pixels for homographies.
        auc: fractions; empty without truth.
        interval: (low, high) of each, 95 % bootstrap; empty if not asked for.
        matches: mean number of matches a pair.
        inliers: mean number of inliers a pair; without truth only, else NaN.
        precision_before: mean share of correct matches; NaN without truth, like all below.
        precision_after: the same among RANSAC's inliers.
        correct_before: mean number of correct matches a pair.
        correct_after: the same among RANSAC's inliers.
        accuracy: of homographies: mean matching accuracy at `homography.ACCURACY_PX`.
    """

    matcher: str
    protocol: str
    pairs: int
    failures: int
    thresholds: tuple[float, ...] = ()
    auc: tuple[float, ...] = ()
    interval: tuple[tuple[float, float], ...] = ()
    matches: float = math.nan
    inliers: float = math.nan
    precision_before: float = math.nan
    precision_after: float = math.nan
    correct_before: float = math.nan
    correct_after: float = math.nan
    accuracy: tuple[float, ...] = ()


@dataclass(kw_only=True)
class PairReport:
    """What a run on a list gave.

    Attributes:
        pair_list: the list.
        kind: what was judged.
        rows: by matcher and protocol; those of which all pairs are judged.
        run: the run's own report.
        lost: files of the list that could not be used.
        files: written results; none until all pairs are judged.
    """

    pair_list: PairList
    kind: Kind
    rows: list[PairRow]
    run: RunReport
    lost: tuple[str, ...] = ()
    files: list[Path] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all pairs are judged; not so while other shards are at work."""
        return all(result.evaluated == result.pairs for result in self.run.results)

    @property
    def exit_code(self) -> int:
        """0, or 1 where a part of the list could not be used."""
        return 1 if self.lost else self.run.exit_code


def evaluate(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: PairOptions,
    *,
    progress: bool = False,
) -> PairReport:
    """Run matchers over a list of pairs and judge them.

    Args:
        path: file or folder in one of the formats of `gim_hloc.evaluation.pair_formats`.
        output: folder of results, see the module; several lists may share it.
        options: what to run.
        progress: show bars.

    Returns:
        Figures and problems. An entry that cannot be used, a missing or damaged image or a pair on
        which a matcher stopped is named among the problems and counts as failed; the rest goes on.

    Raises:
        InputError: the list or an option cannot be used at all.
        LockedError: another run works in the output folder.
        OutputError: a pair killed two workers; what was finished is kept.
        WeightsError: the weights of a matcher cannot be had.
    """
    calibrated = None if options.k_size is None else parse_resize(options.k_size).exact
    if options.k_size is not None and calibrated is None:
        raise InputError(f"k_size is {options.k_size!r}; give WxH, for instance 640x480.")
    path = Path(path).absolute()  # workers may have another working directory
    pair_list = read_list(
        path,
        images=options.images and options.images.absolute(),
        format=options.format,
        name=options.name,
        intrinsics=options.intrinsics,
        calibrated_size=calibrated,
    )
    if pair_list.repeated:
        logger.warning(
            "%s names %d pairs more than once; the last of each counts.", path, pair_list.repeated
        )
    kind = kind_of(pair_list)
    if options.thresholds:  # now, and not after hours of matching
        unit = "pixels" if kind == "homography" else "degrees"
        metrics.check_thresholds(options.thresholds, unit=unit)
    resize = _DEFAULT_RESIZE[pair_list.format]
    if options.resize is not None:
        resize = parse_resize(options.resize)
    protocols = make_protocols(kind, options)
    pair_set = ListPairs.of(pair_list, resize).sample(options)
    run = run_sets(
        [pair_set],
        output,
        options,
        protocols,
        # The reference's sizes are meant for images that the list's rule has reduced.
        matcher_options=(lambda name: {}) if resize.own else reference_options,
        progress=progress,
    )
    report = PairReport(pair_list=pair_list, kind=kind, rows=[], run=run, lost=pair_list.lost)
    by_name = {entry.name: entry for entry in protocols}
    finished = [result for result in run.results if result.evaluated == result.pairs]
    for _, of_matcher in itertools.groupby(finished, key=lambda result: result.matcher):
        results = list(of_matcher)
        predictions = results[0].predictions.read()
        for result in results:
            rule = by_name[result.protocol]
            row = _summarise(result, predictions, pair_set, rule, kind, options)
            report.rows.append(row)
    if report.complete:
        folder = Path(output) / "results" / pair_list.name
        report.files = _pair_pages.write(report, pair_set, folder, pictures=options.pictures)
    return report


def kind_of(pair_list: PairList) -> Kind:
    """What can be judged on a list."""
    if pair_list.format in POSED:
        return "pose"
    return "homography" if pair_list.format == "homography" else "none"


def make_protocols(kind: Kind, options: PairOptions) -> list[Protocol]:
    """The protocols that an evaluation uses.

    Raises:
        InputError: PoseLib is not installed.
    """
    changes: dict[str, Any] = {"threshold": options.threshold_px}
    if kind == "homography":
        changes["short_side"] = options.short_side
    return [_PROTOCOLS[kind].make(name, **changes) for name in options.protocols]


@dataclass(frozen=True, kw_only=True)
class ListPairs(PairSet):
    """The pairs of a list.

    Attributes:
        resize: size at which they are shown.
        calibrated_size: (width, height) of the images that K is for; None: the stored ones.
        upright: whether images are shown as EXIF says, before they are turned as the list says.
            Not where there is truth: lists speak of stored pixels, and their turns stand for EXIF.
        files: images by their keys.
        warned: keys of images whose K is strange; one is reported.
    """

    resize: Resize
    calibrated_size: Size | None
    upright: bool
    files: dict[str, ImageFile]
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, pair_list: PairList, resize: Resize) -> ListPairs:
        """The whole list."""
        kind = kind_of(pair_list)
        return cls(
            name=pair_list.name,
            root=pair_list.root,
            dump_name=None if kind == "none" else pair_list.name,
            dump_unit=_UNITS[kind],
            pairs=pair_list.pairs,
            bad=pair_list.bad,
            resize=resize,
            calibrated_size=pair_list.calibrated_size,
            upright=pair_list.format == "pairs",
            files=pair_list.files,
        )

    @property
    def shown(self) -> list[Any]:
        """Size, and which way up; quarter turns are in the names."""
        return ["list", self.resize.name, self.upright]

    def path(self, name: str) -> Path:
        """Below the root."""
        return self.root / self.files[name].name

    def truth(self, pair: Any) -> list[Any]:
        """The size that K is for besides."""
        return [self.calibrated_size, *super().truth(pair)]

    def record(self, key: str) -> ImageRecord:
        """Open an image for people and for matchers: turned as it is shown.

        Raises:
            InputError: the file does not exist or cannot be read, named.
        """
        path = self.path(key)
        if not path.is_file():
            raise InputError(f"The image {path} does not exist.")
        found = images.scan(
            path.parent, names=[path.name], min_size=_MIN_SIDE, upright=self.upright
        )
        if found.rejected:
            raise InputError(f"{path} cannot be read: {found.rejected[0].detail}.")
        return images.turned(replace(found[path.name], name=key), -self.files[key].turns)

    def image(self, name: str, options: ImageOptions) -> ImageData:
        """By the list's rule; with ``resize.own`` as in any other command."""
        if self.resize.own:
            return images.load(self.record(name), options)
        return load_image(
            self.path(name),
            lambda size: (self.resize.target(size),) * 2,
            name=name,
            grayscale=options.grayscale,
            turns=self.files[name].turns,
        )

    def judge(self, pair: Any, matches: Prediction, protocol_: Protocol) -> DumpRecord:
        """By what the list knows of the pair."""
        known = {
            "identifier": pair.identifier,
            "covisible": (pair.covisible0, pair.covisible1),
        }
        if isinstance(protocol_, HomographyProtocol):
            assert isinstance(pair, HomographyPair)
            return homography.evaluate_pair(
                matches.points0,
                matches.points1,
                pair.H,
                matches.size0,
                matches.size1,
                protocol_,
                **known,
            )
        if not isinstance(pair, PosedPair):
            return count_inliers(matches, pair, protocol_)
        points = []
        for name, K, xy, stored in (
            (pair.image0, pair.K0, matches.points0, matches.size0),
            (pair.image1, pair.K1, matches.points1, matches.size1),
        ):
            # In the pixels that K is for: thresholds count those.
            size = self.calibrated_size or stored
            self._check_centre(name, K, size)
            scale = np.array(size) / np.array(stored)
            points.append(resize_points(xy.astype(np.float64), scale))
        points0, points1 = points
        return protocol.evaluate_pair(points0, points1, *pair.truth(), protocol_, **known)

    def _check_centre(self, name: str, K: np.ndarray, size: Size) -> None:
        inside = 0 <= K[0, 2] < size[0] and 0 <= K[1, 2] < size[1]
        if not inside and not self.warned:
            self.warned.add(name)
            logger.warning(
                "K of %s has its principal point (%.0f, %.0f) outside of the image of %d x %d "
                "pixels: is it for another size (--k-size)?",
                *(self.files[name].name, K[0, 2], K[1, 2], *size),
            )


# ------------------------------------------------------------------------------------------ figures


def _summarise(
    result: SetResult,
    predictions: dict[str, Prediction],
    pair_set: ListPairs,
    rule: Protocol,
    kind: Kind,
    options: PairOptions,
) -> PairRow:
    counts = [len(p.scores) for p in predictions.values()]
    matches = sum(counts) / result.pairs
    if kind == "none":
        return PairRow(
            matcher=result.matcher,
            protocol=result.protocol,
            pairs=result.pairs,
            failures=result.pairs - len(predictions),
            matches=matches,
            inliers=sum(record.correct_after for record in result.records) / result.pairs,
        )
    default = homography.AUC_PX if kind == "homography" else metrics.THRESHOLDS
    found = metrics.measure(
        result.records,
        thresholds=options.thresholds or default,
        samples=options.samples,
        seed=options.seed,
        name=pair_set.name,
    )
    low_high = found.interval().T if options.samples else ()
    accuracy: tuple[float, ...] = ()
    if isinstance(rule, HomographyProtocol):
        accuracy = _accuracy(pair_set, predictions, rule.short_side)
    return PairRow(
        matcher=result.matcher,
        protocol=result.protocol,
        pairs=found.pairs,
        failures=found.failures,
        thresholds=found.thresholds,
        auc=found.auc,
        interval=tuple((float(low), float(high)) for low, high in low_high),
        matches=matches,
        precision_before=found.precision_before,
        precision_after=found.precision_after,
        correct_before=found.correct_before,
        correct_after=found.correct_after,
        accuracy=accuracy,
    )


def _accuracy(
    pair_set: ListPairs,
    predictions: dict[str, Prediction],
    short_side: int | None,
) -> tuple[float, ...]:
    """Mean matching accuracy over all pairs; those without a prediction count 0."""
    distances = [np.empty(0)] * len(pair_set.bad)
    for pair in pair_set.pairs:
        found = predictions.get(pair.identifier)
        if found is None:
            distances.append(np.empty(0))
            continue
        scale = homography.frame_scale(found.size1, short_side)
        error = homography.transfer_distance(found.points0, found.points1, pair.H, found.size0)
        distances.append(error * scale)
    return tuple(homography.accuracy(distances, homography.ACCURACY_PX))


def problems(report: PairReport) -> Sequence[str]:
    """Everything that was wrong with the list, the images and the matchers, for people."""
    return list(dict.fromkeys(map(str, [*report.lost, *report.run.problems])))
