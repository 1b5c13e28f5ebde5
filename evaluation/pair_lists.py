"""Evaluation on lists of pairs (`gim_hloc.evaluation.pair_formats`): ZEB's for everything else.

The runs are those of `gim_hloc.evaluation.zeb.run`: matches apart from verdicts, dumps in the same
line format, resuming. What is judged depends on the list: relative poses by ZEB's
protocols ``gim`` and ``poselib``, homographies by the corner error with OpenCV's RANSAC or PoseLib;
where there is no truth, the matches that agree with a fundamental matrix are counted and drawn.

Below the output folder, beside what `gim_hloc.evaluation.zeb.run` describes::

    results/<list>/results.md|csv|json   one row a matcher and protocol
    results/<list>/pairs.csv             one row a pair, matcher and protocol
    results/<list>/index.html            contact sheet of a list without truth
    results/<list>/pictures/             what it shows
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.evaluation import homography
from gim_hloc.evaluation.options import EvaluationOptions, PairOptions
from gim_hloc.evaluation.pair_formats import (
    POSED,
    Format,
    HomographyPair,
    ImageFile,
    PairList,
    PosedPair,
    read_list,
)
from gim_hloc.evaluation.zeb import metrics, protocol
from gim_hloc.evaluation.zeb.dumps import DumpRecord
from gim_hloc.evaluation.zeb.predictions import Prediction
from gim_hloc.evaluation.zeb.protocol import Protocol
from gim_hloc.evaluation.zeb.run import (
    Problem,
    RunReport,
    Selection,
    SetResult,
    draw,
    run_selections,
)
from gim_hloc.options import FitOptions
from gim_hloc.two_view import MIN_MATCHES, fit_geometry

if TYPE_CHECKING:
    from gim_hloc.images import ImageRecord
    from gim_hloc.types import ImageData, ImageOptions, MatcherInfo

logger = logging.getLogger(__name__)

Kind = Literal["pose", "homography", "none"]

_CELL = 8  # sides of images are multiples of it, px, as in ZEB
# EXIF orientations that show an image turned counter-clockwise by 0 to 3 quarters.
_ORIENTATIONS = (1, 8, 3, 6)
# Longest side in pixels at which one pixel of the fundamental matrix' threshold is a stored one;
# of larger images it is as much more.
_FUNDAMENTAL_SIDE = 1600.0
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

    def target(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) of an image shown, multiples of 8."""
        if self.exact is not None:
            width, height = self.exact
        else:
            factor = 1.0 if self.long_side is None else min(1.0, self.long_side / max(size))
            width, height = (round(side * factor) for side in size)
        return max(_CELL, width // _CELL * _CELL), max(_CELL, height // _CELL * _CELL)


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
    if len(sides) not in (1, 2) or min(sides) < _CELL:
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
class FundamentalProtocol(Protocol):
    """How the matches that agree with an epipolar geometry are found where there is no truth."""

    threshold: float = 1.0  # px: distance from the epipolar line
    confidence: float = 0.999999
    max_iterations: int = 10_000

    @property
    def name(self) -> str:
        """What folders are named by."""
        return f"{self.estimator}-fundamental-{self.threshold:g}px"


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
    output = Path(output)
    resize = _DEFAULT_RESIZE[pair_list.format]
    if options.resize is not None:
        resize = parse_resize(options.resize)
    protocols = make_protocols(kind, options)
    selection = select(pair_list, resize, options)
    run = run_selections(
        [selection],
        output,
        options,
        protocols,
        # Its sizes are meant for images that the list's rule has reduced.
        reference_settings=not resize.own,
        progress=progress,
    )
    report = PairReport(pair_list=pair_list, kind=kind, rows=[], run=run, lost=pair_list.lost)
    by_protocol = {entry.name: entry for entry in protocols}
    for result in run.results:
        if result.evaluated < result.pairs:
            continue
        report.rows.append(
            _summarise(result, selection, by_protocol[result.protocol], kind, options)
        )
    if not report.complete:
        return report
    from gim_hloc.evaluation import _pair_pages

    folder = output / "results" / pair_list.name
    report.files = _pair_pages.write(report, selection, folder, pictures=options.pictures)
    return report


def kind_of(pair_list: PairList) -> Kind:
    """Return what can be judged on a list."""
    if pair_list.format in POSED:
        return "pose"
    return "homography" if pair_list.format == "homography" else "none"


def make_protocols(kind: Kind, options: PairOptions) -> tuple[Protocol, ...]:
    """Return the protocols that an evaluation uses.

    Raises:
        InputError: no such protocol, or PoseLib is not installed.
    """
    made: list[Protocol] = []
    for name in options.protocols:
        if kind == "homography":
            made.append(
                homography.make_protocol(
                    name, threshold=options.threshold_px, short_side=options.short_side
                )
            )
            continue
        entry = protocol.make_protocol(name)
        if kind == "none":
            entry = FundamentalProtocol(estimator=entry.estimator)
        if options.threshold_px is not None:
            entry = replace(entry, threshold=options.threshold_px)
        made.append(entry)
    return tuple(made)


# ---------------------------------------------------------------------------------------- selection


def select(pair_list: PairList, resize: Resize, options: EvaluationOptions) -> PairSelection:
    """Return what a run on a list is about."""
    pairs, bad = draw(pair_list.pairs, pair_list.bad, options)
    kind = kind_of(pair_list)
    return PairSelection(
        name=pair_list.name,
        dump_name=None if kind == "none" else pair_list.name,
        dump_unit="px" if kind == "homography" else "deg",
        pairs=pairs,
        bad=bad,
        root=pair_list.root,
        resize=resize,
        calibrated_size=pair_list.calibrated_size,
        upright=pair_list.format == "pairs",
        files={file.key: file for pair in pairs for file in pair.files},
    )


@dataclass(frozen=True, kw_only=True)
class PairSelection(Selection):
    """The pairs of a list.

    Attributes:
        resize: size at which they are shown.
        calibrated_size: (width, height) of the images that K is for; None: the stored ones.
        upright: whether images are shown as EXIF says, before they are turned as the list says.
            Not where there is truth: lists speak of stored pixels, and their turns stand for EXIF.
        files: images by their keys.
        warned: what was said already.
    """

    resize: Resize
    calibrated_size: tuple[int, int] | None
    upright: bool
    files: dict[str, ImageFile]
    warned: set[str] = field(default_factory=set)

    @property
    def shown(self) -> list[Any]:
        """Size, and which way up; quarter turns are in the names."""
        return ["list", self.resize.name, self.upright]

    def path(self, name: str) -> Path:
        """Below the root."""
        return self.root / self.files[name].name

    def truth(self, pair: Any) -> list[Any]:
        """Calibration and pose, or the homography."""
        return [self.calibrated_size, *(matrix.tolist() for matrix in pair.truth())]

    def record(self, key: str) -> ImageRecord:
        """Open an image for people and for matchers: turned as it is shown.

        Raises:
            InputError: the file does not exist or cannot be read, named.
        """
        from gim_hloc import images

        file = self.files[key]
        path = self.path(key)
        if not path.is_file():
            raise InputError(f"The image {path} does not exist.")
        found = images.scan(
            path.parent, names=[path.name], min_size=_MIN_SIDE, upright=self.upright
        )
        if found.rejected:
            raise InputError(f"{path} cannot be read: {found.rejected[0].detail}.")
        return images.turned(replace(found[path.name], name=key), -file.turns)

    def read(self, name: str, options: ImageOptions) -> ImageData:
        """Read an image as matchers are to see it.

        Resizing is linear on 8-bit values, as in ZEB and in the evaluations that the lists come
        from; with ``resize.own`` the image is read as in any other command.
        """
        if self.resize.own:
            from gim_hloc import images

            return images.load(self.record(name), options)
        import cv2
        import torch

        from gim_hloc.images import orientation_affine, read_rgb
        from gim_hloc.types import ImageData

        file = self.files[name]
        path = self.path(name)
        pixels = read_rgb(path, upright=False)
        height, width = pixels.shape[:2]
        # The size is that of the image as it is shown: an exact one is not turned.
        across = file.turns % 2 == 1
        target = self.resize.target((height, width) if across else (width, height))
        columns, rows = target[::-1] if across else target
        if (columns, rows) != (width, height):
            pixels = cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_LINEAR)
        if options.grayscale:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        turned = np.rot90(pixels, file.turns).transpose(2, 0, 1)
        planes = np.ascontiguousarray(turned, dtype=np.float32) / np.float32(255)
        scale = np.array([width / columns, height / rows])
        to_original = orientation_affine(_ORIENTATIONS[file.turns], columns, rows) * scale[:, None]
        to_original[:, 2] += 0.5 * scale - 0.5
        return ImageData(
            image=torch.from_numpy(planes),
            name=name,
            size=(width, height),
            to_original=to_original,
        )

    def evaluate(
        self, prediction: Prediction, pair: Any, protocol: Protocol, info: MatcherInfo
    ) -> DumpRecord:
        """Judge the matches of one pair by what the list knows of it."""
        covisible = pair.covisible0, pair.covisible1
        if isinstance(pair, PosedPair):
            return evaluate_pose(self, prediction, pair, protocol)
        if isinstance(pair, HomographyPair) and isinstance(protocol, homography.HomographyProtocol):
            return homography.evaluate_pair(
                prediction.points0,
                prediction.points1,
                pair.H,
                prediction.size0,
                prediction.size1,
                protocol,
                identifier=pair.identifier,
                covisible=covisible,
            )
        inliers = fundamental_inliers(prediction, protocol)
        # Neither errors nor precision are known; the two numbers are all matches and the inliers.
        return DumpRecord(
            identifier=pair.identifier,
            covisible0=covisible[0],
            covisible1=covisible[1],
            rotation_error=math.nan,
            translation_error=math.nan,
            translation_distance=math.nan,
            precision_before=math.nan,
            correct_before=len(prediction.scores),
            precision_after=math.nan,
            correct_after=int(inliers.sum()),
        )


def evaluate_pose(
    selection: PairSelection, prediction: Prediction, pair: PosedPair, protocol_: Protocol
) -> DumpRecord:
    """Judge a pair with a pose, in the pixels that its K is for: thresholds count those."""
    sizes, points = [], []
    for stored, matched in (
        (prediction.size0, prediction.points0),
        (prediction.size1, prediction.points1),
    ):
        size = selection.calibrated_size or stored
        scale = np.array(size) / np.array(stored)
        sizes.append(size)
        points.append((matched.astype(np.float64) + 0.5) * scale - 0.5)
    for K, size, file in zip((pair.K0, pair.K1), sizes, pair.files, strict=True):
        inside = 0 <= K[0, 2] < size[0] and 0 <= K[1, 2] < size[1]
        if not inside and not selection.warned:
            selection.warned.add(file.key)
            logger.warning(
                "K of %s has its principal point (%.0f, %.0f) outside of the image of %d x %d "
                "pixels: is it for another size (--k-size)?",
                *(file.name, K[0, 2], K[1, 2], *size),
            )
    return protocol.evaluate_pair(
        points[0],
        points[1],
        pair.K0,
        pair.K1,
        pair.T_0to1,
        protocol_,
        identifier=pair.identifier,
        covisible=(pair.covisible0, pair.covisible1),
    )


def fundamental_scales(prediction: Prediction) -> tuple[float, float]:
    """Stored pixels of either image that one pixel of the threshold stands for."""
    scale0, scale1 = (
        max(1.0, max(size) / _FUNDAMENTAL_SIDE) for size in (prediction.size0, prediction.size1)
    )
    return scale0, scale1


def fundamental_inliers(prediction: Prediction, protocol: Protocol) -> np.ndarray:
    """Return the matches (M,) bool that agree with a fundamental matrix estimated from them.

    ``gim`` is USAC with MAGSAC as in GIM's demo (`gim_hloc.pipelines.match_pair`), ``poselib`` is
    LO-RANSAC. The threshold counts stored pixels, of images longer than 1600 px as many more.
    """
    scales = fundamental_scales(prediction)
    if protocol.estimator == "gim":
        fit = fit_geometry(
            prediction.points0,
            prediction.points1,
            FitOptions(
                fundamental_px=protocol.threshold,
                fundamental_confidence=protocol.confidence,
                fundamental_iterations=protocol.max_iterations,
            ),
            scale0=scales[0],
            scale1=scales[1],
        )
        return fit.inliers
    count = len(prediction.points0)
    if count < MIN_MATCHES:
        return np.zeros(count, dtype=bool)
    import poselib

    _, found = poselib.estimate_fundamental(
        prediction.points0.astype(np.float64) / scales[0],
        prediction.points1.astype(np.float64) / scales[1],
        {
            "max_epipolar_error": protocol.threshold,
            "success_prob": protocol.confidence,
            "max_iterations": protocol.max_iterations,
            "min_iterations": min(1000, protocol.max_iterations),
            "seed": protocol.seed,
        },
        {},
    )
    return np.asarray(found["inliers"], dtype=bool)


# ------------------------------------------------------------------------------------------ figures


def _summarise(
    result: SetResult,
    selection: PairSelection,
    protocol: Protocol,
    kind: Kind,
    options: PairOptions,
) -> PairRow:
    predictions = result.predictions.read()
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
    records = result.records
    found = metrics.measure(
        np.array([record.rotation_error for record in records]),
        np.array([record.translation_error for record in records]),
        precision=np.array([[r.precision_before, r.precision_after] for r in records]),
        correct=np.array([[r.correct_before, r.correct_after] for r in records]),
        thresholds=options.thresholds or default,
        samples=options.samples,
        seed=options.seed,
        name=selection.name,
    )
    low_high = found.interval().T if options.samples else ()
    accuracy: tuple[float, ...] = ()
    if isinstance(protocol, homography.HomographyProtocol):
        accuracy = _accuracy(selection, predictions, protocol)
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
    selection: PairSelection,
    predictions: dict[str, Prediction],
    protocol: homography.HomographyProtocol,
) -> tuple[float, ...]:
    """Mean matching accuracy over all pairs; those without a prediction count 0."""
    distances = [np.empty(0)] * len(selection.bad)
    for pair in selection.pairs:
        found = predictions.get(pair.identifier)
        if found is None:
            distances.append(np.empty(0))
            continue
        scale = homography.frame_scale(found.size1, protocol.short_side)
        error = homography.transfer_distance(found.points0, found.points1, pair.H, found.size0)
        distances.append(error * scale)
    return tuple(homography.accuracy(distances, homography.ACCURACY_PX))


def problems(report: PairReport) -> Sequence[str]:
    """Return everything that was wrong with the list, the images and the matchers, for people."""
    told: list[str | Problem] = [*report.lost, *report.run.problems]
    return list(dict.fromkeys(str(entry) for entry in told))
