"""Labels of pairs of near frames: a matcher's matches, filtered and fitted.

A *plain* round matches whole frames, each of which is encoded once for all its pairs. A *zoom*
round takes, for every pair, the bounding boxes of the labels that a plain round found, enlarges
both crops to the same box and matches them: what both frames see is then seen at a common, larger
scale. Labels of all rounds are in pixels of the frames, in hloc's frame; the reference pools
pixel-centre and pixel-corner coordinates.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc.errors import GimError, InputError, WeightsError
from gim_hloc.images import ImageRecord
from gim_hloc.matchers.base import Matcher
from gim_hloc.training.video.fit import epipolar_inliers
from gim_hloc.training.video.masks import FrameMasks
from gim_hloc.training.video.store import LabelStore

logger = logging.getLogger(__name__)

PAPER = ("gim_dkm", "gim_loftr", "gim_lightglue", "sift")
FREE = ("aliked_lightglue", "disk_lightglue", "sift")
ZOOM_BOX = (900, 1600)  # (height, width) px

_STEP = 8  # px: sides of enlarged crops are multiples of it
_ZOOM_CHUNK = 256  # pairs scheduled together in zoom rounds, where no two pairs share a crop
_ERROR = "error:"  # in reasons that say nothing about the pair: it is tried again
_MOST_ERRORS = 20  # in a row, after which a round stops: a device that failed, a broken matcher
_FEWEST = 8  # matches without which no fundamental matrix is fitted
# What GIM's video labels set beyond its operating points. SIFT: one keypoint per 64 pixels of the
# frame at nearly any contrast, no limit on the distance.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "gim_dkm": {"pad": False, "num_matches": 5000},
    "gim_loftr": {"max_size": None},
    "gim_lightglue": {"max_size": 1920, "max_keypoints": 2048, "filter_threshold": 0.1},
    "sift": {"max_size": None, "contrast_threshold": 1e-5, "max_distance": 2.0},
}
_SIFT_PIXELS = 64  # pixels of a frame per SIFT keypoint at most


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How matches become labels; the defaults are those of GIM's code."""

    quality: str = "base"  # operating point of the labellers
    zoom_base: str | None = None  # whose plain labels zoom rounds crop to; None: the first labeller
    zoom_box: tuple[int, int] | None = None  # (height, width), px; None: 900 x 1600, SIFT: frame
    static_px: float = 1.0  # matches that move less in x and in y are overlays; 0 keeps them
    fit_px: float = 0.5  # of the fundamental matrix (MAGSAC): distance to epipolar lines, px
    fit_confidence: float = 0.999999  # of the fit
    fit_iterations: int = 100_000  # of the fit, at most
    min_labels: int = 1  # pairs with fewer are noted as failed

    def __post_init__(self) -> None:
        if self.zoom_box is not None and min(self.zoom_box) < 4 * _STEP:
            raise InputError(f"zoom_box is {self.zoom_box}; give at least {4 * _STEP} px a side.")
        if self.fit_px <= 0 or self.static_px < 0:
            raise InputError("fit_px must be positive and static_px must not be negative.")
        if self.min_labels < 1 or self.fit_iterations < 1:
            raise InputError("min_labels and fit_iterations must be positive.")


def default_labellers() -> tuple[str, ...]:
    """The paper's labellers where their checkpoints are on this machine, else free ones."""
    from gim_hloc import weights
    from gim_hloc.matchers import registry

    missing = []
    for name in PAPER:
        for file in registry.describe(name).checkpoint:
            try:
                weights.locate(file, download=False)
            except WeightsError:
                missing.append(file)
    if not missing:
        return PAPER
    logger.info(
        "Labellers: %s. For the paper's (%s), %s would be needed: gim-weights download.",
        *(", ".join(FREE), ", ".join(PAPER), ", ".join(missing)),
    )
    return FREE


def load_labeller(name: str, *, quality: str, size: tuple[int, int], device: str) -> Any:
    """A matcher as labels are made with.

    Args:
        name: in the registry.
        quality: operating point.
        size: (width, height) of the frames in pixels.
        device: "auto" or a torch device.

    Raises:
        InputError: unknown name or operating point.
        WeightsError: its weights cannot be had.
    """
    from gim_hloc.matchers import registry

    overrides = dict(_OVERRIDES.get(name, {}))
    if name == "sift":
        overrides["max_keypoints"] = max(2048, size[0] * size[1] // _SIFT_PIXELS)
    return registry.load(name, quality=quality, device=device, **overrides)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ filters


def clean(
    points0: np.ndarray,
    points1: np.ndarray,
    options: RoundOptions,
    *,
    mask0: np.ndarray | None = None,
    mask1: np.ndarray | None = None,
) -> tuple[np.ndarray, str | None]:
    """Turn matches into labels: without overlays, off the masks, on one epipolar geometry.

    Args:
        points0: (M, 2) pixels of frame 0, hloc's frame.
        points1: (M, 2) in frame 1.
        options: see there.
        mask0: (H, W) bool, True where labels may be; or None.
        mask1: the same for frame 1.

    Returns:
        (n, 4) float32 labels, and None or why there are none. Overlays (watermarks, a dashboard)
        are told in pixels of the frames in zoom rounds too; the reference compares pixels of two
        different crops there, which finds none.
    """
    labels = np.concatenate([points0, points1], axis=1).astype(np.float32)
    labels = labels[np.isfinite(labels).all(axis=1)]
    found = len(labels)
    moved = np.abs(labels[:, 2:] - labels[:, :2]) >= options.static_px
    labels = labels[moved.any(axis=1)]
    still = found - len(labels)
    for mask, columns in ((mask0, slice(0, 2)), (mask1, slice(2, 4))):
        if mask is not None:
            labels = labels[_inside(mask, labels[:, columns])]
    nothing = labels[:0]
    if len(labels) < _FEWEST:
        return nothing, f"{found} matches, {still} of them still, {len(labels)} left"
    inside = epipolar_inliers(
        labels,
        threshold=options.fit_px,
        confidence=options.fit_confidence,
        max_iterations=options.fit_iterations,
    )
    kept = labels[inside]
    if len(kept) < options.min_labels:
        return nothing, f"{len(labels)} matches, {len(kept)} on one epipolar geometry"
    return kept, None


def _inside(mask: np.ndarray, xy: np.ndarray) -> np.ndarray:
    rows, columns = mask.shape
    x = np.rint(xy[:, 0]).astype(np.int64).clip(0, columns - 1)
    y = np.rint(xy[:, 1]).astype(np.int64).clip(0, rows - 1)
    allowed: np.ndarray = mask[y, x]
    return allowed


# ------------------------------------------------------------------------------------------- zooms


def crop_box(xy: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (exclusive) of the pixels that hold points and the next ones.

    Args:
        xy: (n, 2) points in hloc's frame, n > 0.
        size: (width, height) of the frame.
    """
    low = np.floor(xy.min(axis=0)).astype(int)
    high = np.ceil(xy.max(axis=0)).astype(int) + 1
    left, top = (int(v) for v in np.clip(low, 0, np.array(size) - 1))
    right, bottom = (int(v) for v in np.minimum(high, size))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def zoomed_size(width: int, height: int, box: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a crop that was enlarged to fit in a box (height, width).

    Sides are rounded, then cut to multiples of 8, at least 8.
    """
    scale = min(box[0] / height, box[1] / width)
    sides = (max(_STEP, round(side * scale) // _STEP * _STEP) for side in (width, height))
    return tuple(sides)  # type: ignore[return-value]


def zoom_box(labeller: str, size: tuple[int, int], options: RoundOptions) -> tuple[int, int]:
    """(height, width) of the box that crops are enlarged to.

    By default that of the reference: the frame for SIFT, 900 x 1600 for networks; upright for
    upright frames and no larger than the frame, which the reference's 1080p never is.
    """
    if options.zoom_box is not None:
        return options.zoom_box
    width, height = size
    if labeller == "sift":
        return height, width
    rows, columns = ZOOM_BOX if width >= height else ZOOM_BOX[::-1]
    return min(rows, height), min(columns, width)


def zoomed_image(
    rgb: np.ndarray,
    crop: tuple[int, int, int, int],
    box: tuple[int, int],
    options: Any,
    *,
    name: str,
    mask: np.ndarray | None = None,
) -> Any:
    """A crop as a matcher sees it, resized once.

    Args:
        rgb: (H, W, 3) uint8, the frame.
        crop: of `crop_box`.
        box: (height, width) to enlarge to, px.
        options: the matcher's ``ImageOptions``; its ``max_size`` holds for the crop.
        name: of the crop.
        mask: (H, W) bool of the frame, or None.

    Returns:
        ``ImageData`` whose ``to_original`` leads to pixels of the whole frame.
    """
    import cv2
    import torch

    from gim_hloc.images import network_size
    from gim_hloc.matchers.base import ImageData

    left, top, right, bottom = crop
    cut: np.ndarray = rgb[top:bottom, left:right]
    width, height = zoomed_size(right - left, bottom - top, box)
    width, height = network_size(width, height, options)
    if options.grayscale:
        cut = cv2.cvtColor(cut, cv2.COLOR_RGB2GRAY)
    # Enlarging by areas repeats pixels, so that is left to the cubic kernel.
    shrinks = width <= right - left and height <= bottom - top
    kernel = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    enlarged = cv2.resize(cut.astype(np.float32), (width, height), interpolation=kernel)
    resized = enlarged.reshape(height, width, -1).clip(0, 255) / np.float32(255)
    x, y = (right - left) / width, (bottom - top) / height
    allowed = None
    if mask is not None:
        part: np.ndarray = mask[top:bottom, left:right].astype(np.uint8)
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        allowed = torch.from_numpy(part.astype(bool))
    return ImageData(
        image=torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))),
        name=name,
        size=(rgb.shape[1], rgb.shape[0]),
        to_original=np.array([[x, 0.0, left + x / 2 - 0.5], [0.0, y, top + y / 2 - 0.5]]),
        mask=allowed,
    )


# ------------------------------------------------------------------------------------------- rounds


@dataclass(kw_only=True)
class RoundReport:
    """What one labeller did in one round, in this process."""

    labeller: str
    zoom: bool
    tried: int = 0  # pairs, now
    labelled: int = 0  # of them
    labels: int = 0  # of those together
    encoded: list[str] = field(default_factory=list)  # names of frames or crops, repetitions too


class _Unusable:
    """Stands for the image or the encoding of a frame that cannot be used."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Encoder:
    """What the scheduler needs of a matcher."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self.device = matcher.device

    def encode(self, image: Any) -> Any:
        from gim_hloc.engine import spoils_the_rest

        if isinstance(image, _Unusable):
            return image
        if image.mask is not None and not bool(image.mask.any()):
            return _Unusable(f"{image.name} is masked as a whole")
        try:
            return self._matcher.encode(image)
        except Exception as error:
            if spoils_the_rest(error):
                raise
            _tell(f"{image.name} cannot be encoded", error)
            return _Unusable(f"{_ERROR} {image.name} cannot be encoded ({_words(error)})")

    def smaller(self) -> bool:
        """No: labels of one store are made at one resolution."""
        return False


class LabelRound:
    """One labeller in one round on some pairs of frames.

    Args:
        matcher: the labeller.
        store: open for adding.
        frame: frame -> record of its image.
        masks: of the frames.
        options: see there.
        base: plain labels to crop to; makes this a zoom round.
        batch_size: pairs a network call; None: 1 on a processor, 4 on a GPU. A killed process loses
            as many.
        workers: threads side by side on a processor.
        cache_gb: memory for encodings, 10^9 bytes; None chooses.
        tick: called with the number of pairs that are done, now or before.
    """

    def __init__(
        self,
        matcher: Matcher,
        store: LabelStore,
        frame: Callable[[int], ImageRecord],
        masks: FrameMasks,
        options: RoundOptions,
        *,
        base: LabelStore | None = None,
        batch_size: int | None = None,
        workers: int = 1,
        cache_gb: float | None = None,
        tick: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.matcher, self.store, self.frame = matcher, store, frame
        self.masks, self.options, self.base = masks, options, base
        self.batch_size = batch_size or (1 if matcher.device.type == "cpu" else 4)
        self.workers, self.cache_gb, self.tick = workers, cache_gb, tick
        self.box = zoom_box(store.info.labeller, store.info.size, options)
        self._errors = 0  # in a row
        # A frame is in at most six pairs, which follow each other.
        self._mask = functools.lru_cache(maxsize=16)(self._load_mask)
        self._rgb = functools.lru_cache(maxsize=8)(self._load_rgb)

    def run(self, pairs: Sequence[tuple[int, int]]) -> RoundReport:
        """Label the pairs that are neither labelled nor noted as failed; errors are tried again.

        Raises:
            OutputError: the store cannot be written.
            GimError: many pairs in a row ended with an error: it is not their fault.
            RuntimeError, MemoryError: memory ran out with one pair at a time.
        """
        todo = [(i, j) for i, j in pairs if not self.store.has(i, j)]
        todo = [(i, j) for i, j in todo if _ERROR in (self.store.failure(i, j) or _ERROR)]
        self.tick(len(pairs) - len(todo))
        info = self.store.info
        report = RoundReport(labeller=info.labeller, zoom=info.zoom, tried=len(todo))
        if self.base is None:
            self._match(todo, report)
            return report
        ready = []
        for i, j in todo:
            if self.base.has(i, j):
                ready.append((i, j))
                continue
            why = self.base.failure(i, j) or "not tried"
            self._note((i, j), f"no plain labels of {self.base.info.labeller}: {why}", report)
        for start in range(0, len(ready), _ZOOM_CHUNK):
            self._match(ready[start : start + _ZOOM_CHUNK], report)
        return report

    def _match(self, pairs: Sequence[tuple[int, int]], report: RoundReport) -> None:
        from gim_hloc.engine import match_scheduled

        if not pairs:
            return
        named = {self._names(i, j): (i, j) for i, j in pairs}
        base = self.base
        read = self._read_frame if base is None else functools.partial(self._read_crop, base)
        schedule = match_scheduled(
            _Encoder(self.matcher),
            list(named),
            read,
            self._match_batch,
            lambda names, result: self._note(named[names], result, report),
            batch_size=self.batch_size,
            workers=self.workers,
            cache_gb=self.cache_gb,
        )
        report.encoded += schedule.encoded

    def _names(self, i: int, j: int) -> tuple[str, str]:
        """What a pair encodes: two frames, or two crops that no other pair has."""
        if self.base is None:
            return f"{i:08d}", f"{j:08d}"
        return f"{i:08d}_{j:08d}/0", f"{i:08d}_{j:08d}/1"

    def _read_frame(self, name: str) -> Any:
        from gim_hloc import images

        record = self.frame(int(name))
        try:
            return images.load(record, self.matcher.image_options, mask=self._mask(int(name)))
        except InputError as error:
            return _Unusable(f"{_ERROR} {error}")

    def _read_crop(self, base: LabelStore, name: str) -> Any:
        pair, _, side = name.partition("/")
        i, j = (int(part) for part in pair.split("_"))
        columns = slice(2 * int(side), 2 * int(side) + 2)
        frame = (i, j)[int(side)]
        try:
            xy = base.read(i, j)[:, columns]
            return zoomed_image(
                self._rgb(frame),
                crop_box(xy, self.store.info.size),
                self.box,
                self.matcher.image_options,
                name=name,
                mask=self._mask(frame),
            )
        except GimError as error:
            return _Unusable(f"{_ERROR} {error}")

    def _load_rgb(self, index: int) -> np.ndarray:
        from gim_hloc.images import read_rgb

        return read_rgb(self.frame(index), upright=False)

    def _load_mask(self, index: int) -> np.ndarray | None:
        return self.masks.load(self.frame(index))

    def _match_batch(self, encodings: list[tuple[Any, Any]]) -> list[Any]:
        """Match a batch; what cannot be matched gives the reason."""
        from gim_hloc.engine import spoils_the_rest

        results: list[Any] = [_unusable(a, b) for a, b in encodings]
        rows = [row for row, result in enumerate(results) if result is None]
        if not rows:
            return results
        try:
            found = self.matcher.match_batch([encodings[row] for row in rows])
        except Exception as error:
            if spoils_the_rest(error):
                raise
            if len(rows) > 1:  # one of them spoils the batch
                return [self._match_batch([pair])[0] for pair in encodings]
            a, b = encodings[rows[0]]
            _tell(f"{a.name} and {b.name} cannot be matched", error)
            results[rows[0]] = f"{_ERROR} cannot be matched ({_words(error)})"
            return results
        for row, matches in zip(rows, found, strict=True):
            results[row] = (matches.keypoints0.cpu().numpy(), matches.keypoints1.cpu().numpy())
        return results

    def _note(self, pair: tuple[int, int], result: Any, report: RoundReport) -> None:
        """Store the labels of a pair, or why it has none."""
        i, j = pair
        if not isinstance(result, str):
            masks = (self._mask(i), self._mask(j))
            labels, reason = clean(
                result[0], result[1], self.options, mask0=masks[0], mask1=masks[1]
            )
            if reason is None:
                self.store.write(i, j, labels)
                self._errors = 0
                report.labelled += 1
                report.labels += len(labels)
                self.tick(1)
                return
            result = reason
        self.store.fail(i, j, result)
        self.tick(1)
        self._errors = self._errors + 1 if _ERROR in result else 0
        if self._errors >= _MOST_ERRORS:
            raise GimError(
                f"{self._errors} pairs in a row cannot be labelled with "
                f"{self.store.info.labeller}. The last: {result}. The same command tries again."
            )


def _unusable(a: Any, b: Any) -> str | None:
    reasons = [side.reason for side in (a, b) if isinstance(side, _Unusable)]
    return "; ".join(reasons) or None


def _tell(what: str, error: BaseException) -> None:
    logger.warning("%s: %s", what, _words(error))
    logger.debug("%s", what, exc_info=error)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def frame_record(path: Path, size: tuple[int, int]) -> ImageRecord:
    """The record of a stored frame, which was written by us: nothing to inspect."""
    return ImageRecord(name=path.name, path=path, width=size[0], height=size[1], sha256="")
